"""The steps from a tensor on every rank to one of all ranks, each with derivatives of any order.

Two kinds of plain tensors are passed along one dimension of a mesh. A *replicated* one holds the same numbers on every
rank, and so does its gradient. A *local* one is the rank's own, and so is its gradient. The derivative of a step from
one kind to the other is a step back, so that steps come in pairs:

    enter: replicated -> local, as it is            total:  local -> replicated, the sum over ranks
    part:  replicated -> local, a slice             whole:  local -> replicated, the slices side by side

``merge`` and ``best`` make the results of shards of a memory those of the whole. Their derivatives use only what the
forward pass left on each rank, and communicate nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from . import _collectives
from ._collectives import DTensor, Ranks


class _Enter(Function):
    @staticmethod
    def forward(ctx, x, on):
        ctx.on = on
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return _Total.apply(d, ctx.on), None


class _Total(Function):
    @staticmethod
    def forward(ctx, x, on):
        ctx.on = on
        return _collectives.all_reduce(x, on)

    @staticmethod
    def backward(ctx, d):
        return _Enter.apply(d, ctx.on), None


class _Part(Function):
    @staticmethod
    def forward(ctx, x, dim, first, stop, on):
        ctx.place = dim, first, stop, x.shape[dim], on
        return x.narrow(dim, first, stop - first).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, d):
        dim, first, stop, size, on = ctx.place
        return _Whole.apply(d, dim, first, stop, size, on), None, None, None, None


class _Whole(Function):
    @staticmethod
    def forward(ctx, x, dim, first, stop, size, on):
        ctx.place = dim, first, stop, on
        rows = x.movedim(dim, 0)
        block = -(-size // on.size)  # the first ranks hold so many, as torch.chunk deals them out
        rows = torch.cat([rows, rows.new_zeros((block - rows.shape[0], *rows.shape[1:]))])
        return _collectives.all_gather(rows, on).flatten(0, 1)[:size].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx, d):
        return _Part.apply(d, *ctx.place), None, None, None, None, None


class _First(Function):
    """A result that every rank computed alike, local -> replicated: its gradient is that of one of them."""

    @staticmethod
    def forward(ctx, x, on):
        ctx.on = on
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return _Enter.apply(d, ctx.on) * (ctx.on.rank == 0), None


def enter(x: Tensor, on: Ranks) -> Tensor:
    """A replicated ``x`` as an argument of what each rank computes; its gradient is summed over the ranks."""
    return x if on.size == 1 else _Enter.apply(x, on)


def total(x: Tensor, on: Ranks) -> Tensor:
    """The sum over the ranks."""
    return x if on.size == 1 else _Total.apply(x, on)


def part(x: Tensor, dim: int, first: int, stop: int, on: Ranks) -> Tensor:
    """``x[first:stop]`` along ``dim``."""
    return _Part.apply(x, dim, first, stop, on)


def whole(x: Tensor, dim: int, first: int, stop: int, size: int, on: Ranks) -> Tensor:
    """The parts ``first:stop`` of all ranks along ``dim``, in the order of ranks."""
    return x if on.size == 1 else _Whole.apply(x, dim, first, stop, size, on)


def first(x: Tensor, on: Ranks) -> Tensor:
    """What every rank computed alike."""
    return x if on.size == 1 else _First.apply(x, on)


# --- DTensors ---


class _Unwrap(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.place = x.device_mesh, x.placements, tuple(x.shape)
        own = _collectives.local(x)
        return own.view_as(own)

    @staticmethod
    def backward(ctx, d):
        return _Wrap.apply(d, *ctx.place)


class _Wrap(Function):
    @staticmethod
    def forward(ctx, x, mesh, placements, shape):
        ctx.place = mesh, placements
        return _collectives.wrapped(x.contiguous(), mesh, placements, shape)

    @staticmethod
    def backward(ctx, d):
        mesh, placements = ctx.place
        if d.placements != placements:
            d = d.redistribute(mesh, placements)
        return _Unwrap.apply(d), None, None, None


def unwrapped(x: DTensor) -> Tensor:
    """The part on this rank: along every dimension of the mesh local where ``x`` is sharded, else replicated."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Unwrap.apply(x)
    return _collectives.local(x)


def wrap(x: Tensor, mesh, placements: tuple, shape: tuple[int, ...]) -> DTensor:
    """The DTensor of ``shape`` whose part on this rank is ``x``. Undoes :func:`unwrapped`."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Wrap.apply(x, mesh, placements, shape)
    return _collectives.wrapped(x.contiguous(), mesh, placements, shape)


# --- what shards of a memory found, as what the whole holds ---


def _pack(parts: list[Tensor]) -> Tensor:
    """Tensors ``[M, d_i]`` side by side; as bytes where their dtypes differ."""
    if any(p.dtype != parts[0].dtype for p in parts):
        parts = [p.contiguous().view(torch.uint8) for p in parts]
    return torch.cat(parts, -1)


def _unpack(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Undo :func:`_pack`; ``like``: tensors of the same widths and dtypes."""
    size = 1 if rows.dtype == like[0].dtype else 0
    widths = [p.shape[-1] * (size or p.element_size()) for p in like]
    return [x.contiguous().view(p.dtype) for x, p in zip(rows.split(widths, -1), like)]


