"""Dense writes on a GPU, backward, for an erase that is one number e. Letters as in write.py; U is dV'.

    c[t, i] = <w_t, U_i>,     p_0 = <v_i, U_i>,     p_t = f[t, i] p_{t-1} + a[t, i] c[t, i]
    da[t, i] = R[t, i] (c[t, i] - e p_{t-1}),     dw_t = sum_i a R U_i,     dv_i = R[0] U_i
    and with a gradient g of retained:     da[t, i] -= g_i prod_{u > t} (1 - a) prod_{u < t} (1 - a)
    ds = da a (1 - a) of a sigmoid,  ds = a (da - delta_t) with delta_t = sum_i a da of a softmax

p runs forward in t and R backward, both are one number per slot, and nothing divides by 1 - a. Three steps:

1. `write_chunk_kernel`: for each chunk of tokens and block of slots, alone, the product F of f and the share G that the
   chunk adds to p (and the product of 1 - a where it is another).
2. `write_carry_kernel`: along the chunks, p at the start of each and R at its end, in place of G and F; then dv. These
   N T / C numbers (C tokens a chunk) are all that is kept.
3. Every tile of chunk and slots now stands alone: `write_token_kernel` keeps a chunk and streams slots (dw, and dq or
   the gradient of gates that are given), `write_slot_kernel` keeps slots and streams chunks (dk, dmask). Fixed order,
   no atomics. For a softmax `write_token_kernel` runs twice: the first time sums delta, which both kernels then need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, launch_in_parts, plan, width
from .layout import Gradient, precision
from .tiles import columns, dots, open_slots, product, put, slot_block, slots, tile, token_block, tokens
from .write_tiles import (
    Write,
    gates,
    multiply,
    open_tokens,
    prefix_products,
    states_before,
    suffix_products,
)


class Carried(NamedTuple):
    """What the second step leaves of each chunk and slot, [B, chunks, N]: R behind the chunk and p before it; for a
    gradient of retained prod (1 - a) behind it, where that is not R, and before it."""

    R: Tensor
    p: Tensor
    Q: Tensor | None
    P: Tensor | None


class SlotsCut(NamedTuple):
    """Of the loop over slots: see ``launch_in_parts``."""

    parts: int
    span: int
    q_part: int
    w_part: int
    delta_part: int


class TokensCut(NamedTuple):
    """Of the loop over tokens."""

    parts: int
    span: int
    k_part: int
    m_part: int


@triton.jit
def write_chunk_kernel(
    source, u, F, G, Q, erase, sizes, chunks, scale,
    GATE: tl.constexpr, ERASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F, G, Q ``[B, chunks, N]`` of one chunk and block of slots."""
    T, N, K, V, B1, inner = sizes
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    t = (pid % chunks) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = pid.to(tl.int64) * N + n
    b = pid // chunks
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    u_rows, u0 = slot_block(u, b, B1, n, ok, V, BLOCK_V)
    t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
    a, keep, f = gates(
        k0, k_rows, ok, bias, source.q, source.norm, b, n, t, t_ok, sizes, scale, erase,
        GATE, ERASE, BLOCK_K, K_STEPS, PRECISION,
    )  # fmt: skip
    w_rows, w0 = token_block(source.w, b, B1, t, inner, t_ok, V, BLOCK_V)
    c = dots(u0, u_rows, ok, w0, w_rows, t_ok, V, BLOCK_V, V_STEPS, PRECISION)
    behind, total = suffix_products(f)
    tl.store(F + at, total, mask=n < N)
    tl.store(G + at, tl.sum(a * behind * c, 1), mask=n < N)
    if Q is not None:
        tl.store(Q + at, tl.reduce(keep, 1, multiply), mask=n < N)


