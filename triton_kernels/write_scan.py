"""gated_write on a GPU for an erase tensor, the form of the Neural Turing Machine, forward and backward.

    v[i, j] <- v[i, j] (1 - a[t, i] e[t, j]) + a[t, i] w[t, j]          for t = 1 .. T

The factor depends on slot and column, so no product of matrices has these weights: a program keeps a block of slots and
columns of v in registers and goes through the tokens. Gates come from the matrix unit, a chunk of tokens at a time.
Bound by arithmetic in registers, 3 T N V, and by latency along T.

Backward, with u = dv running from the last token to the first:

    da[t, i] = sum_j u[i, j] (w[t, j] - e[t, j] v_{t-1}[i, j])
    dw[t, j] = sum_i a u,     de[t, j] = -sum_i a u v_{t-1}
    u <- u (1 - a e)

The forward pass, run again, stores v at the start of every chunk; a chunk then replays its tokens into a workspace and
walks back. Slots go in groups that bound the memory of all this. ds reaches queries, keys and mask through
score_gradients.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, Width, launch, plan, width
from .layout import Gradient, precision
from .score_gradients import score_gradients
from .tiles import open_slots, put, slots, tile, tokens
from .write_tiles import Write, gates, key_scores, multiply, open_tokens, prefix_products, suffix_products

WORKSPACE = 1 << 25  # float32 numbers of the backward pass, for one group of slots


@triton.jit
def at_token(x, i, BLOCK_T: tl.constexpr):
    """Column ``i`` of a tile [slots, tokens]."""
    return tl.sum(tl.where((tl.arange(0, BLOCK_T) == i)[None, :], x, 0.0), 1)


@triton.jit
def token_row(x, b, B1, t0, i, t_ok, inner, D, column, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Row of token ``t0 + i``, float32; zero where the token does not write."""
    d = column + tl.arange(0, BLOCK)
    t = tl.full([], 0, tl.int32) + t0 + i
    writes = tl.sum(tl.where(tl.arange(0, BLOCK_T) == i, t_ok.to(tl.int32), 0), 0) > 0
    return tl.load(tokens(x, b, B1, t, inner) + d, mask=(d < D) & writes, other=0.0).to(tl.float32)


