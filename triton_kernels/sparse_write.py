"""sparse_write on a GPU: for the entries (t, j) that name slot i = indices[t, j], in order, with a = weights[t, j],

    v_i <- v_i (1 - a e_t) + a w_t

Slots do not depend on one another. A stable sort by slot (segments.py) puts the entries of a slot side by side, in the
order in which they are applied; one program per slot and block of columns keeps the row in registers, takes its entries
and rounds it once. A program stands at every entry, and those that are not the first of their slot end at once: how
many slots are named is known to the device alone. No atomics; rows that are not named are not touched. Bound by the
bandwidth of scattered rows, and along the entries of one slot by latency.

Backward, with g = dV' of a slot walking its entries from the last, and v before each of them replayed:

    da = <g, w - e v>,     dw_t += a g,     de_t -= a g v,     g <- g (1 - a e),     dv_i = g in the end

What an entry gives to dw and de waits in a row of its own until the k entries of a token are added in order; columns go
in groups that bound this memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import Example, Inputs, operator
from .launch import launch, plan, width
from .layout import Call, Gradient
from .segments import Segments
from .sparse_read import check_indices
from .tiles import batch, tokens

WORKSPACE = 1 << 25  # float32 numbers of the backward pass, for one group of columns


class Source(NamedTuple):
    """What a write is made of: entries sorted by slot, by their positions t k + j and the slots that they name, and the
    rows that they write."""

    order: Tensor
    slots: Tensor
    weights: tuple
    w: tuple
    e: tuple | None


class Counts(NamedTuple):
    """What the kernels count: as ``layout.Sizes``, and the neighbours of a token, batches, and all entries."""

    T: int
    N: int
    V: int
    k: int
    B: int
    B1: int
    inner: int | None
    entries: int


@triton.jit
def entry_terms(source, erase, at, b, sizes, column, BLOCK: tl.constexpr):
    """Position t k + j of the sorted entry ``at``, its weight, and columns of the rows of write and erase."""
    k, V, B1, inner = sizes.k, sizes.V, sizes.B1, sizes.inner
    entry = tl.load(source.order + at)
    t = ((entry // k) % sizes.T).to(tl.int32)
    d = column + tl.arange(0, BLOCK)
    a = tl.load(tokens(source.weights, b, B1, t, inner) + entry % k).to(tl.float32)
    w_t = tl.load(tokens(source.w, b, B1, t, inner) + d, mask=d < V, other=0.0).to(tl.float32)
    e_t = tl.full([BLOCK], 1.0, tl.float32) * erase
    if source.e is not None:
        e_t = tl.load(tokens(source.e, b, B1, t, inner) + d, mask=d < V, other=0.0).to(tl.float32)
    return entry, a, w_t, e_t


@triton.jit
def first_of_slot(sorted_slots, at, N, B):
    """Slot and batch of the sorted entry ``at``, and whether it is the first that names the slot."""
    slot = tl.load(sorted_slots + at)
    ahead = tl.load(sorted_slots + at - 1, mask=at > 0, other=-1)
    begins = (slot != ahead) & (slot < tl.full([], 1, tl.int64) * B * N)  # B N stands for no slot
    return slot, tl.where(begins, slot // N, 0).to(tl.int32), begins


@triton.jit
def sparse_write_kernel(source, v, erase, sizes, BLOCK_V: tl.constexpr):
    """All entries of the slot that sorted entry ``program`` is the first to name, into the row itself."""
    N, V, B, B1, entries = sizes.N, sizes.V, sizes.B, sizes.B1, sizes.entries
    pid = tl.program_id(0)
    at = (pid % entries).to(tl.int64)
    column = (pid // entries) * BLOCK_V
    slot, b, begins = first_of_slot(source.slots, at, N, B)
    d = column + tl.arange(0, BLOCK_V)
    row = batch(v, b, B1) + tl.where(begins, slot % N, 0) * v[3] + d
    x = tl.load(row, mask=begins & (d < V), other=0.0).to(tl.float32)
    more = begins
    while more:
        _, a, w_t, e_t = entry_terms(source, erase, at, b, sizes, column, BLOCK_V)
        x = x * (1.0 - a * e_t) + a * w_t
        at += 1
        more = tl.load(source.slots + at, mask=at < entries, other=-1) == slot
    tl.store(row, x.to(v[0].dtype.element_ty), mask=begins & (d < V))


@triton.jit
def sparse_write_backward_kernel(
    source, v, d_v, states, d_weights, d_w, erase, sizes, first, wide, BLOCK_V: tl.constexpr
):
    """The same entries from the last, for columns ``first .. first + wide``.

    d_v holds dV' and becomes dV. states, d_w [entries, wide], by position: v before each entry, then -a g v there; a g.
    d_weights [column blocks, entries]: parts, to be added.
    """
    N, V, B, B1, entries = sizes.N, sizes.V, sizes.B, sizes.B1, sizes.entries
    pid = tl.program_id(0)
    start = (pid % entries).to(tl.int64)
    block = pid // entries
    column = first + block * BLOCK_V
    slot, b, begins = first_of_slot(source.slots, start, N, B)
    own = block * BLOCK_V + tl.arange(0, BLOCK_V)
    d = first + own
    inside = (own < wide) & (d < V)
    place = tl.where(begins, slot % N, 0)
    x = tl.load(batch(v, b, B1) + place * v[3] + d, mask=begins & inside, other=0.0).to(tl.float32)
    at = start
    more = begins
    while more:
        entry, a, w_t, e_t = entry_terms(source, erase, at, b, sizes, column, BLOCK_V)
        tl.store(states + entry * wide + own, x, mask=inside)
        x = x * (1.0 - a * e_t) + a * w_t
        at += 1
        more = tl.load(source.slots + at, mask=at < entries, other=-1) == slot
    tl.debug_barrier()  # what one thread stored, another may read
    row = batch(d_v, b, B1) + place * d_v[3] + d
    g = tl.load(row, mask=begins & inside, other=0.0).to(tl.float32)
    while at > start:
        at -= 1
        entry, a, w_t, e_t = entry_terms(source, erase, at, b, sizes, column, BLOCK_V)
        x = tl.load(states + entry * wide + own, mask=inside, other=0.0)
        da = tl.sum(tl.where(inside, g * (w_t - e_t * x), 0.0), 0)
        tl.store(d_weights + block.to(tl.int64) * entries + entry, da)
        tl.store(d_w + entry * wide + own, a * g, mask=inside)
        tl.store(states + entry * wide + own, -a * g * x, mask=inside)
        g = g * (1.0 - a * e_t)
    tl.store(row, g.to(d_v[0].dtype.element_ty), mask=begins & inside)


class _Entries:
    """The arguments of one sparse write, checked, and as the kernels take them."""

    def __init__(
        self, op: str, values: Tensor, indices: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None,
        token_mask: Tensor | None, erase_scale: float,
    ) -> None:  # fmt: skip
        (self.T, self.k), (self.N, self.V) = indices.shape[-2:], values.shape[-2:]
        T, k, N, V = self.T, self.k, self.N, self.V
        token_side = [("indices", indices, (T, k)), ("weights", weights, (T, k))]
        token_side += [("write", write, (T, V)), ("erase", erase, (T, V)), ("token_mask", token_mask, (T,))]
        self.call = call = Call(op, token_side, [("values", values, (N, V))])
        call.floats(values, weights, write, erase)
        call.require(token_mask is None or token_mask.dtype == torch.bool, "token_mask must be bool")
        call.require(0 <= erase_scale <= 1, "erase must be in [0, 1]")
        check_indices(call, indices, N)
        if token_mask is not None:  # an entry that names no slot is not walked
            indices = indices.masked_fill(~token_mask.unsqueeze(-1), -1)
        self.segments = Segments(call, indices, N)
        self.count = self.segments.entries
        self.plan = plan("sparse_write", V, values, weights)
        self.width = width(V, values, weights)
        self.source = Source(
            self.segments.order, self.segments.slots, call.rows(weights), call.rows(write), call.rows(erase)
        )  # fmt: skip
        inner = T if call.F > 1 else None
        self.erase_scale = erase_scale
        self.sizes = Counts(call.F * T, N, V, k, call.B, call.batches[1], inner, self.count)

    def apply(self, values: Tensor) -> None:
        """Into ``values``, where they lie."""
        launch(
            sparse_write_kernel, self.count * self.width.steps if self.N else 0, self.source,
            self.call.slots(values), self.erase_scale, self.sizes, plan=self.plan, BLOCK_V=self.width.block,
        )  # fmt: skip


@operator
def sparse_write(
    values: Tensor, indices: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None,
    erase_scale: float,
) -> Tensor:  # fmt: skip
    """New values ``[..., N, V]``: a copy, whose named rows are written."""
    x = _Entries("sparse_write", values, indices, weights, write, erase, token_mask, erase_scale)
    out = values.clone(memory_format=torch.contiguous_format)
    x.apply(out)
    return out


@operator
def sparse_write_(
    values: Tensor, indices: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None,
    erase_scale: float,
) -> None:  # fmt: skip
    """The same into ``values``."""
    x = _Entries("sparse_write_", values, indices, weights, write, erase, token_mask, erase_scale)
    with x.call.target(values) as target:
        x.apply(target)


@operator
def sparse_write_backward(
    values: Tensor, indices: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None,
    d_values: Tensor | None, erase_scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of values, weights, write and erase."""
    x = _Entries("sparse_write_backward", values, indices, weights, write, erase, token_mask, erase_scale)
    call, T, k, N, V = x.call, x.T, x.k, x.N, x.V
    call.require(len(wants) == 4, "wants must have 4 entries")
    call.require(d_values is not None, "d_values must be given")
    call.require(d_values.shape == values.shape, "d_values must have the shape of values")
    call.floats(d_values)
    of_values = d_values.clone(memory_format=torch.contiguous_format)
    of_weights = Gradient(call, weights, wants[1], "tokens", T, k)
    of_write = Gradient(call, write, wants[2], "tokens", T, V)
    of_erase = Gradient(call, erase, wants[3], "tokens", T, V)
    sums = torch.zeros((call.B, call.F * T, k), dtype=torch.float32, device=call.device)
    block = x.width.block
    wide = min(x.width.steps, max(1, WORKSPACE // max(1, 2 * x.count * block))) * block
    for first in range(0, V, wide):
        own = min(wide, V - first)
        # entries that name no slot are not walked: their rows stay 0
        states, rows = (torch.zeros((x.count, own), dtype=torch.float32, device=call.device) for _ in range(2))
        blocks = triton.cdiv(own, block)
        parts = torch.zeros((blocks, x.count), dtype=torch.float32, device=call.device)
        launch(
            sparse_write_backward_kernel, x.count * blocks if N else 0, x.source, call.slots(values),
            call.slots(of_values), states, parts, rows, x.erase_scale, x.sizes, first, own, plan=x.plan, BLOCK_V=block,
        )  # fmt: skip
        sums += parts.sum(0).view(sums.shape)
        for gradient, terms in ((of_write, rows), (of_erase, states)):
            if gradient.wanted:
                view = gradient.view[..., first : first + own]
                view.copy_(terms.view(call.B, call.F * T, k, own).sum(2).view(view.shape))
    if of_weights.wanted:
        of_weights.view.copy_(sums.view(of_weights.view.shape))
    if not wants[0]:
        of_values = of_values.new_empty(0)
    return of_values.to(values.dtype), of_weights.result(), of_write.result(), of_erase.result()


def examples(x: Inputs) -> Iterator[Example]:
    v, i = x(2, x.slots, x.width), x.integers(2, x.tokens, 32, below=x.slots)
    a, w, e = x(2, x.tokens, 32), x(2, x.tokens, x.width), x(2, x.tokens, x.width)
    yield Example(sparse_write, (v, i, a, w, None, None, 1.0), main=True)
    yield Example(sparse_write, (v, i, a, w, e, None, 1.0), variant="erase tensor")
