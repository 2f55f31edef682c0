"""Dense writes on a GPU for an erase tensor, the form of the Neural Turing Machine, forward and backward.

    v[i, j] <- v[i, j] (1 - a[t, i] e[t, j]) + a[t, i] w[t, j]          for t = 1 .. T

The factor depends on slot and column, so no product of matrices has these weights: a program keeps a block of slots and
columns of v in registers and goes through the tokens. Gates are made, or read, a chunk of tokens at a time.
Bound by arithmetic in registers, 3 T N V, and by latency along T.

Backward, with u = dv running from the last token to the first:

    da[t, i] = sum_j u[i, j] (w[t, j] - e[t, j] v_{t-1}[i, j])
    dw[t, j] = sum_i a u,     de[t, j] = -sum_i a u v_{t-1}
    u <- u (1 - a e)

The forward pass, run again, stores v at the start of every chunk; a chunk then replays its tokens into a workspace and
walks back. Slots go in groups that bound the memory of all this. Of gates that are given da is the gradient; ds reaches
queries, keys and mask through score_gradients.py. A softmax needs delta_t = sum_i a da of all slots first: where there
is more than one group, the groups are gone through twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, Width, launch, plan, width
from .layout import Gradient, precision
from .score_gradients import score_gradients
from .tiles import open_slots, put, slot_block, slots, tile, tokens
from .write_tiles import Write, gates, multiply, open_tokens, prefix_products, suffix_products

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
    v, source, e, out, retained, states, prefix, sizes, scale,
    GATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens for one block of slots and columns; ``states``, ``prefix``: v and prod (1 - a) before each chunk."""
    T, N, K, V, B1, inner = sizes
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    exists = n < N
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    x = tile(slots(v, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
    kept = tl.full([BLOCK_N], 1.0, tl.float32)
    at = b.to(tl.int64) * tl.cdiv(T, BLOCK_T) * N + n
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
        a, keep, _ = gates(
            k0, k_rows, ok, bias, source.q, source.norm, b, n, t, t_ok, sizes, scale, 1.0,
            GATE, "full", BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        if states is not None:
            put(states + at * V, exists, V, column, x, BLOCK_V)
            tl.store(prefix + at, kept, mask=exists)
        kept = kept * tl.reduce(keep, 1, multiply)
        for i in range(tl.minimum(BLOCK_T, T - t0)):
            a_i = at_token(a, i, BLOCK_T)[:, None]
            e_i = token_row(e, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            w_i = token_row(source.w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            x = x * (1.0 - a_i * e_i) + a_i * w_i
        at += N
    if out is not None:
        put(slots(out, b, B1, n), exists, V, column, x, BLOCK_V)
        if retained is not None and column == 0:
            tl.store(slots(retained, b, B1, n), kept, mask=exists)


@triton.jit
def write_scan_backward_kernel(
    source, e, u, states, prefix, replay, d_retained, d_v, a_out, ds, dw, de, sizes, B, scale,
    GATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens, last to first. ds [column blocks, B, T, N]; dw, de [slot blocks, B, T, V]: parts, to be added.

    ds: of gates that are given da, of a softmax a da; then a_out [B, T, N] is a.
    """
    T, N, K, V, B1, inner = sizes
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
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    grad = tile(slots(u, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
    after = tl.full([BLOCK_N], 1.0, tl.float32)  # prod (1 - a) behind the chunk
    chunks = tl.cdiv(T, BLOCK_T)
    cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    for c in range(chunks):
        t0 = (chunks - 1 - c) * BLOCK_T
        at = (b.to(tl.int64) * chunks + chunks - 1 - c) * N + n
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
        a, keep, _ = gates(
            k0, k_rows, ok, bias, source.q, source.norm, b, n, t, t_ok, sizes, scale, 1.0,
            GATE, "full", BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        x = tile(states + at * V, exists, V, column, BLOCK_V)
        count = tl.minimum(BLOCK_T, T - t0)
        for i in range(count):
            tl.store(own + i * BLOCK_N * BLOCK_V + cell, x)
            a_i = at_token(a, i, BLOCK_T)[:, None]
            e_i = token_row(e, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            w_i = token_row(source.w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            x = x * (1.0 - a_i * e_i) + a_i * w_i
        tl.debug_barrier()  # what one thread stored, another may read
        da = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for back in range(count):
            i = count - 1 - back
            x = tl.load(own + i * BLOCK_N * BLOCK_V + cell)
            a_i = at_token(a, i, BLOCK_T)[:, None]
            e_i = token_row(e, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            w_i = token_row(source.w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
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
        inside = exists[:, None] & (t < T)[None, :]
        if GATE == "sigmoid":
            da = da * a * keep
        elif GATE == "softmax":
            da = da * a
            tl.store(a_out + ((b.to(tl.int64) * T + t) * N)[None, :] + n[:, None], a, mask=inside & (column == 0))
        rows = ((step.to(tl.int64) * B + b) * T + t) * N
        tl.store(ds + rows[None, :] + n[:, None], tl.where(live, da, 0.0), mask=inside)
    if d_v is not None:
        put(slots(d_v, b, B1, n), exists, V, column, grad, BLOCK_V)


def _plan(x: Write, values: Tensor) -> tuple[Plan, Width, dict]:
    tensors = (x.query, values)
    p = plan("write_scan", max(x.K, x.V), *tensors)
    wide_k, wide_v = width(x.K, *tensors), width(x.V, *tensors)
    constants = {
        "GATE": x.gate, "BLOCK_T": p.config.block_t, "BLOCK_N": p.config.block_n, "BLOCK_K": wide_k.block,
        "K_STEPS": wide_k.several, "BLOCK_V": wide_v.block, "PRECISION": precision(*tensors),
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
        call.slots(values), x.source(), call.rows(x.erase), out, retained, states, prefix, x.sizes, x.scale,
        plan=p, **constants,
    )  # fmt: skip


def _slots(x: Write, values: Tensor, first: int, count: int) -> Write:
    """The write of slots ``first .. first + count`` alone."""
    n = slice(first, first + count)
    part = Write(
        x.call.op, x.gate, values[..., n, :], None if x.keys is None else x.keys[..., n, :],
        x.query[..., n] if x.gate == "given" else x.query, x.write, x.erase,
        None if x.slot_mask is None else x.slot_mask[..., n], x.token_mask, x.scale, x.erase_scale,
    )  # fmt: skip
    if x.norm is not None:
        top, rest, best = x.norm
        part.norm = (top, rest, best - first)
    return part


def _sweep(x: Write, values: Tensor, u: Tensor, d_retained: Tensor | None, d_values: Gradient):
    """ds ``[B, F * T, N]`` as the kernel leaves it, a of a softmax, dw and de ``[B, F * T, V]``; fills ``d_values``."""
    call, count, N, V = x.call, x.count, x.N, x.V
    p, wide_v, constants = _plan(x, values)
    c = p.config
    chunks, blocks, columns = triton.cdiv(count, c.block_t), triton.cdiv(N, c.block_n), triton.cdiv(V, wide_v.block)
    programs = call.B * blocks * columns
    states, prefix = call.scratch(call.B, chunks, N, V), call.scratch(call.B, chunks, N)
    forward(x, values, None, None, states, prefix)
    replay = call.scratch(programs, c.block_t, c.block_n, wide_v.block)
    ds, a = call.scratch(columns, call.B, count, N), None
    if x.gate == "softmax":
        a = call.scratch(call.B, count, N)
    dw, de = call.scratch(blocks, call.B, count, V), call.scratch(blocks, call.B, count, V)
    launch(
        write_scan_backward_kernel, programs, x.source(), call.rows(x.erase), call.slots(u), states, prefix, replay,
        call.slot_numbers(d_retained), d_values.rows(), a, ds, dw, de, x.sizes, call.B, x.scale, plan=p, **constants,
    )  # fmt: skip
    return ds.sum(0), a, dw.sum(0), de.sum(0)


def _group(x: Write, swept: tuple, d_values: Gradient, wants: list[bool]) -> list[Tensor]:
    """The six gradients of one group of slots; of a softmax, ``swept`` has ds itself by now."""
    call, T, N, V = x.call, x.T, x.N, x.V
    ds, _, dw, de = swept
    d_keys = Gradient(call, x.keys, wants[1], "memory", N, x.K)
    d_query = Gradient(call, x.query, wants[2], "tokens", T, N if x.gate == "given" else x.K)
    d_write = Gradient(call, x.write, wants[3], "tokens", T, V)
    d_erase = Gradient(call, x.erase, wants[4], "tokens", T, V)
    d_mask = Gradient(call, x.slot_mask, wants[5], "memory", N)
    ds = ds.view(*call.batches, call.F, T, N)
    if x.gate == "given":
        parts = ((d_query, ds),)
    else:
        parts = ()
        query = x.query
        if x.token_mask is not None:  # a silent token may hold anything
            query = torch.where(x.token_mask.unsqueeze(-1), query, 0)
        score_gradients(
            call, "given", query, x.keys, x.slot_mask, x.scale, d_query, d_keys, d_mask,
            d_weights=(ds, *ds.stride()[:4]),
        )  # fmt: skip
    for gradient, part in (*parts, (d_write, dw), (d_erase, de)):
        if gradient.wanted:
            gradient.view.copy_(part.view(gradient.view.shape))
    return [g.result() for g in (d_values, d_keys, d_query, d_write, d_erase, d_mask)]


def backward(x: Write, values: Tensor, d_out: Tensor, d_retained: Tensor | None, wants: list[bool]):
    """The six gradients of :func:`write.backward`."""
    N, c = x.N, _plan(x, values)[0].config
    chunks = triton.cdiv(x.count, c.block_t)
    slot = x.V * (chunks + c.block_t) + x.count * (2 * x.V // c.block_n + 1 + (x.gate == "softmax"))
    group = max(c.block_n, WORKSPACE // max(1, x.call.B * slot) // c.block_n * c.block_n)
    starts = range(0, max(N, 1), group)

    def sweep(first: int):
        n = slice(first, first + group)
        part = _slots(x, values, first, group)
        d_values = Gradient(part.call, values[..., n, :], wants[0], "memory", part.N, x.V)
        retained = None if d_retained is None else d_retained[..., n]
        return part, _sweep(part, values[..., n, :], d_out[..., n, :], retained, d_values), d_values

    delta, only = 0.0, None
    if x.gate == "softmax":
        for first in starts:
            only = sweep(first)
            delta = delta + only[1][0].sum(-1, keepdim=True)
        if len(starts) > 1:
            only = None
    results = []
    for first in starts:
        part, swept, d_values = only or sweep(first)
        if x.gate == "softmax":
            swept = (swept[0] - swept[1] * delta, *swept[1:])
        results.append(_group(part, swept, d_values, wants))
    if len(results) == 1:
        return tuple(results[0])
    d_values, d_keys, d_query, d_write, d_erase, d_mask = zip(*results)

    def join(parts: tuple, dim: int) -> Tensor:
        return torch.cat(parts, dim) if parts[0].dim() > 1 else parts[0]  # a gradient that nobody wants is empty

    def add(parts: tuple) -> Tensor:
        return sum((g.float() for g in parts[1:]), parts[0].float()).to(parts[0].dtype)

    of_query = join(d_query, -1) if x.gate == "given" else add(d_query)  # given weights lie along the slots
    return join(d_values, -2), join(d_keys, -2), of_query, add(d_write), add(d_erase), torch.cat(d_mask, -1)
