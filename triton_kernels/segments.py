"""Sums over chosen slots, and dot products with them: the backward of every op that gathers rows.

Entry (t, j) names slot indices[t, j] with a number g[t, j]. `sum_segments` gives, for every slot,

    out_i = scale * sum over the entries of slot i, in token order, of g[t, j] x_t

A stable sort by slot puts the entries of a slot side by side, in token order. Chunks of sorted entries run in parallel:
each sums the stretches of one slot in it, by a scan that starts afresh with each slot. A stretch that lies within one
chunk is stored; what crosses a border is left in float32, and a second kernel adds the pieces in their order. So no
atomics, the same bits every time, and a slot that all tokens name costs no more than others. Only rows that are named
are written: the rest is zero fill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, launch, plan, width
from .layout import Call, Gradient
from .tiles import add, batch, decoded, tile, tokens

CHUNK = 32  # sorted entries of one program
COLUMNS = 128  # and at most so many of their columns


@triton.jit
def _since(fresh, total, starts, x):
    """Sums along sorted entries that start afresh with each slot."""
    return fresh | starts, tl.where(starts != 0, x, total + x)


@triton.jit
def chunk_entries(order, sorted_slots, chunk, N, B, entries, CHUNK: tl.constexpr):
    """Sorted entries of a chunk: places, slots, those of the entries after and ahead of them and of the last one
    outside, whether they name a slot, which entries they are, and their batch. A sorted slot is b N + i, B N where
    there is none."""
    e = chunk * CHUNK + tl.arange(0, CHUNK)
    none = tl.full([], 1, tl.int64) * B * N
    slot = tl.load(sorted_slots + e, mask=e < entries, other=none)
    after = tl.load(sorted_slots + e + 1, mask=e + 1 < entries, other=none)
    ahead = tl.load(sorted_slots + e - 1, mask=(e > 0) & (e <= entries), other=-1)
    outside = tl.load(sorted_slots + chunk * CHUNK - 1 + tl.arange(0, 1), mask=chunk > 0, other=-1)
    live = slot < none
    entry = tl.load(order + e, mask=live, other=0)
    b = tl.where(live, slot // N, 0).to(tl.int32)
    return e, slot, after, ahead, outside, live, entry, b


@triton.jit
def store_stretches(
    terms, out, border, chunk, e, slot, after, ahead, outside, live, b, d, N, D, B1, scale,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the ``terms [CHUNK, BLOCK_D]`` of each slot in a chunk: store what ends here, leave what crosses a border."""
    starts = tl.broadcast_to((slot != ahead).to(tl.int32)[:, None], [CHUNK, BLOCK_D])
    _, total = tl.associative_scan((starts, terms), 0, _since)
    crossed = slot == outside  # the stretch came in over the border in front
    ends = live & (after != slot)
    target = batch(out, b, B1) + tl.where(live, slot % N, 0) * out[3]
    columns = (d < D)[None, :]
    result = (total * scale).to(out[0].dtype.element_ty)
    tl.store(target[:, None] + d[None, :], result, mask=(ends & (crossed == 0))[:, None] & columns)
    # At most one stretch comes in and ends here, and at most one goes on behind the chunk. The second half of a border
    # holds what began in the chunk and goes on, the first what came in.
    goes_on = live & (after == slot) & (e == chunk * CHUNK + CHUNK - 1)
    half = tl.where(crossed, 0, 1)
    piece = border + (chunk * 2 + half) * D
    tl.store(piece[:, None] + d[None, :], total, mask=((ends & crossed) | goes_on)[:, None] & columns)


