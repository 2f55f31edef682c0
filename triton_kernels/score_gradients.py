"""From the gradient of scores, ds[t, i], to gradients of query, keys, values and mask, without [T, N] in memory.

    dq_t = scale sum_i ds[t, i] k_i,     dk_i = scale sum_t ds[t, i] q_t,     dmask_i = sum_t ds[t, i]

where ds is made on the fly, tile by tile, from what the op kept (KIND):

    "read"      p = exp((s - lse_t) - rest_t),  ds = p (<dr_t, v_i> - delta_t),  and  dv_i = sum_t p[t, i] dr_t
    "usage"     p = exp(s - lse_t),  ds = p du_i,  and  dlse_t = -sum_i ds
    "softmax"   ds = w (dw - delta_t)          from weights w and their gradient dw, [T, N] arguments of the op
    "sigmoid"   ds = w (1 - w) dw
    "given"     ds = dw

Two kernels, because one sum runs over slots and the other over tokens: `query_gradient_kernel` keeps a block of tokens
and streams slots; `slot_gradient_kernel` keeps a block of slots and streams tokens. Each computes ds again; no
atomics, so the order of every sum is fixed. Blocks that no range of a token meets are left out (ranges.py). Where
programs are too few for the device, the streamed axis is split and the float32 parts are added in their order. Rows
wider than a block go to further programs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import bits, launch, launch_in_parts, narrowed, plan, width
from .layout import Call, Gradient, precision
from .ranges import BORDER, inner_bounds, is_due, load_ranges, loop_bounds, place, product_within, slot_bounds, within
from .tiles import (
    LOG2E,
    columns,
    dots,
    open_slots,
    put,
    row_scales,
    scaled,
    scores,
    slot_block,
    slots,
    softmax_weights,
    tile,
    token_block,
    tokens,
)

RANGED = {16: 128, 32: 64}  # the widest block of columns where tokens have ranges, by bits of an element: more spill


@triton.jit
def delta_kernel(a, b_rows, minus, out, T, D, B1, inner, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """out_t = <a_t, b_t> - minus_t, float32."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // blocks
    ok = t < T
    total = tl.zeros([BLOCK_T], tl.float32)
    a_t, b_t = tokens(a, b, B1, t, inner), tokens(b_rows, b, B1, t, inner)
    for column in range(0, D, BLOCK_D):  # of no known length: unrolled, it spills
        x = tile(a_t, ok, D, column, BLOCK_D).to(tl.float32)
        total += tl.sum(x * tile(b_t, ok, D, column, BLOCK_D).to(tl.float32), 1)
    if minus is not None:
        total -= tl.load(tokens(minus, b, B1, t, inner), mask=ok, other=0.0)
    tl.store(tokens(out, b, B1, t, inner), total, mask=ok)


@triton.jit
def from_scores(s, lse, rest, gradient, delta, live, KIND: tl.constexpr):
    """p and ds of one tile, from scores. lse, rest, delta, gradient broadcast against s."""
    if KIND == "read":
        p = tl.where(live, softmax_weights(s, lse, rest), 0.0)
        return p, tl.where(live, p * (gradient - delta), 0.0)
    else:
        p = tl.where(live, tl.exp2((s - lse) * LOG2E), 0.0)
        return p, tl.where(live, p * gradient, 0.0)


@triton.jit
def from_weights(w, dw, delta, live, KIND: tl.constexpr):
    """ds of one tile, from weights and their gradient."""
    if KIND == "softmax":
        ds = w * (dw - delta)
    elif KIND == "sigmoid":
        ds = w * (1.0 - w) * dw
    else:
        ds = dw
    return tl.where(live, ds, 0.0)


@triton.jit
def shifted_lse(lse, b, B1, t, inner, T):
    """lse; +inf, which no weight survives, past the end and where no slot was addressable."""
    x = tl.load(tokens(lse, b, B1, t, inner), mask=t < T, other=float("inf"))
    return tl.where(x == float("-inf"), float("inf"), x)


class Kept(NamedTuple):
    """What ds is made of beside scores; a KIND has some of it."""

    d_read: tuple | None
    lse: tuple | None
    rest: tuple | None
    delta: tuple | None
    du: tuple | None
    w: tuple | None
    dw: tuple | None


class SlotsCut(NamedTuple):
    """Of the loop over slots: see ``launch_in_parts``."""

    parts: int
    span: int
    q_part: int
    lse_part: int


class TokensCut(NamedTuple):
    """Of the loop over tokens."""

    parts: int
    span: int
    k_part: int
    v_part: int
    m_part: int