def exchange(parts: list[Tensor], merge: Callable[[list[Tensor]], list[Tensor]], on: Ranks) -> list[Tensor]:
    """``merge`` of what all ranks found for each of M tokens.

    parts: ``[M, d_i]``. merge: from ``[size, m, d_i]`` to results ``[m, d_i]`` of the same widths and dtypes.

    Each rank merges a block of the tokens and sends the results to the others: ``2 (R - 1) / R`` times the bytes of
    ``parts`` for R ranks. Where an all-gather of everything moves no more, it is that, which waits once.
    """
    rows = _pack(parts)
    tokens = rows.shape[0]
    block = -(-tokens // on.size)
    if tokens <= 2 * block:
        return merge(_unpack(_collectives.all_gather(rows, on), parts))
    rows = torch.cat([rows, rows.new_zeros((block * on.size - tokens, rows.shape[1]))])
    own = _pack(merge(_unpack(_collectives.all_to_all(rows, on), parts)))
    return _unpack(_collectives.all_gather(own, on).flatten(0, 1)[:tokens], parts)


class _Merge(Function):
    """read = sum_r exp(lse_r - lse) read_r,   lse = log sum_r exp(lse_r)   over the ranks r."""

    @staticmethod
    def forward(ctx, read, lse, reads, on):
        ctx.on = on
        parts = [read.flatten(0, -2), lse.flatten().unsqueeze(-1)]
        merged, total_lse = exchange(parts, lambda found: _merged(reads, found), on)
        merged, total_lse = merged.reshape(read.shape), total_lse.reshape(lse.shape)
        ctx.save_for_backward(read, lse, merged, total_lse)
        return merged, total_lse

    @staticmethod
    def backward(ctx, d_read, d_lse):
        own_read, own_lse, read, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            read, lse, d_read, d_lse = (_Enter.apply(x, ctx.on) for x in (read, lse, d_read, d_lse))
        share = share_of(own_lse, lse).unsqueeze(-1)
        d_own = d_read.to(share.dtype) * share
        difference = own_read.to(share.dtype) - read.to(share.dtype)
        d_own_lse = (d_own * difference.masked_fill(share == 0, 0)).sum(-1) + share.squeeze(-1) * d_lse
        return d_own.to(own_read.dtype), d_own_lse, None, None


def _merged(reads: Callable, found: list[Tensor]) -> list[Tensor]:
    read, lse = reads(found[0], found[1].squeeze(-1))
    return [read, lse.unsqueeze(-1)]


def share_of(own_lse: Tensor, lse: Tensor) -> Tensor:
    """What share of the weight of all ranks this rank has: ``exp(own_lse - lse)``, 0 where it has none."""
    nothing = torch.isneginf(own_lse)
    return torch.exp((own_lse - lse).masked_fill(nothing, -torch.inf)).masked_fill(nothing, 0)


def merge(read: Tensor, lse: Tensor, reads: Callable, on: Ranks) -> tuple[Tensor, Tensor]:
    """Reads ``[..., T, V]`` of the shards and their lse ``[..., T]`` as those of the whole.

    reads: the op merge_reads, as a function of ``[S, T, V]`` and ``[S, T]``.
    """
    return (read, lse) if on.size == 1 else _Merge.apply(read, lse, reads, on)


class _Best(Function):
    """The k best of the k best of every rank. Of a shard's list, which is sorted, the whole takes the first ones."""

    @staticmethod
    def forward(ctx, scores, indices, own, ordered, on):
        k = scores.shape[-1]

        def best_of(found: list[Tensor]) -> list[Tensor]:
            s, i = (x.movedim(0, -2).flatten(-2) for x in found)
            if not ordered:
                order = i.masked_fill(i < 0, torch.iinfo(i.dtype).max).sort(dim=-1, stable=True).indices
                s, i = s.gather(-1, order), i.gather(-1, order)
            # slots are in order, so a stable sort gives ties to the smaller slot
            order = s.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            return [s.gather(-1, order), i.gather(-1, order)]

        merged, slots = exchange([scores.flatten(0, -2), indices.flatten(0, -2)], best_of, on)
        merged, slots = merged.reshape(scores.shape), slots.reshape(indices.shape)
        ctx.on = on
        ctx.save_for_backward(own(slots))
        ctx.mark_non_differentiable(slots)
        return merged, slots

    @staticmethod
    def backward(ctx, d_scores, _):
        (own,) = ctx.saved_tensors
        d_scores = _Enter.apply(d_scores, ctx.on)
        k = own.shape[-1]
        place = (own.cumsum(-1) - 1).masked_fill(~own, k)  # a last column takes what other ranks own
        d = d_scores.new_zeros((*d_scores.shape[:-1], k + 1)).scatter_add(-1, place, d_scores)
        return d[..., :k], None, None, None, None


def best(
    scores: Tensor, indices: Tensor, own: Callable[[Tensor], Tensor], on: Ranks, *, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    """Scores and slot numbers ``[..., T, k]`` of shards, best first, as those of the whole; ties to the smaller slot.

    own: which of some slots this rank, or those that it was merged with, hold. ordered: all slots of a rank are smaller
    than those of the next.
    """
    return (scores, indices) if on.size == 1 else _Best.apply(scores, indices, own, ordered, on)
