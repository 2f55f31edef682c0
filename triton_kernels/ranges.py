"""Ranges of slots: token t may address slots ``first <= i < stop`` alone. Pieces of kernels.

A kernel that keeps tokens goes through its slots twice: first through the blocks which all its tokens may address
whole, in the loop of a call without ranges; then through the borders on both sides, in blocks of BORDER slots. Slots
before the smallest first and behind the largest stop are in neither. A kernel that keeps slots looks at the ranges of
every block of tokens and takes those of one kind in each of its loops. Where a loop is cut into parts does not depend
on ranges.

At the borders scores of slots that a token may not address are replaced, so nothing of such a slot reaches the token
through them. Products that follow could carry it: 0 times NaN is NaN. So `product_within` adds row by row where a block
holds a number that is not finite. That takes registers, and fewer in smaller blocks: with those of the first loop, or
with one loop for both, reads and their gradients spill on compute capability 9.0.
"""

import triton
import triton.language as tl

from .tiles import product, tokens

BORDER = tl.constexpr(16)  # slots or tokens of a block at a border


@triton.jit
def load_ranges(ranges, b, B1, t, inner, t_ok, N):
    """First slot and stop of tokens ``t``, within 0..N; N and 0 of an empty range, which widen no bound."""
    if ranges is None:  # nothing looks at these
        return t, t
    else:
        rows = tokens(ranges, b, B1, t, inner)
        first = tl.minimum(tl.maximum(tl.load(rows, mask=t_ok, other=0), 0), N).to(tl.int32)
        stop = tl.minimum(tl.maximum(tl.load(rows + 1, mask=t_ok, other=0), 0), N).to(tl.int32)
        return tl.where(first < stop, first, N), tl.where(first < stop, stop, 0)


@triton.jit
def slot_bounds(ranges, first, stop, begin, end, BLOCK: tl.constexpr):
    """The part of slots ``begin .. end`` that some token may address, from the beginning of a block on. begin: a
    multiple of BLOCK."""
    if ranges is None:
        return begin, end
    else:
        return tl.maximum(begin, tl.min(first, 0) // BLOCK * BLOCK), tl.minimum(end, tl.max(stop, 0))


@triton.jit
def inner_bounds(ranges, first, stop, t_ok, begin, end, BLOCK: tl.constexpr):
    """The blocks of ``begin .. end``, given by `slot_bounds`, that all tokens may address whole; or ``end, end``."""
    if ranges is None:
        return begin, end
    else:
        inner = tl.maximum(tl.cdiv(begin, BLOCK), tl.cdiv(tl.max(tl.where(t_ok, first, 0), 0), BLOCK)) * BLOCK
        outer = tl.minimum(end, tl.min(tl.where(t_ok, stop, end), 0)) // BLOCK * BLOCK
        return tl.where(inner < outer, inner, end), tl.where(inner < outer, outer, end)


@triton.jit
def loop_bounds(EDGE: tl.constexpr, begin, inner, outer, end):
    """Bounds of the loop over the blocks in between, or over both borders (EDGE), of which `place` gives the slots."""
    if EDGE:
        return begin, inner + end - outer
    else:
        return inner, outer


@triton.jit
def place(EDGE: tl.constexpr, at, inner, outer):
    """The first slot of step ``at`` of such a loop."""
    if EDGE:
        return tl.where(at < inner, at, at + (outer - inner))
    else:
        return at


@triton.jit
def within(ranges, live, first, stop, n):
    """``live`` of a tile where slot ``n`` is in the range of its token; first, stop and n broadcast to it."""
    if ranges is None:
        return live
    else:
        return live & (n >= first) & (n < stop)


@triton.jit
def only(ranges, live, x):
    """``x`` where ``live``, which broadcasts to it, else 0."""
    if ranges is None:
        return x
    else:
        return tl.where(live, x, 0.0)


@triton.jit
def meets(first, stop, begin, end):
    """Whether some token may address one of slots ``begin .. end``."""
    return tl.max(((first < end) & (stop > begin)).to(tl.int32), 0) > 0


@triton.jit
def is_due(EDGE: tl.constexpr, ranges, b, B1, t0, inner, T, N, begin, end, BLOCK: tl.constexpr):
    """Whether tokens from ``t0`` on belong to this loop over tokens for slots ``begin .. end``: BLOCK tokens that may
    all address all of these; with EDGE, BORDER tokens of any other block, of which some may address some."""
    t = t0 // BLOCK * BLOCK + tl.arange(0, BLOCK)
    first, stop = load_ranges(ranges, b, B1, t, inner, t < T, N)
    whole = tl.max(((t < T) & ((first > begin) | (stop < end))).to(tl.int32), 0) == 0
    if EDGE:
        here = (t >= t0) & (t < t0 + BORDER) & (first < end) & (stop > begin)
        return (tl.max(here.to(tl.int32), 0) > 0) & (whole == 0)
    else:
        return whole


@triton.jit
def add_rows(x, y, live, left, acc):
    """acc + x @ y, where row j of y counts in row i of the sum if ``live[i, j]``, however large or NaN it is: one row
    after the other. left: the rows of y that exist, and more."""
    j = tl.arange(0, y.shape[0])
    for row in range(tl.minimum(left, y.shape[0])):  # of no known length: unrolled, it spills
        x_j = tl.sum(tl.where((j == row)[None, :], x, 0.0), 1).to(y.dtype).to(tl.float32)
        y_j = tl.sum(tl.where((j == row)[:, None], y, 0.0).to(tl.float32), 0)
        live_j = tl.max((live & (j == row)[None, :]).to(tl.int32), 1) > 0
        x_j, y_j = tl.broadcast_to(x_j[:, None], acc.shape), tl.broadcast_to(y_j[None, :], acc.shape)
        acc = tl.where(live_j[:, None], tl.fma(x_j, y_j, acc), acc)
    return acc


@triton.jit
def product_within(ranges, x, y, live, left, acc, PRECISION: tl.constexpr):
    """The same, at once where y is finite, as x[i, j] is 0 where not live."""
    if ranges is None:
        return product(x.to(y.dtype), y, acc, PRECISION)
    else:
        finite = (tl.abs(y.to(tl.float32)) < float("inf")).to(tl.int32)
        if tl.min(tl.min(finite, 1), 0) > 0:
            acc = product(x.to(y.dtype), y, acc, PRECISION)
        else:
            acc = add_rows(x, y, live, left, acc)
        return acc