@triton.jit
def query_gradient_kernel(
    q, k, v, mask, ranges, k_scale, v_scale, kept, d_q, d_lse, sizes, cut, scale,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of tokens and key columns, over the slots ``part * span ..`` of one batch."""
    T, N, K, V, B1, inner = sizes
    parts, span, q_part, lse_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    column = (pid % K_STEPS) * BLOCK_K
    pid = pid // K_STEPS
    part = pid % parts
    b = pid // parts

    t_ok = t < T
    if KIND == "read" or KIND == "usage":
        q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
        lse_t = shifted_lse(kept.lse, b, B1, t, inner, T)
    if KIND == "read" or KIND == "softmax":
        delta_t = tl.load(tokens(kept.delta, b, B1, t, inner), mask=t_ok, other=0.0)
    else:
        delta_t = tl.zeros([BLOCK_T], tl.float32)
    rest_t = tl.zeros([BLOCK_T], tl.float32)
    if KIND == "read":
        rest_t = tl.load(tokens(kept.rest, b, B1, t, inner), mask=t_ok, other=0.0)
        dr_rows, dr0 = token_block(kept.d_read, b, B1, t, inner, t_ok, V, BLOCK_V)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    begin, end = slot_bounds(ranges, first, stop, part * span, tl.minimum(N, (part + 1) * span), BLOCK_N)
    inner_n, outer_n = inner_bounds(ranges, first, stop, t_ok, begin, end, BLOCK_N)
    for edge in tl.static_range(1 if ranges is None else 2):
        bounds = ranges if edge else None
        lowest, highest = loop_bounds(edge, begin, inner_n, outer_n, end)
        for at in tl.range(lowest, highest, BORDER if edge else BLOCK_N, num_stages=1 if edge else None):
            n0 = place(edge, at, inner_n, outer_n)
            n = n0 + tl.arange(0, BORDER if edge else BLOCK_N)
            ok, bias = open_slots(mask, b, B1, n, N)
            k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
            live = within(bounds, t_ok[:, None] & ok[None, :], first[:, None], stop[:, None], n[None, :])
            if KIND == "read" or KIND == "usage":
                dot = dots(q0, q_rows, t_ok, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION)
                if k_scale is not None:
                    dot *= row_scales(k_scale, b, B1, n, ok)[None, :]
                s = scores(dot, scale, bias[None, :])
                if KIND == "read":
                    v_rows, v0 = slot_block(v, b, B1, n, ok, V, BLOCK_V)
                    dp = dots(dr0, dr_rows, t_ok, v0, v_rows, ok, V, BLOCK_V, V_STEPS, PRECISION)
                    if v_scale is not None:
                        dp *= row_scales(v_scale, b, B1, n, ok)[None, :]
                    gradient = dp
                else:
                    gradient = tl.load(slots(kept.du, b, B1, n), mask=ok, other=0.0)[None, :]
                _, ds = from_scores(s, lse_t[:, None], rest_t[:, None], gradient, delta_t[:, None], live, KIND)
            else:
                dw_tile = tl.load(tokens(kept.dw, b, B1, t, inner)[:, None] + n[None, :], mask=live, other=0.0).to(
                    tl.float32
                )
                w_tile = dw_tile
                if KIND != "given":
                    w_tile = tl.load(tokens(kept.w, b, B1, t, inner)[:, None] + n[None, :], mask=live, other=0.0).to(
                        tl.float32
                    )
                ds = from_weights(w_tile, dw_tile, delta_t[:, None], live, KIND)
            row_sum += tl.sum(ds, 1)
            if d_q is not None:
                right = columns(k0, k_rows, ok, K, column, BLOCK_K, K_STEPS)
                if k_scale is not None:
                    right = scaled(right, row_scales(k_scale, b, B1, n, ok), q[0].dtype.element_ty)
                acc = product_within(bounds, ds, right, live, N - n0, acc, PRECISION)
    offset = part.to(tl.int64)
    if d_q is not None:
        put(tokens(d_q, b, B1, t, inner) + offset * q_part, t_ok, K, column, acc * scale, BLOCK_K)
    if d_lse is not None:
        tl.store(tokens(d_lse, b, B1, t, inner) + offset * lse_part, -row_sum, mask=t_ok & (column == 0))


@triton.jit
def slot_gradient_kernel(
    q, k, v, mask, ranges, k_scale, v_scale, kept, d_k, d_v, d_m, sizes, cut, scale,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, dmask of one block of slots and columns, over the tokens ``part * span ..`` of one batch."""
    T, N, K, V, B1, inner = sizes
    parts, span, k_part, v_part, m_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n0 = (pid % blocks) * BLOCK_N
    n1 = tl.minimum(n0 + BLOCK_N, N)
    n = n0 + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    MOST: tl.constexpr = K_STEPS if K_STEPS > V_STEPS else V_STEPS
    step = pid % MOST
    pid = pid // MOST
    part = pid % parts
    b = pid // parts

    ok, bias = open_slots(mask, b, B1, n, N)
    if KIND == "read" or KIND == "usage":
        k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
    if KIND == "usage":
        d_n = tl.load(slots(kept.du, b, B1, n), mask=ok, other=0.0)
    if KIND == "read":
        v_rows, v0 = slot_block(v, b, B1, n, ok, V, BLOCK_V)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for edge in tl.static_range(1 if ranges is None else 2):
        bounds = ranges if edge else None
        for t0 in range(part * span, tl.minimum(T, (part + 1) * span), BORDER if edge else BLOCK_T):
            if ranges is None or is_due(edge, ranges, b, B1, t0, inner, T, N, n0, n1, BLOCK_T):
                t = t0 + tl.arange(0, BORDER if edge else BLOCK_T)
                t_ok = t < T
                first, stop = load_ranges(bounds, b, B1, t, inner, t_ok, N)
                q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
                live = within(bounds, ok[:, None] & t_ok[None, :], first[None, :], stop[None, :], n[:, None])
                delta_t = tl.zeros(t.shape, tl.float32)
                rest_t = tl.zeros(t.shape, tl.float32)
                if KIND == "read" or KIND == "softmax":
                    delta_t = tl.load(tokens(kept.delta, b, B1, t, inner), mask=t_ok, other=0.0)
                if KIND == "read" or KIND == "usage":
                    lse_t = shifted_lse(kept.lse, b, B1, t, inner, T)
                    dot = dots(k0, k_rows, ok, q0, q_rows, t_ok, K, BLOCK_K, K_STEPS, PRECISION)
                    if k_scale is not None:
                        dot *= row_scales(k_scale, b, B1, n, ok)[:, None]
                    s = scores(dot, scale, bias[:, None])
                    if KIND == "read":
                        dr_rows, dr0 = token_block(kept.d_read, b, B1, t, inner, t_ok, V, BLOCK_V)
                        dp = dots(v0, v_rows, ok, dr0, dr_rows, t_ok, V, BLOCK_V, V_STEPS, PRECISION)
                        if v_scale is not None:
                            dp *= row_scales(v_scale, b, B1, n, ok)[:, None]
                        rest_t = tl.load(tokens(kept.rest, b, B1, t, inner), mask=t_ok, other=0.0)
                        p, ds = from_scores(s, lse_t[None, :], rest_t[None, :], dp, delta_t[None, :], live, KIND)
                        if d_v is not None:
                            right = columns(dr0, dr_rows, t_ok, V, step * BLOCK_V, BLOCK_V, V_STEPS)
                            dv_acc = product_within(bounds, p, right, live, T - t0, dv_acc, PRECISION)
                    else:
                        p, ds = from_scores(
                            s, lse_t[None, :], rest_t[None, :], d_n[:, None], delta_t[None, :], live, KIND
                        )
                else:
                    dw_tile = tl.load(tokens(kept.dw, b, B1, t, inner)[None, :] + n[:, None], mask=live, other=0.0).to(
                        tl.float32
                    )
                    w_tile = dw_tile
                    if KIND != "given":
                        w_tile = tl.load(
                            tokens(kept.w, b, B1, t, inner)[None, :] + n[:, None], mask=live, other=0.0
                        ).to(tl.float32)
                    ds = from_weights(w_tile, dw_tile, delta_t[None, :], live, KIND)
                total += tl.sum(ds, 1)
                if d_k is not None:
                    right_q = columns(q0, q_rows, t_ok, K, step * BLOCK_K, BLOCK_K, K_STEPS)
                    dk_acc = product_within(bounds, ds, right_q, live, T - t0, dk_acc, PRECISION)
    offset = part.to(tl.int64)
    if d_k is not None:
        put(slots(d_k, b, B1, n) + offset * k_part, n < N, K, step * BLOCK_K, dk_acc * scale, BLOCK_K)
    if d_v is not None:
        put(slots(d_v, b, B1, n) + offset * v_part, n < N, V, step * BLOCK_V, dv_acc, BLOCK_V)
    if d_m is not None:
        tl.store(slots(d_m, b, B1, n) + offset * m_part, total.to(d_m[0].dtype.element_ty), mask=(n < N) & (step == 0))


def row_dots(call: Call, a: Tensor, b: Tensor, minus: Tensor | None = None) -> Tensor:
    """``<a_t, b_t> - minus_t`` of token rows ``[..., T, D]``: float32 ``[B0, B1, F, T]``."""
    T, D = a.shape[-2:]
    out = call.scratch(*call.batches, call.F, T)
    p = plan("row_dots", D, a, b)
    wide, count = width(D, a, b), call.F * T
    launch(
        delta_kernel, call.B * triton.cdiv(count, p.config.block_t),
        call.rows(a), call.rows(b), call.numbers(minus), (out, *out.stride()),
        count, D, call.batches[1], T if call.F > 1 else None,
        plan=p, BLOCK_T=p.config.block_t, BLOCK_D=wide.block,
    )  # fmt: skip
    return out


def score_gradients(
    call: Call, kind: str, query: Tensor, keys: Tensor, slot_mask: Tensor | None, scale: float,
    d_query: Gradient | None, d_keys: Gradient | None, d_mask: Gradient | None, *,
    values: Tensor | None = None, d_values: Gradient | None = None, d_read: Tensor | None = None,
    read: Tensor | None = None, lse: Tensor | None = None, lse_rest: Tensor | None = None,
    d_lse: Tensor | Gradient | None = None, d_usage: Tensor | None = None, weights: Tensor | None = None,
    d_weights: Tensor | tuple | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
    slot_range: Tensor | None = None,
):  # fmt: skip
    """Run both kernels for one KIND.

    d_lse: for "read" the gradient of lse, for "usage" where to put it. d_weights: for "given" as kernels take it.
    """
    T, K = query.shape[-2:]
    N = keys.shape[-2]
    V = values.shape[-1] if values is not None else 1
    count, sizes = call.F * T, call.sizes(T, N, K, V)
    wide_k, wide_v = width(K, query, values), width(V, query, values)
    if slot_range is not None:
        most = RANGED[bits(query, values)]
        wide_k, wide_v = narrowed(wide_k, most), narrowed(wide_v, most)
    delta = None
    if kind == "read":
        delta = row_dots(call, d_read, read, d_lse)
    elif kind == "softmax":
        delta = row_dots(call, weights, d_weights)
    sources = (
        call.rows(query), call.slots(keys), call.slots(values), call.slot_numbers(slot_mask),
        call.rows(slot_range), call.slot_numbers(key_scale), call.slot_numbers(value_scale),
        Kept(
            call.rows(d_read), call.numbers(lse), call.numbers(lse_rest),
            None if delta is None else (delta, *delta.stride()), call.slot_numbers(d_usage), call.rows(weights),
            d_weights if isinstance(d_weights, tuple) else call.rows(d_weights),
        ),
    )  # fmt: skip
    constants = {
        "KIND": kind, "BLOCK_K": wide_k.block, "K_STEPS": wide_k.steps, "BLOCK_V": wide_v.block,
        "V_STEPS": wide_v.steps, "PRECISION": precision(query, query if values is None else values),
    }  # fmt: skip
    # The other kinds read [T, N] arguments, and multiply once where these do so three times.
    by_scores = kind in ("read", "usage")

    def name(side: str) -> str:
        """Of the rows of the table. Comparing slots with ranges takes registers."""
        return f"{side}_sums" if not by_scores else f"{side}_gradient" + ("" if slot_range is None else "_ranged")

    d_q = d_query.rows() if d_query is not None else None
    d_lse_rows = None
    if isinstance(d_lse, Gradient) and d_lse.wanted:
        d_lse_rows = (d_lse.view, *d_lse.view.stride())
    if d_q is not None or d_lse_rows is not None:
        packed = key_scale is not None or value_scale is not None
        p = plan(name("query") if not packed else "query_gradient", max(K, V), query, values, compressed=packed)
        c = p.config
        launch_in_parts(
            call, query_gradient_kernel, call.B * triton.cdiv(count, c.block_t) * wide_k.steps, N, c.block_n,
            sources, (d_q, d_lse_rows), (sizes,), SlotsCut, scale,
            plan=p, BLOCK_T=c.block_t, BLOCK_N=c.block_n, **constants,
        )  # fmt: skip
    targets = [g.rows() if g is not None else None for g in (d_keys, d_values, d_mask)]
    if any(target is not None for target in targets):
        p = plan(name("slot"), max(K, V), query, values)
        c = p.config
        programs = call.B * triton.cdiv(N, c.block_n) * max(wide_k.steps, wide_v.steps)
        launch_in_parts(
            call, slot_gradient_kernel, programs, count, c.block_t, sources, targets, (sizes,), TokensCut, scale,
            plan=p, BLOCK_T=c.block_t, BLOCK_N=c.block_n, **constants,
        )  # fmt: skip