@triton.jit
def write_carry_kernel(
    v, u, F, G, Q, P, d_v, N, V, B1, chunks, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr
):
    """In place: G becomes p before each chunk, F becomes R behind it, Q the same of 1 - a; P: that before it."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = pid // blocks
    ok = n < N
    v_rows, u_rows = slots(v, b, B1, n), slots(u, b, B1, n)
    p = tl.zeros([BLOCK_N], tl.float32)
    for step in range(V_STEPS):
        old = tile(v_rows, ok, V, step * BLOCK_V, BLOCK_V).to(tl.float32)
        p += tl.sum(old * tile(u_rows, ok, V, step * BLOCK_V, BLOCK_V).to(tl.float32), 1)
    before = tl.full([BLOCK_N], 1.0, tl.float32)
    at = b.to(tl.int64) * chunks * N + n
    for _ in range(chunks):
        f = tl.load(F + at, mask=ok, other=1.0)
        g = tl.load(G + at, mask=ok, other=0.0)
        tl.store(G + at, p, mask=ok)
        p = f * p + g
        if P is not None:
            tl.store(P + at, before, mask=ok)
            if Q is not None:
                before = before * tl.load(Q + at, mask=ok, other=1.0)
            else:
                before = before * f
        at += N
    after = tl.full([BLOCK_N], 1.0, tl.float32)
    behind = tl.full([BLOCK_N], 1.0, tl.float32)
    for _ in range(chunks):
        at -= N
        f = tl.load(F + at, mask=ok, other=1.0)
        tl.store(F + at, after, mask=ok)
        after = after * f
        if Q is not None:
            f = tl.load(Q + at, mask=ok, other=1.0)
            tl.store(Q + at, behind, mask=ok)
            behind = behind * f
    if d_v is not None:
        for step in range(V_STEPS):
            x = tile(u_rows, ok, V, step * BLOCK_V, BLOCK_V).to(tl.float32) * after[:, None]
            put(slots(d_v, b, B1, n), ok, V, step * BLOCK_V, x, BLOCK_V)


@triton.jit
def tile_gradient(a, keep, f, c, at, n_ok, carried, g, erase, ERASE: tl.constexpr):
    """a R and da of one tile [slots, tokens]; what is ``carried`` at ``at`` is that of its chunk."""
    behind, _ = suffix_products(f)
    share = behind * tl.load(carried.R + at, mask=n_ok, other=0.0)[:, None]
    da = c
    if ERASE != "none":
        before = states_before(f, a * c, tl.load(carried.p + at, mask=n_ok, other=0.0))
        da = c - erase * before
    da = da * share
    if g is not None:
        if carried.Q is not None:
            past, _ = suffix_products(keep)
            past = past * tl.load(carried.Q + at, mask=n_ok, other=0.0)[:, None]
        else:
            past = share
        da -= past * prefix_products(keep) * (tl.load(carried.P + at, mask=n_ok, other=0.0) * g)[:, None]
    return a * share, da


@triton.jit
def source_gradient(a, keep, da, delta, b, B1, t, t_ok, inner, live, GATE: tl.constexpr):
    """From da to ds."""
    if GATE == "sigmoid":
        da = da * a * keep
    else:
        da = a * (da - tl.load(tokens(delta, b, B1, t, inner), mask=t_ok, other=0.0)[None, :])
    return tl.where(live, da, 0.0)


@triton.jit
def write_token_kernel(
    source, u, carried, d_retained, delta, d_a, d_q, d_w, d_delta, erase, sizes, chunks, cut, scale,
    GATE: tl.constexpr, ERASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da of given gates, dq, dw and delta of one chunk and block of columns, over the slots ``part * span ..``."""
    T, N, K, V, B1, inner = sizes
    parts, span, q_part, w_part, delta_part = cut
    pid = tl.program_id(0)
    chunk = pid % chunks
    t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // chunks
    MOST: tl.constexpr = K_STEPS if K_STEPS > V_STEPS else V_STEPS
    step = pid % MOST
    pid = pid // MOST
    part = pid % parts
    b = pid // parts
    t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
    w_rows, w0 = token_block(source.w, b, B1, t, inner, t_ok, V, BLOCK_V)
    dq = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    dw = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for n0 in range(part * span, tl.minimum(N, (part + 1) * span), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        at = (b.to(tl.int64) * chunks + chunk) * N + n
        ok, bias = open_slots(source.mask, b, B1, n, N)
        k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
        u_rows, u0 = slot_block(u, b, B1, n, ok, V, BLOCK_V)
        a, keep, f = gates(
            k0, k_rows, ok, bias, source.q, source.norm, b, n, t, t_ok, sizes, scale, erase,
            GATE, ERASE, BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        c = dots(u0, u_rows, ok, w0, w_rows, t_ok, V, BLOCK_V, V_STEPS, PRECISION)
        g = d_retained
        if d_retained is not None:
            g = tl.load(slots(d_retained, b, B1, n), mask=ok, other=0.0)
        weights, da = tile_gradient(a, keep, f, c, at, ok, carried, g, erase, ERASE)
        live = ok[:, None] & t_ok[None, :]
        if d_delta is not None:
            total += tl.sum(tl.where(live, a * da, 0.0), 0)
        if d_a is not None:
            places = tokens(d_a, b, B1, t, inner)[None, :] + n[:, None]
            result = tl.where(live, da, 0.0).to(d_a[0].dtype.element_ty)
            tl.store(places, result, mask=ok[:, None] & (t < T)[None, :] & (step == 0))
        if d_q is not None:
            ds = source_gradient(a, keep, da, delta, b, B1, t, t_ok, inner, live, GATE)
            right_k = columns(k0, k_rows, ok, K, step * BLOCK_K, BLOCK_K, K_STEPS)
            dq = product(tl.trans(ds.to(right_k.dtype)), right_k, dq, PRECISION)
        if d_w is not None:
            right_u = columns(u0, u_rows, ok, V, step * BLOCK_V, BLOCK_V, V_STEPS)
            dw = product(tl.trans(weights.to(right_u.dtype)), right_u, dw, PRECISION)
    offset = part.to(tl.int64)
    if d_q is not None:
        put(tokens(d_q, b, B1, t, inner) + offset * q_part, t < T, K, step * BLOCK_K, dq * scale, BLOCK_K)
    if d_w is not None:
        put(tokens(d_w, b, B1, t, inner) + offset * w_part, t < T, V, step * BLOCK_V, dw, BLOCK_V)
    if d_delta is not None:
        tl.store(tokens(d_delta, b, B1, t, inner) + offset * delta_part, total, mask=(t < T) & (step == 0))


@triton.jit
def write_slot_kernel(
    source, u, carried, d_retained, delta, d_k, d_m, erase, sizes, chunks, cut, scale,
    GATE: tl.constexpr, ERASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dmask of one block of slots and key columns, over the tokens ``part * span ..`` of one batch."""
    T, N, K, V, B1, inner = sizes
    parts, span, k_part, m_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    step = pid % K_STEPS
    pid = pid // K_STEPS
    part = pid % parts
    b = pid // parts
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    u_rows, u0 = slot_block(u, b, B1, n, ok, V, BLOCK_V)
    g = d_retained
    if d_retained is not None:
        g = tl.load(slots(d_retained, b, B1, n), mask=ok, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for t0 in range(part * span, tl.minimum(T, (part + 1) * span), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        at = (b.to(tl.int64) * chunks + t0 // BLOCK_T) * N + n
        t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
        w_rows, w0 = token_block(source.w, b, B1, t, inner, t_ok, V, BLOCK_V)
        a, keep, f = gates(
            k0, k_rows, ok, bias, source.q, source.norm, b, n, t, t_ok, sizes, scale, erase,
            GATE, ERASE, BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        c = dots(u0, u_rows, ok, w0, w_rows, t_ok, V, BLOCK_V, V_STEPS, PRECISION)
        _, da = tile_gradient(a, keep, f, c, at, ok, carried, g, erase, ERASE)
        live = ok[:, None] & t_ok[None, :]
        ds = source_gradient(a, keep, da, delta, b, B1, t, t_ok, inner, live, GATE)
        total += tl.sum(ds, 1)
        if d_k is not None:
            right = tile(tokens(source.q, b, B1, t, inner), t_ok, K, step * BLOCK_K, BLOCK_K)
            dk = product(ds.to(right.dtype), right, dk, PRECISION)
    offset = part.to(tl.int64)
    if d_k is not None:
        put(slots(d_k, b, B1, n) + offset * k_part, n < N, K, step * BLOCK_K, dk * scale, BLOCK_K)
    if d_m is not None:
        rows = slots(d_m, b, B1, n) + offset * m_part
        tl.store(rows, total.to(d_m[0].dtype.element_ty), mask=(n < N) & (step == 0))


def backward(x: Write, values: Tensor, d_out: Tensor, d_retained: Tensor | None, wants: list[bool]):
    """The six gradients of :func:`write.backward`."""
    call, T, N, K, V = x.call, x.T, x.N, x.K, x.V
    d_values = Gradient(call, values, wants[0], "memory", N, V)
    d_keys = Gradient(call, x.keys, wants[1], "memory", N, K)
    d_query = Gradient(call, x.query, wants[2], "tokens", T, N if x.gate == "given" else K)
    d_write = Gradient(call, x.write, wants[3], "tokens", T, V)
    d_mask = Gradient(call, x.slot_mask, wants[5], "memory", N)
    tensors = (x.query, values, d_out)
    p = plan("write_gradient", max(K, V), *tensors)
    c, wide_k, wide_v = p.config, width(K, *tensors), width(V, *tensors)
    chunks, B1 = triton.cdiv(x.count, c.block_t), call.batches[1]
    slot_blocks = triton.cdiv(N, c.block_n)
    F, G = call.scratch(call.B, chunks, N), call.scratch(call.B, chunks, N)
    own = d_retained is not None and x.erasing != "full"  # prod (1 - a) is not prod f
    Q = call.scratch(call.B, chunks, N) if own else None
    P = call.scratch(call.B, chunks, N) if d_retained is not None else None
    u = call.slots(d_out)
    source, sizes = x.source(), x.sizes
    constants = {
        "GATE": x.gate, "ERASE": x.erasing, "BLOCK_T": c.block_t, "BLOCK_N": c.block_n, "BLOCK_K": wide_k.block,
        "K_STEPS": wide_k.steps, "BLOCK_V": wide_v.block, "V_STEPS": wide_v.steps, "PRECISION": precision(*tensors),
    }  # fmt: skip
    launch(
        write_chunk_kernel, call.B * chunks * slot_blocks, source, u, F, G, Q, x.erase_scale, sizes, chunks, x.scale,
        plan=p, **(constants | {"K_STEPS": wide_k.several, "V_STEPS": wide_v.several}),
    )  # fmt: skip
    carry = plan("write_carry", V, *tensors)
    launch(
        write_carry_kernel, call.B * triton.cdiv(N, carry.config.block_n),
        call.slots(values), u, F, G, Q, P, d_values.rows(), N, V, B1, chunks,
        plan=carry, BLOCK_N=carry.config.block_n, BLOCK_V=wide_v.block, V_STEPS=wide_v.steps,
    )  # fmt: skip
    state = (u, Carried(F, G, Q, P), call.slot_numbers(d_retained))

    by_token = (SlotsCut, write_token_kernel, call.B * chunks * max(wide_k.steps, wide_v.steps), N, c.block_n)
    by_slot = (TokensCut, write_slot_kernel, call.B * slot_blocks * wide_k.steps, x.count, c.block_t)

    def run(which: tuple, before: tuple, *targets: tuple | None) -> None:
        cut, *kernel = which
        launch_in_parts(
            call, *kernel, (source, *state, *before), targets, (x.erase_scale, sizes, chunks), cut, x.scale,
            plan=p, **constants,
        )  # fmt: skip

    of_gates, of_query = (d_query.rows(), None) if x.gate == "given" else (None, d_query.rows())
    delta = None
    if x.gate == "softmax" and (d_query.wanted or d_keys.wanted or d_mask.wanted):
        sums = call.scratch(*call.batches, call.F, T)
        delta = (sums, *sums.stride())
        run(by_token, (None, None), None, d_write.rows(), delta)
        if d_query.wanted:
            run(by_token, (delta, None), of_query, None, None)
    elif d_query.wanted or d_write.wanted:
        run(by_token, (None, of_gates), of_query, d_write.rows(), None)
    if d_keys.wanted or d_mask.wanted:
        run(by_slot, (delta,), d_keys.rows(), d_mask.rows())
    nothing = torch.empty(0, dtype=values.dtype, device=call.device)
    return (
        d_values.result(), d_keys.result(), d_query.result(), d_write.result(), nothing, d_mask.result()
    )  # fmt: skip
