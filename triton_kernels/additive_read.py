"""additive_read on a GPU.

    s[t, i] = sum_a u_a tanh(q_ta + k_ia) + mask_i,     p = softmax_i(s)
    r_t = sum_i p[t, i] v_i,     lse_t = log sum_i exp(s[t, i])

T N K hyperbolic tangents are nearly all of the work: an exponential and a division each. A program keeps a block of
tokens and streams blocks of slots as softmax_read does; a tile of scores is summed over a few columns at a time,
[columns, tokens, slots] with the columns in one thread, so that the sum crosses no threads. Nothing of size T N K or
T N is in memory.

Backward, with h = tanh(q_ta + k_ia), ds = p (<dr_t, v_i> - delta_t) and delta_t = <dr_t, r_t> - dlse_t:

    dh = ds u_a (1 - h^2),     dq_ta = sum_i dh,     dk_ia = sum_t dh,     du_a = sum_ti ds h,     dv = p^T dr

One kernel keeps tokens, one slots. Each makes a tile of ds and goes through the columns again, with the axis that is
summed in one thread; sums of all columns (up to GRADIENT_COLUMNS; further programs take the rest) stay in registers.
delta is taken from a read that was not rounded: unlike keys, u (1 - h^2) has one sign, so that an error of delta does
not average out in dq. Where the op returned 16 bits, the read is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import Example, Inputs, operator
from .launch import launch_in_parts, plan, width
from .layout import Call, Gradient, precision
from .ranges import load_ranges, meets, only, product_within, slot_bounds, within
from .score_gradients import from_scores, row_dots, shifted_lse
from .softmax_read import finish_read, read_blocks
from .tiles import (
    columns,
    dots,
    open_slots,
    put,
    slot_block,
    slots,
    tanh_slope,
    tile,
    token_block,
    tokens,
    weigh,
)

COLUMNS = 8  # of a tile in three dimensions
GRADIENT_COLUMNS = 128  # of one program


@triton.jit
def upright(rows, ok, D, start, BLOCK: tl.constexpr):
    """``tile`` with the columns first, float32: [BLOCK, rows]."""
    d = start + tl.arange(0, BLOCK)
    return tl.load(rows[None, :] + d[:, None], mask=(d < D)[:, None] & ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def vector(u, b, B1, a, K):
    """Entries ``a`` of the score vector; 0 past the end."""
    return tl.load(slots(u, b, B1, a), mask=a < K, other=0.0).to(tl.float32)


@triton.jit
def additive_scores(
    q_rows, t_ok, k_rows, ok, bias, u, b, B1, K, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr
):
    """One tile of scores: [tokens, slots]."""
    s = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for a in range(0, K, BLOCK_A):
        x = upright(q_rows, t_ok, K, a, BLOCK_A)[:, :, None] + upright(k_rows, ok, K, a, BLOCK_A)[:, None, :]
        h, _ = tanh_slope(x)
        s += tl.sum(h * vector(u, b, B1, a + tl.arange(0, BLOCK_A), K)[:, None, None], 0)
    return s + bias[None, :]


@triton.jit
def additive_read_kernel(
    q, k, v, u, mask, ranges, read, lse, rest, sizes, cut,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of tokens, one block of value columns, the slots ``part * span ..`` of one batch."""
    T, N, K, V, B1, inner = sizes
    parts, span, read_part, lse_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    pid = pid // tl.cdiv(V, BLOCK_V)
    part = pid % parts
    b = pid // parts

    t_ok = t < T
    q_rows = tokens(q, b, B1, t, inner)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    begin, end = slot_bounds(ranges, first, stop, part * span, tl.minimum(N, (part + 1) * span), BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        ok, bias = open_slots(mask, b, B1, n, N)
        s = additive_scores(q_rows, t_ok, slots(k, b, B1, n), ok, bias, u, b, B1, K, BLOCK_T, BLOCK_N, BLOCK_A)
        live = within(ranges, ok[None, :], first[:, None], stop[:, None], n[None, :])
        p, shrink, m, total = weigh(tl.where(live, s, float("-inf")), m, total)
        v0 = tile(slots(v, b, B1, n), ok, V, column, BLOCK_V)
        acc = product_within(ranges, p, v0, live, N - n0, acc * shrink[:, None], PRECISION)
    read_rows = tokens(read, b, B1, t, inner) + part.to(tl.int64) * read_part
    lse_rows = tokens(lse, b, B1, t, inner) + part.to(tl.int64) * lse_part
    rest_rows = tokens(rest, b, B1, t, inner) + part.to(tl.int64) * lse_part
    finish_read(read_rows, lse_rows, rest_rows, t_ok, V, column, m, total, acc, BLOCK_V)


class Kept(NamedTuple):
    """What the gradient of scores is made of beside them."""

    d_read: tuple
    lse: tuple
    rest: tuple
    delta: tuple


class SlotsCut(NamedTuple):
    """Of the loop over slots: see ``launch_in_parts``."""

    parts: int
    span: int
    q_part: int


class TokensCut(NamedTuple):
    """Of the loop over tokens."""

    parts: int
    span: int
    k_part: int
    v_part: int
    m_part: int


@triton.jit
def additive_query_kernel(
    q, k, v, u, mask, ranges, kept, d_q, sizes, cut,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_V: tl.constexpr,
    V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of tokens and CHUNKS BLOCK_A columns, over the slots ``part * span ..`` of one batch."""
    T, N, K, V, B1, inner = sizes
    parts, span, q_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    column = (pid % tl.cdiv(K, CHUNKS * BLOCK_A)) * CHUNKS * BLOCK_A
    pid = pid // tl.cdiv(K, CHUNKS * BLOCK_A)
    part = pid % parts
    b = pid // parts

    t_ok = t < T
    q_rows = tokens(q, b, B1, t, inner)
    dr_rows, dr0 = token_block(kept.d_read, b, B1, t, inner, t_ok, V, BLOCK_V)
    lse_t = shifted_lse(kept.lse, b, B1, t, inner, T)
    rest_t = tl.load(tokens(kept.rest, b, B1, t, inner), mask=t_ok, other=0.0)
    delta_t = tl.load(tokens(kept.delta, b, B1, t, inner), mask=t_ok, other=0.0)
    own = tl.arange(0, CHUNKS)
    acc = tl.zeros([CHUNKS, BLOCK_A, BLOCK_T], tl.float32)
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    begin, end = slot_bounds(ranges, first, stop, part * span, tl.minimum(N, (part + 1) * span), BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        ok, bias = open_slots(mask, b, B1, n, N)
        k_rows = slots(k, b, B1, n)
        v_rows, v0 = slot_block(v, b, B1, n, ok, V, BLOCK_V)
        s = additive_scores(q_rows, t_ok, k_rows, ok, bias, u, b, B1, K, BLOCK_T, BLOCK_N, BLOCK_A)
        dp = dots(dr0, dr_rows, t_ok, v0, v_rows, ok, V, BLOCK_V, V_STEPS, PRECISION)
        live = within(ranges, t_ok[:, None] & ok[None, :], first[:, None], stop[:, None], n[None, :])
        p, ds = from_scores(s, lse_t[:, None], rest_t[:, None], dp, delta_t[:, None], live, "read")
        ds, live = tl.trans(ds)[:, None, :], tl.trans(live)[:, None, :]
        for c in range(CHUNKS):
            a = column + c * BLOCK_A
            k_a = tile(k_rows, ok, K, a, BLOCK_A).to(tl.float32)
            _, slope = tanh_slope(k_a[:, :, None] + upright(q_rows, t_ok, K, a, BLOCK_A)[None, :, :])
            g = tl.sum(only(ranges, live, ds * slope), 0) * vector(u, b, B1, a + tl.arange(0, BLOCK_A), K)[:, None]
            acc += tl.where((own == c)[:, None, None], g[None, :, :], 0.0)
    a = column + own[:, None] * BLOCK_A + tl.arange(0, BLOCK_A)[None, :]
    rows = tokens(d_q, b, B1, t, inner) + part.to(tl.int64) * q_part
    inside = (a < K)[:, :, None] & t_ok[None, None, :]
    tl.store(rows[None, None, :] + a[:, :, None], acc.to(d_q[0].dtype.element_ty), mask=inside)


@triton.jit
def additive_slot_kernel(
    q, k, v, u, mask, ranges, kept, d_u, d_k, d_v, d_m, sizes, cut,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_V: tl.constexpr,
    V_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, dmask of one block of slots and columns, over the tokens ``part * span ..`` of one batch.

    d_u [B, parts, blocks of slots, K]: what each program adds to the gradient of the score vector.
    """
    T, N, K, V, B1, inner = sizes
    parts, span, k_part, v_part, m_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    block = pid % blocks
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    steps = tl.maximum(tl.cdiv(K, CHUNKS * BLOCK_A), V_STEPS)
    step = pid % steps
    pid = pid // steps
    part = pid % parts
    b = pid // parts
    column = step * CHUNKS * BLOCK_A

    ok, bias = open_slots(mask, b, B1, n, N)
    k_rows = slots(k, b, B1, n)
    v_rows, v0 = slot_block(v, b, B1, n, ok, V, BLOCK_V)
    own = tl.arange(0, CHUNKS)
    dk_acc = tl.zeros([CHUNKS, BLOCK_A, BLOCK_N], tl.float32)
    du_acc = tl.zeros([CHUNKS, BLOCK_A, BLOCK_N], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for t0 in range(part * span, tl.minimum(T, (part + 1) * span), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = t < T
        first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
        if ranges is None or meets(first, stop, n0, n0 + BLOCK_N):
            q_rows = tokens(q, b, B1, t, inner)
            dr_rows, dr0 = token_block(kept.d_read, b, B1, t, inner, t_ok, V, BLOCK_V)
            lse_t = shifted_lse(kept.lse, b, B1, t, inner, T)
            rest_t = tl.load(tokens(kept.rest, b, B1, t, inner), mask=t_ok, other=0.0)
            delta_t = tl.load(tokens(kept.delta, b, B1, t, inner), mask=t_ok, other=0.0)
            s = additive_scores(q_rows, t_ok, k_rows, ok, bias, u, b, B1, K, BLOCK_T, BLOCK_N, BLOCK_A)
            dp = dots(dr0, dr_rows, t_ok, v0, v_rows, ok, V, BLOCK_V, V_STEPS, PRECISION)
            live = within(ranges, t_ok[:, None] & ok[None, :], first[:, None], stop[:, None], n[None, :])
            p, ds = from_scores(s, lse_t[:, None], rest_t[:, None], dp, delta_t[:, None], live, "read")
            total += tl.sum(ds, 0)
            if d_v is not None:
                right = columns(dr0, dr_rows, t_ok, V, step * BLOCK_V, BLOCK_V, V_STEPS)
                dv_acc = product_within(ranges, tl.trans(p), right, tl.trans(live), T - t0, dv_acc, PRECISION)
            if d_k is not None or d_u is not None:
                ds, live = ds[:, None, :], live[:, None, :]
                for c in range(CHUNKS):
                    a = column + c * BLOCK_A
                    q_a = tile(q_rows, t_ok, K, a, BLOCK_A).to(tl.float32)
                    h, slope = tanh_slope(q_a[:, :, None] + upright(k_rows, ok, K, a, BLOCK_A)[None, :, :])
                    here = (own == c)[:, None, None]
                    if d_k is not None:
                        g = (
                            tl.sum(only(ranges, live, ds * slope), 0)
                            * vector(u, b, B1, a + tl.arange(0, BLOCK_A), K)[:, None]
                        )
                        dk_acc += tl.where(here, g[None, :, :], 0.0)
                    if d_u is not None:
                        du_acc += tl.where(here, tl.sum(only(ranges, live, ds * h), 0)[None, :, :], 0.0)
    offset = part.to(tl.int64)
    a = column + own[:, None] * BLOCK_A + tl.arange(0, BLOCK_A)[None, :]
    if d_k is not None:
        rows = slots(d_k, b, B1, n) + offset * k_part
        inside = (a < K)[:, :, None] & (n < N)[None, None, :]
        tl.store(rows[None, None, :] + a[:, :, None], dk_acc.to(d_k[0].dtype.element_ty), mask=inside)
    if d_u is not None:
        row = ((b.to(tl.int64) * parts + part) * blocks + block) * K
        tl.store(d_u + row + a, tl.sum(du_acc, 2), mask=a < K)
    if d_v is not None:
        put(slots(d_v, b, B1, n) + offset * v_part, n < N, V, step * BLOCK_V, dv_acc, BLOCK_V)
    if d_m is not None:
        tl.store(slots(d_m, b, B1, n) + offset * m_part, total.to(d_m[0].dtype.element_ty), mask=(n < N) & (step == 0))


def _call(
    op: str, query: Tensor, keys: Tensor, values: Tensor, score_vector: Tensor, slot_mask: Tensor | None,
    slot_range: Tensor | None, *more: tuple,
) -> Call:  # fmt: skip
    (T, K), (N, V) = query.shape[-2:], values.shape[-2:]
    memory = [("keys", keys, (N, K)), ("values", values, (N, V)), ("score_vector", score_vector, (K,))]
    tokens = [("query", query, (T, K)), ("slot_range", slot_range, (T, 2)), *more]
    call = Call(op, tokens, [*memory, ("slot_mask", slot_mask, (N,))])
    call.floats(query, keys, values, score_vector)
    call.mask(slot_mask)
    call.ranges(slot_range)
    return call


def _row(kernel: str, ranges: Tensor | tuple | None) -> str:
    """The name of the configurations. Comparing slots with ranges takes registers."""
    return kernel if ranges is None else f"{kernel}_ranged"


def _read(call: Call, sources: tuple, query: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    p = plan(_row("additive_read", sources[-1]), max(query.shape[-1], values.shape[-1]), query, values)
    return read_blocks(call, additive_read_kernel, p, sources, query, values, dtype, BLOCK_A=COLUMNS)


def _sources(
    call: Call, query: Tensor, keys: Tensor, values: Tensor, score_vector: Tensor, mask: Tensor | None,
    ranges: Tensor | None,
) -> tuple:  # fmt: skip
    numbers = call.slot_numbers(score_vector), call.slot_numbers(mask), call.rows(ranges)
    return call.rows(query), call.slots(keys), call.slots(values), *numbers


@operator
def additive_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_vector: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
):
    """read ``[..., T, V]``, lse and lse_rest ``[..., T]``."""
    call = _call("additive_read", query, keys, values, score_vector, slot_mask, slot_range)
    sources = _sources(call, query, keys, values, score_vector, slot_mask, slot_range)
    return _read(call, sources, query, values, query.dtype)


@operator
def additive_read_backward(
    query: Tensor, keys: Tensor, values: Tensor, score_vector: Tensor, slot_mask: Tensor | None,
    slot_range: Tensor | None, read: Tensor, lse: Tensor, lse_rest: Tensor, d_read: Tensor | None,
    d_lse: Tensor | None, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, values, score_vector and a float mask."""
    (T, K), (N, V) = query.shape[-2:], values.shape[-2:]
    d_read = read.new_zeros(V).expand(read.shape) if d_read is None else d_read
    more = [("read", read, (T, V)), ("d_read", d_read, (T, V))]
    more += [("lse", lse, (T,)), ("lse_rest", lse_rest, (T,)), ("d_lse", d_lse, (T,))]
    call = _call("additive_read_backward", query, keys, values, score_vector, slot_mask, slot_range, *more)
    call.require(len(wants) == 5, "wants must have 5 entries")
    call.floats(read, d_read)
    call.stats(lse, lse_rest, d_lse)
    d_query = Gradient(call, query, wants[0], "tokens", T, K)
    d_keys = Gradient(call, keys, wants[1], "memory", N, K)
    d_values = Gradient(call, values, wants[2], "memory", N, V)
    d_vector = Gradient(call, score_vector, wants[3], "memory", K)
    d_mask = Gradient(call, slot_mask, wants[4], "memory", N)

    sources = _sources(call, query, keys, values, score_vector, slot_mask, slot_range)
    if read.dtype != torch.float32:
        read = _read(call, sources, query, values, torch.float32)[0]
    delta = row_dots(call, d_read, read, d_lse)
    sources = *sources, Kept(call.rows(d_read), call.numbers(lse), call.numbers(lse_rest), (delta, *delta.stride()))
    count, sizes = call.F * T, call.sizes(T, N, K, V)
    wide = width(V, query, values)
    chunks = min(triton.next_power_of_2(triton.cdiv(K, COLUMNS)), GRADIENT_COLUMNS // COLUMNS)
    steps = triton.cdiv(K, chunks * COLUMNS)
    p = plan(_row("additive_gradient", slot_range), max(K, V), query, values)
    c = p.config
    constants = {
        "plan": p, "BLOCK_T": c.block_t, "BLOCK_N": c.block_n, "BLOCK_A": COLUMNS, "CHUNKS": chunks,
        "BLOCK_V": wide.block, "V_STEPS": wide.steps, "PRECISION": precision(query, values),
    }  # fmt: skip
    if d_query.wanted:
        programs = call.B * triton.cdiv(count, c.block_t) * steps
        launch_in_parts(
            call, additive_query_kernel, programs, N, c.block_n, sources, (d_query.rows(),), (sizes,), SlotsCut,
            **constants,
        )  # fmt: skip
    if any(g.wanted for g in (d_keys, d_values, d_vector, d_mask)):
        blocks = triton.cdiv(N, c.block_n)
        programs = call.B * blocks * max(steps, wide.steps)
        pieces = None
        if d_vector.wanted:
            pieces = call.scratch(call.B, p.cut(programs, count, c.block_t)[0], blocks, K)
        launch_in_parts(
            call, additive_slot_kernel, programs, count, c.block_t, (*sources, pieces),
            [g.rows() for g in (d_keys, d_values, d_mask)], (sizes,), TokensCut, **constants,
        )  # fmt: skip
        if pieces is not None:
            d_vector.view.copy_(pieces.sum((1, 2)).view(d_vector.view.shape))
    return d_query.result(), d_keys.result(), d_values.result(), d_vector.result(), d_mask.result()


def examples(x: Inputs) -> Iterator[Example]:
    q, k, v = (x(2, n, x.width) for n in (x.tokens, x.slots, x.slots))
    yield Example(additive_read, (q, k, v, x(x.width), None, None), main=True)
    yield Example(additive_read, (q, k, v, x(x.width), None, x.ranges(2, x.tokens)), variant="ranges", heavy=True)