@triton.jit
def write_scan_kernel(
    v, k, q, w, mask, token_mask, e, out, retained, states, prefix, T, N, K, V, B1, inner, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens for one block of slots and columns; ``states``, ``prefix``: v and prod (1 - a) before each chunk."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    exists = n < N
    ok, bias = open_slots(mask, b, B1, n, N)
    k_rows = slots(k, b, B1, n)
    k0 = tile(k_rows, ok, K, 0, BLOCK_K)
    x = tile(slots(v, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
    kept = tl.full([BLOCK_N], 1.0, tl.float32)
    at = b.to(tl.int64) * tl.cdiv(T, BLOCK_T) * N + n
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(token_mask, b, B1, t, inner, T)
        s = key_scores(k0, k_rows, ok, bias, q, b, B1, t, t_ok, inner, K, scale, BLOCK_K, K_STEPS, PRECISION)
        a, keep, _ = gates(s, ok[:, None] & t_ok[None, :], 1.0, "full")
        if states is not None:
            put(states + at * V, exists, V, column, x, BLOCK_V)
            tl.store(prefix + at, kept, mask=exists)
        kept = kept * tl.reduce(keep, 1, multiply)
        for i in range(tl.minimum(BLOCK_T, T - t0)):
            a_i = at_token(a, i, BLOCK_T)[:, None]
            e_i = token_row(e, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            w_i = token_row(w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            x = x * (1.0 - a_i * e_i) + a_i * w_i
        at += N
    if out is not None:
        put(slots(out, b, B1, n), exists, V, column, x, BLOCK_V)
        if column == 0:
            tl.store(slots(retained, b, B1, n), kept, mask=exists)


@triton.jit
def write_scan_backward_kernel(
    k, q, w, mask, token_mask, e, u, states, prefix, replay, d_retained, d_v, ds, dw, de,
    T, N, K, V, B1, inner, B, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens, last to first. ds [column blocks, B, T, N]; dw, de [slot blocks, B, T, V]: parts, to be added."""
    pid = tl.program_id(0)
    own = replay + pid.to(tl.int64) * BLOCK_T * BLOCK_N * BLOCK_V
    blocks = tl.cdiv(N, BLOCK_N)
    block = pid % blocks
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    step = pid % tl.cdiv(V, BLOCK_V)
    column = step * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    exists = n < N
    d = column + tl.arange(0, BLOCK_V)
    ok, bias = open_slots(mask, b, B1, n, N)
    k_rows = slots(k, b, B1, n)
    k0 = tile(k_rows, ok, K, 0, BLOCK_K)
    grad = tile(slots(u, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
    after = tl.full([BLOCK_N], 1.0, tl.float32)  # prod (1 - a) behind the chunk
    chunks = tl.cdiv(T, BLOCK_T)
    inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    for c in range(chunks):
        t0 = (chunks - 1 - c) * BLOCK_T
        at = (b.to(tl.int64) * chunks + chunks - 1 - c) * N + n
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(token_mask, b, B1, t, inner, T)
        s = key_scores(k0, k_rows, ok, bias, q, b, B1, t, t_ok, inner, K, scale, BLOCK_K, K_STEPS, PRECISION)
        a, keep, _ = gates(s, ok[:, None] & t_ok[None, :], 1.0, "full")
        x = tile(states + at * V, exists, V, column, BLOCK_V)
        count = tl.minimum(BLOCK_T, T - t0)
        for i in range(count):
            tl.store(own + i * BLOCK_N * BLOCK_V + inside, x)
            a_i = at_token(a, i, BLOCK_T)[:, None]
            e_i = token_row(e, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            w_i = token_row(w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            x = x * (1.0 - a_i * e_i) + a_i * w_i
        tl.debug_barrier()  # what one thread stored, another may read
        da = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for back in range(count):
            i = count - 1 - back
            x = tl.load(own + i * BLOCK_N * BLOCK_V + inside)
            a_i = at_token(a, i, BLOCK_T)[:, None]
            e_i = token_row(e, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            w_i = token_row(w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            da_i = tl.sum(grad * (w_i - e_i * x), 1)
            da = tl.where((tl.arange(0, BLOCK_T) == i)[None, :], da_i[:, None], da)
            row = ((block.to(tl.int64) * B + b) * T + t0 + i) * V + d
            weighted = a_i * grad
            tl.store(dw + row, tl.sum(weighted, 0), mask=d < V)
            tl.store(de + row, -tl.sum(tl.where(ok[:, None], weighted * x, 0.0), 0), mask=d < V)
            grad = grad * (1.0 - a_i * e_i)
        tl.debug_barrier()
        if d_retained is not None:
            g = tl.load(slots(d_retained, b, B1, n), mask=ok & (column == 0), other=0.0)
            behind, total = suffix_products(keep)
            others = behind * prefix_products(keep) * (after * tl.load(prefix + at, mask=exists, other=1.0))[:, None]
            da -= g[:, None] * others
            after = after * total
        live = ok[:, None] & t_ok[None, :]
        result = tl.where(live, da * a * keep, 0.0)
        rows = ((step.to(tl.int64) * B + b) * T + t) * N
        tl.store(ds + rows[None, :] + n[:, None], result, mask=exists[:, None] & (t < T)[None, :])
    if d_v is not None:
        put(slots(d_v, b, B1, n), exists, V, column, grad, BLOCK_V)


def _plan(x: Write, values: Tensor) -> tuple[Plan, Width, dict]:
    tensors = (x.query, values)
    p = plan("write_scan", x.call.device, max(x.K, x.V), *tensors)
    wide_k, wide_v = width(x.K, *tensors), width(x.V, *tensors)
    constants = {
        "BLOCK_T": p.config.block_t, "BLOCK_N": p.config.block_n, "BLOCK_K": wide_k.block, "K_STEPS": wide_k.steps,
        "BLOCK_V": wide_v.block, "PRECISION": precision(*tensors),
    }  # fmt: skip
    return p, wide_v, constants


def forward(
    x: Write, values: Tensor, out: tuple | None, retained: tuple | None, states: Tensor | None = None,
    prefix: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out`` and ``retained`` as kernels take them, or for the backward pass ``states`` and ``prefix``."""
    call = x.call
    p, wide_v, constants = _plan(x, values)
    launch(
        write_scan_kernel, call.B * triton.cdiv(x.N, p.config.block_n) * triton.cdiv(x.V, wide_v.block),
        call.slots(values), *x.sources(), call.rows(x.erase), out, retained, states, prefix,
        x.count, x.N, x.K, x.V, call.batches[1], x.inner, x.scale, plan=p, **constants,
    )  # fmt: skip


def _group(x: Write, values: Tensor, u: Tensor, d_retained: Tensor | None, wants: list[bool]) -> list[Tensor]:
    """The six gradients of one group of slots."""
    call, T, N, V = x.call, x.T, x.N, x.V
    p, wide_v, constants = _plan(x, values)
    count, c = x.count, p.config
    chunks, blocks, columns = triton.cdiv(count, c.block_t), triton.cdiv(N, c.block_n), triton.cdiv(V, wide_v.block)
    programs = call.B * blocks * columns
    states, prefix = call.scratch(call.B, chunks, N, V), call.scratch(call.B, chunks, N)
    forward(x, values, None, None, states, prefix)
    replay = call.scratch(programs, c.block_t, c.block_n, wide_v.block)
    ds = call.scratch(columns, call.B, count, N)
    dw, de = call.scratch(blocks, call.B, count, V), call.scratch(blocks, call.B, count, V)
    d_values = Gradient(call, values, wants[0], "memory", N, V)
    launch(
        write_scan_backward_kernel, programs, *x.sources(), call.rows(x.erase), call.slots(u), states, prefix, replay,
        call.slot_numbers(d_retained), d_values.rows(), ds, dw, de, count, N, x.K, V, call.batches[1], x.inner, call.B,
        x.scale, plan=p, **constants,
    )  # fmt: skip
    d_keys = Gradient(call, x.keys, wants[1], "memory", N, x.K)
    d_query = Gradient(call, x.query, wants[2], "tokens", T, x.K)
    d_write = Gradient(call, x.write, wants[3], "tokens", T, V)
    d_erase = Gradient(call, x.erase, wants[4], "tokens", T, V)
    d_mask = Gradient(call, x.slot_mask, wants[5], "memory", N)
    ds = ds.sum(0).view(*call.batches, call.F, T, N)
    query = x.query
    if x.token_mask is not None:  # a silent token may hold anything
        query = torch.where(x.token_mask.unsqueeze(-1), query, 0)
    score_gradients(
        call, "given", query, x.keys, x.slot_mask, x.scale, d_query, d_keys, d_mask,
        d_weights=(ds, *ds.stride()[:4]),
    )  # fmt: skip
    for gradient, parts in ((d_write, dw), (d_erase, de)):
        if gradient.wanted:
            gradient.view.copy_(parts.sum(0).view(gradient.view.shape))
    return [g.result() for g in (d_values, d_keys, d_query, d_write, d_erase, d_mask)]


def backward(x: Write, values: Tensor, d_out: Tensor, d_retained: Tensor | None, wants: list[bool]):
    """The six gradients of :func:`gated_write.gated_write_backward`."""
    N, c = x.N, _plan(x, values)[0].config
    chunks = triton.cdiv(x.count, c.block_t)
    slot = x.V * (chunks + c.block_t) + x.count * (2 * x.V // c.block_n + 1)
    group = max(c.block_n, WORKSPACE // max(1, x.call.B * slot) // c.block_n * c.block_n)
    results = []
    for first in range(0, max(N, 1), group):
        n = slice(first, first + group)
        mask = None if x.slot_mask is None else x.slot_mask[..., n]
        part = Write(
            x.call.op, values[..., n, :], x.keys[..., n, :], x.query, x.write, x.erase, mask, x.token_mask,
            x.scale, x.erase_scale,
        )  # fmt: skip
        retained = None if d_retained is None else d_retained[..., n]
        results.append(_group(part, values[..., n, :], d_out[..., n, :], retained, wants))
    if len(results) == 1:
        return tuple(results[0])
    d_values, d_keys, d_query, d_write, d_erase, d_mask = zip(*results)
    joined = [torch.cat(d, -2) if d[0].dim() > 1 else d[0] for d in (d_values, d_keys)]
    summed = [sum((g.float() for g in d[1:]), d[0].float()).to(d[0].dtype) for d in (d_query, d_write, d_erase)]
    return (*joined, *summed, torch.cat(d_mask, -1))
