"""softmax_read on a GPU.

    s[t, i] = scale <q_t, k_i> + mask_i,     p = softmax_i(s)
    r_t = sum_i p[t, i] v_i,     lse_t = log sum_i exp(s[t, i]),     rest_t: what the rounding of lse_t left out

Forward: a program keeps a block of tokens and streams blocks of slots, with a running maximum m, sum l and accumulator
(Dao 2023); [T, N] never leaves the chip. Where few tokens would leave SMs idle, N is split: each part writes its
own read, lse and rest, and merge_reads joins the parts in their order. Values wider than one block go to further
programs, which compute the scores again. With T tokens against N slots it reads the memory ceil(T / BLOCK_T) times; T
up to a block is bound by bandwidth, more by the matrix unit.

Backward: ds = p (<dr_t, v_i> - delta_t) with delta_t = <dr_t, r_t> - dlse_t; see score_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import COMPRESSED, FEW, SCALE, Example, Inputs, operator
from .launch import Plan, launch, plan, summed, width
from .layout import Call, Gradient, precision
from .merge_reads import merge_parts
from .ranges import BORDER, inner_bounds, load_ranges, loop_bounds, place, product_within, slot_bounds, within
from .score_gradients import score_gradients
from .tiles import (
    dots,
    log_total,
    open_slots,
    put,
    row_scales,
    scaled,
    scores,
    slot_block,
    slots,
    tile,
    token_block,
    tokens,
    weigh,
)


@triton.jit
def finish_read(read_rows, lse_rows, rest_rows, t_ok, V, column, m, total, acc, BLOCK_V: tl.constexpr):
    """Store what a block of tokens has read: columns of the read, and with the first of them lse and lse_rest."""
    nothing = total == 0  # no addressable slot; NaN is something
    r = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total)[:, None])
    put(read_rows, t_ok, V, column, r, BLOCK_V)
    if column == 0:
        lse, rest = log_total(m, total)
        tl.store(lse_rows, lse, mask=t_ok)
        tl.store(rest_rows, rest, mask=t_ok)


class Cut(NamedTuple):
    """Of the loop over slots: the count and the length of parts, and the steps between those of results."""

    parts: int
    span: int
    read_part: int
    lse_part: int


@triton.jit
def softmax_read_kernel(
    q, k, v, mask, ranges, k_scale, v_scale, read, lse, rest, sizes, cut, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
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
    q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
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
            dot = dots(q0, q_rows, t_ok, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION)
            if k_scale is not None:
                dot *= row_scales(k_scale, b, B1, n, ok)[None, :]
            live = within(bounds, ok[None, :], first[:, None], stop[:, None], n[None, :])
            s = tl.where(live, scores(dot, scale, bias[None, :]), float("-inf"))
            p, shrink, m, total = weigh(s, m, total)
            v0 = tile(slots(v, b, B1, n), ok, V, column, BLOCK_V)
            if v_scale is not None:
                v0 = scaled(v0, row_scales(v_scale, b, B1, n, ok), q0.dtype)
            acc = product_within(bounds, p, v0, live, N - n0, acc * shrink[:, None], PRECISION)
    read_rows = tokens(read, b, B1, t, inner) + part.to(tl.int64) * read_part
    lse_rows = tokens(lse, b, B1, t, inner) + part.to(tl.int64) * lse_part
    rest_rows = tokens(rest, b, B1, t, inner) + part.to(tl.int64) * lse_part
    finish_read(read_rows, lse_rows, rest_rows, t_ok, V, column, m, total, acc, BLOCK_V)


def _call(
    op: str, query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    *more: tuple, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    T, K = query.shape[-2:]
    N, V = values.shape[-2:]
    memory = [("keys", keys, (N, K)), ("values", values, (N, V)), ("slot_mask", slot_mask, (N,))]
    memory += [("key_scale", key_scale, (N,)), ("value_scale", value_scale, (N,))]
    call = Call(op, [("query", query, (T, K)), ("slot_range", slot_range, (T, 2)), *more], memory)
    call.floats(query)
    call.compressed("keys", keys, key_scale)
    call.compressed("values", values, value_scale)
    call.mask(slot_mask)
    call.ranges(slot_range)
    return call


@operator
def softmax_read(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float
):
    """read ``[..., T, V]``, lse and lse_rest ``[..., T]``."""
    call = _call("softmax_read", query, keys, values, slot_mask, slot_range)
    return _read(call, query, keys, values, slot_mask, slot_range, scale)


@operator
def softmax_read_compressed(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, scale: float,
):  # fmt: skip
    """The same over slots of which keys, values or both have 8 bits and a scale."""
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    call = _call("softmax_read_compressed", query, keys, values, slot_mask, slot_range, **scales)
    return _read(call, query, keys, values, slot_mask, slot_range, scale, **scales)


def softmax_lse(
    call: Call, query: Tensor, keys: Tensor, slot_mask: Tensor | None, scale: float, slot_range: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """lse and lse_rest alone: a read of keys' first column, which costs what the scores cost."""
    return _read(call, query, keys, keys[..., :1], slot_mask, slot_range, scale)[1:]