@triton.jit
def segment_kernel(
    order, sorted_slots, numbers, x, out, border, T, N, k, D, B, B1, inner, entries, scale,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of sorted entries and block of columns."""
    pid = tl.program_id(0)
    chunk = (pid % tl.cdiv(entries, CHUNK)).to(tl.int64)
    d = (pid // tl.cdiv(entries, CHUNK)) * BLOCK_D + tl.arange(0, BLOCK_D)
    e, slot, after, ahead, outside, live, entry, b = chunk_entries(order, sorted_slots, chunk, N, B, entries, CHUNK)
    if numbers is not None:
        g = tl.load(numbers + entry, mask=live, other=0.0).to(tl.float32)
    if x is None:
        terms = tl.broadcast_to(g[:, None], [CHUNK, BLOCK_D])
    else:
        rows = tokens(x, b, B1, ((entry // k) % T).to(tl.int32), inner)
        terms = tl.load(rows[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if numbers is not None:
            terms = terms * g[:, None]
    store_stretches(
        terms, out, border, chunk, e, slot, after, ahead, outside, live, b, d, N, D, B1, scale, CHUNK, BLOCK_D
    )  # fmt: skip


@triton.jit
def border_kernel(sorted_slots, out, border, N, D, B, B1, entries, scale, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """For the chunk in which a stretch begins that crosses its end: add the pieces, in order."""
    pid = tl.program_id(0)
    chunks = tl.cdiv(entries, CHUNK)
    chunk = (pid % chunks).to(tl.int64)
    d = (pid // chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    none = tl.full([], 1, tl.int64) * B * N
    last = (chunk + 1) * CHUNK - 1
    slot = tl.load(sorted_slots + last, mask=last < entries, other=none)
    after = tl.load(sorted_slots + last + 1, mask=last + 1 < entries, other=none)
    before = tl.load(sorted_slots + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    begins = (slot < none) & (slot == after) & (before != slot)
    acc = tl.load(border + (chunk * 2 + 1) * D + d, mask=begins & (d < D), other=0.0)
    lost = tl.zeros([BLOCK_D], tl.float32)
    c = chunk + 1
    more = begins
    while more:
        acc, lost = add(acc, lost, tl.load(border + c * 2 * D + d, mask=d < D, other=0.0))
        last = (c + 1) * CHUNK - 1
        end = tl.load(sorted_slots + last, mask=last < entries, other=none)
        after = tl.load(sorted_slots + last + 1, mask=last + 1 < entries, other=none)
        more = (end == slot) & (after == slot)
        c += 1
    b = tl.where(begins, slot // N, 0).to(tl.int32)
    row = batch(out, b, B1) + tl.where(begins, slot % N, 0) * out[3]
    tl.store(row + d, (acc * scale).to(out[0].dtype.element_ty), mask=begins & (d < D))


@triton.jit
def gathered_dots(
    x, rows, scales, b, B1, t, inner, t_ok, slot, ok, D, BLOCK_D: tl.constexpr, D_STEPS: tl.constexpr
):  # fmt: skip
    """<x_t, rows[slot[t, j]]> of tokens ``t`` [BLOCK_T] and their slots [BLOCK_T, BLOCK_J], in float32; 0 where not
    ``ok``. scales: None, or what multiplies compressed rows."""
    SHAPE: tl.constexpr = slot.shape
    total = tl.zeros(SHAPE, tl.float32)
    row = tl.reshape(batch(rows, b, B1) + tl.where(ok, slot, 0) * rows[3], [SHAPE[0] * SHAPE[1]])
    for step in range(D_STEPS):
        x_t = tile(tokens(x, b, B1, t, inner), t_ok, D, step * BLOCK_D, BLOCK_D).to(tl.float32)
        picked = decoded(tile(row, tl.reshape(ok, [SHAPE[0] * SHAPE[1]]), D, step * BLOCK_D, BLOCK_D), tl.float32)
        total += tl.sum(tl.reshape(picked, [SHAPE[0], SHAPE[1], BLOCK_D]) * x_t[:, None, :], 2)
    if scales is not None:
        total *= tl.load(batch(scales, b, B1) + tl.where(ok, slot, 0) * scales[3], mask=ok, other=0.0)
    return total


@triton.jit
def chosen_dots_kernel(
    x, rows, indices, scales, out, T, N, k, D, B1, inner,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, D_STEPS: tl.constexpr,
):  # fmt: skip
    """out[t, j] = <x_t, rows[indices[t, j]]>, float32; 0 where there is no slot. Blocks of tokens and neighbours."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_J)
    j = (pid % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    pid = pid // blocks
    t = (pid % tl.cdiv(T, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // tl.cdiv(T, BLOCK_T)
    t_ok = t < T
    inside = t_ok[:, None] & (j < k)[None, :]
    slot = tl.load(tokens(indices, b, B1, t, inner)[:, None] + j[None, :], mask=inside, other=-1)
    ok = (slot >= 0) & (slot < N)
    total = gathered_dots(x, rows, scales, b, B1, t, inner, t_ok, slot, ok, D, BLOCK_D, D_STEPS)
    result = tl.where(ok, total, 0.0)
    tl.store(out + ((b.to(tl.int64) * T + t) * k)[:, None] + j[None, :], result, mask=inside)


def chosen_dots(call: Call, x: Tensor, rows: Tensor, indices: Tensor, scales: Tensor | None = None) -> Tensor:
    """``<x_t, rows[indices[t, j]]>``: float32 ``[B, F * T, k]``. scales: what multiplies compressed rows."""
    (T, k), (N, D) = indices.shape[-2:], rows.shape[-2:]
    count = call.F * T
    out = call.scratch(call.B, count, k)
    p, wide = plan("chosen_dots", D, x, rows), width(D, x, rows)
    block_t, block = p.config.block_t, min(p.config.block_n, triton.next_power_of_2(k))
    launch(
        chosen_dots_kernel, call.B * triton.cdiv(count, block_t) * triton.cdiv(k, block),
        call.rows(x), call.slots(rows), call.rows(indices), call.slot_numbers(scales), out,
        count, N, k, D, call.batches[1], T if call.F > 1 else None, plan=p, BLOCK_T=block_t, BLOCK_J=block,
        BLOCK_D=wide.block, D_STEPS=wide.steps,
    )  # fmt: skip
    return out


class Segments:
    """The entries of ``indices [..., T, k]`` sorted by slot; sorted once, summed as often as there are gradients."""

    def __init__(self, call: Call, indices: Tensor, slots: int) -> None:
        self.call, self.N, (self.T, self.k) = call, slots, indices.shape[-2:]
        self.entries = call.B * call.F * self.T * self.k
        named = call.token_view(indices, 1).reshape(call.B, call.F * self.T * self.k)
        first = torch.arange(call.B, device=call.device).unsqueeze(-1) * slots
        known = (named >= 0) & (named < slots)
        self.slots, self.order = torch.sort(torch.where(known, named + first, call.B * slots).flatten(), stable=True)

    def sum(self, gradient: Gradient, numbers: Tensor | None, x: Tensor | None, scale: float) -> None:
        """Fill ``gradient`` (of a memory argument) from ``numbers [B, F * T, k]`` and token rows ``x [..., T, D]``.

        numbers: None stands for 1. x: None does, where the argument has one number per slot; not both.
        """
        D = 1 if x is None else x.shape[-1]
        p = plan("segments", D, x, numbers)
        given = numbers if numbers is None else numbers.contiguous(), self.call.rows(x)
        self.add(gradient, segment_kernel, p, D, min(COLUMNS, triton.next_power_of_2(D)), given, scale)

    def add(
        self, gradient: Gradient, kernel, p: Plan, D: int, block: int, given: tuple, scale: float, *more: int,
        **constants: int,
    ) -> None:  # fmt: skip
        """Fill ``gradient`` with what ``kernel``, which takes ``given`` and ``more``, makes of chunks of entries."""
        gradient.fill(0.0)
        if not gradient.wanted or not self.entries or not self.N:
            return
        call, chunks = self.call, triton.cdiv(self.entries, CHUNK)
        border = call.scratch(chunks, 2, D)
        out, count = gradient.rows(), call.F * self.T
        common = {"plan": p, "CHUNK": CHUNK, "BLOCK_D": block}
        launch(
            kernel, chunks * triton.cdiv(D, block), self.order, self.slots, *given, out, border,
            count, self.N, self.k, D, call.B, call.batches[1], self.T if call.F > 1 else None, self.entries, scale,
            *more, **common, **constants,
        )  # fmt: skip
        launch(
            border_kernel, chunks * triton.cdiv(D, block), self.slots, out, border,
            self.N, D, call.B, call.batches[1], self.entries, scale, **common,
        )  # fmt: skip