def _read(
    call: Call, query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    scale: float, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    K, V = query.shape[-1], values.shape[-1]
    wide = summed(K, query, values)
    sources = call.rows(query), call.slots(keys), call.slots(values), call.slot_numbers(slot_mask)
    sources = *sources, call.rows(slot_range), call.slot_numbers(key_scale), call.slot_numbers(value_scale)
    packed = key_scale is not None or value_scale is not None
    p = plan("softmax_read", max(K, V), query, values, compressed=packed)
    return read_blocks(
        call, softmax_read_kernel, p, sources, query, values,
        query.dtype, scale, BLOCK_K=wide.block, K_STEPS=wide.several,
    )  # fmt: skip


def read_blocks(
    call: Call, kernel, p: Plan, sources: tuple, query: Tensor, values: Tensor, dtype: torch.dtype, *more, **constants
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a kernel that keeps tokens, streams slots and ends with :func:`finish_read`: a read in ``dtype``, lse, rest.

    It takes ``sources``, places for these, sizes, a :class:`Cut` of N, and ``more``.
    """
    T, K = query.shape[-2:]
    N, V = values.shape[-2:]
    read, read_view = call.token_result(T, V, dtype=dtype)
    (lse, lse_view), (rest, rest_view) = (call.token_result(T, dtype=torch.float32) for _ in range(2))
    wide = width(V, query, values)
    c, count = p.config, call.F * T
    programs = call.B * triton.cdiv(count, c.block_t) * max(1, triton.cdiv(V, wide.block))
    parts, span = p.cut(programs, N, c.block_n)
    if parts == 1:
        outs = (read_view, *read_view.stride()[:4]), *((x, *x.stride()) for x in (lse_view, rest_view))
        steps_between = (0, 0)
    else:
        part_reads = call.scratch(parts, *read_view.shape)
        part_lses, part_rests = (call.scratch(parts, *lse_view.shape) for _ in range(2))
        outs = (part_reads, *part_reads.stride()[1:5]), *((x, *x.stride()[1:]) for x in (part_lses, part_rests))
        steps_between = part_reads.stride(0), part_lses.stride(0)
    launch(
        kernel, programs * parts, *sources, *outs,
        call.sizes(T, N, K, V), Cut(parts, span, *steps_between), *more,
        plan=p, BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_V=wide.block, PRECISION=precision(query, values),
        **constants,
    )  # fmt: skip
    if parts > 1:
        merge_parts(call, part_reads, part_lses, part_rests, read_view, lse_view, rest_view, T, V)
    return call.store(read, read_view), call.store(lse, lse_view), call.store(rest, rest_view)


@operator
def softmax_read_compressed_backward(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, read: Tensor, lse: Tensor, lse_rest: Tensor,
    d_read: Tensor | None, d_lse: Tensor | None, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query and a float mask."""
    (T, K), (N, V) = query.shape[-2:], values.shape[-2:]
    d_read = read.new_zeros(V).expand(read.shape) if d_read is None else d_read
    more = [("read", read, (T, V)), ("d_read", d_read, (T, V))]
    more += [("lse", lse, (T,)), ("lse_rest", lse_rest, (T,)), ("d_lse", d_lse, (T,))]
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    call = _call("softmax_read_compressed_backward", query, keys, values, slot_mask, slot_range, *more, **scales)
    call.require(len(wants) == 2, "wants must have 2 entries")
    call.floats(read, d_read)
    call.stats(lse, lse_rest, d_lse)
    d_query = Gradient(call, query, wants[0], "tokens", T, K)
    d_mask = Gradient(call, slot_mask, wants[1], "memory", N)
    score_gradients(
        call, "read", query, keys, slot_mask, scale, d_query, None, d_mask,
        values=values, d_read=d_read, read=read, lse=lse, lse_rest=lse_rest, d_lse=d_lse,
        slot_range=slot_range, **scales,
    )  # fmt: skip
    return d_query.result(), d_mask.result()


@operator
def softmax_read_backward(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, read: Tensor,
    lse: Tensor, lse_rest: Tensor, d_read: Tensor | None, d_lse: Tensor | None, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, values and a float mask."""
    (T, K), (N, V) = query.shape[-2:], values.shape[-2:]
    d_read = read.new_zeros(V).expand(read.shape) if d_read is None else d_read
    more = [("read", read, (T, V)), ("d_read", d_read, (T, V))]
    more += [("lse", lse, (T,)), ("lse_rest", lse_rest, (T,)), ("d_lse", d_lse, (T,))]
    call = _call("softmax_read_backward", query, keys, values, slot_mask, slot_range, *more)
    call.require(len(wants) == 4, "wants must have 4 entries")
    call.floats(read, d_read)
    call.stats(lse, lse_rest, d_lse)
    d_query = Gradient(call, query, wants[0], "tokens", T, K)
    d_keys = Gradient(call, keys, wants[1], "memory", N, K)
    d_values = Gradient(call, values, wants[2], "memory", N, V)
    d_mask = Gradient(call, slot_mask, wants[3], "memory", N)
    score_gradients(
        call, "read", query, keys, slot_mask, scale, d_query, d_keys, d_mask,
        values=values, d_values=d_values, d_read=d_read, read=read, lse=lse, lse_rest=lse_rest, d_lse=d_lse,
        slot_range=slot_range,
    )  # fmt: skip
    return d_query.result(), d_keys.result(), d_values.result(), d_mask.result()


def examples(x: Inputs) -> Iterator[Example]:
    def read(T: int, N: int, mask: Tensor | None = None, ranges: Tensor | None = None, **which) -> Example:
        q, k, v = (x(2, n, x.width) for n in (T, N, N))
        return Example(softmax_read, (q, k, v, mask, ranges, SCALE), **which)

    mask = x(2, x.slots, dtype=torch.float32)
    yield read(x.tokens, x.slots, main=True)
    yield read(x.tokens, x.slots, mask, variant="mask")
    yield read(x.tokens, x.slots, ranges=x.ranges(2, x.tokens), variant="ranges", heavy=True)
    yield read(FEW, x.slots, variant="few tokens")
    yield read(x.tokens, FEW, variant="few slots")
    scales = x(2, x.slots, dtype=torch.float32)
    for kind, dtype in COMPRESSED.items():
        k, v = (x.compressed(2, x.slots, x.width, dtype=dtype) for _ in range(2))
        arguments = (x(2, x.tokens, x.width), k, v, mask, None, scales, scales, SCALE)
        yield Example(softmax_read_compressed, arguments, variant=kind)
