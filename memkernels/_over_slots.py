"""A call over slots that are sharded: each rank calls the op on its own slots, and the results are put together.

One function per way that an op may declare in ``over_slots``. They take the tensors of this rank, those of tokens
replicated, and return the results of the whole, replicated, or the rank's own for results with one entry per slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _over_ranks
from ._collectives import Ranks
from .spec import Op, several, stats_dtype


class Call(NamedTuple):
    """What is called: the op on a backend, in place or not. run: runs it on plain tensors. ops: all ops by name."""

    op: Op
    name: str
    inplace: bool
    run: Callable[..., Any]
    ops: Mapping[str, Op]

    def of(self, op: Op, tensors: list, params: tuple) -> tuple[Tensor, ...]:
        """The results of ``op`` on this rank."""
        return several(self.run(op, tensors, params, self.name, self.inplace))

    def merge(self, read: Tensor, lse: Tensor, on: Ranks) -> tuple[Tensor, Tensor]:
        """Reads of the shards as one of the whole."""
        merging = self.ops["merge_reads"]
        return _over_ranks.merge(read, lse, lambda *x: self.run(merging, list(x), (), self.name, False), on)


class Slots(NamedTuple):
    """The slots of this rank: ``first <= i < stop`` of ``size``.

    levels: the ranks that share them, outermost first, each with the slots ``(first, stop)`` inside of that level.
    """

    size: int
    levels: tuple[tuple[Ranks, int, int], ...]

    @property
    def first(self) -> int:
        return self.levels[-1][1]

    @property
    def stop(self) -> int:
        return self.levels[-1][2]

    def shifted(self, op: Op, tensors: list) -> list:
        """``tensors`` with ranges and indices in terms of the slots of this rank."""
        return [
            x - self.first
            if x is not None and arg.dtype == "range"
            else self.own(x)
            if x is not None and arg.dtype == "index" and arg.of == "N"
            else x
            for arg, x in zip(op.args, tensors)
        ]

    def own(self, indices: Tensor) -> Tensor:
        """Indices in terms of the slots of this rank: -1 for those of others. One that no rank has stays an error."""
        others = (indices >= 0) & (indices < self.size) & ((indices < self.first) | (indices >= self.stop))
        shift = torch.where((indices >= self.first) & (indices < self.stop), self.first, 0)
        return (indices - shift).masked_fill(others, -1)

    def entered(self, op: Op, tensors: list) -> list:
        """``tensors`` with those that all ranks share as arguments of what each of them computes."""
        result = []
        for arg, x in zip(op.args, tensors):
            if x is not None and arg.is_float and op.slots not in arg.axes.split():
                for on, _, _ in self.levels:
                    x = _over_ranks.enter(x, on)
            result.append(x)
        return result

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, kept in float32 where ``x`` has 16 bits."""
        exact = x.to(stats_dtype(x.dtype))
        for on, _, _ in reversed(self.levels):
            exact = _over_ranks.total(exact, on)
        return exact.to(x.dtype)


def _alone(call: Call, tensors: list, params: tuple, slots: Slots) -> tuple[Tensor, ...]:
    """Every slot by itself."""
    op = call.op
    return call.of(op, slots.entered(op, slots.shifted(op, tensors)), params)


def _lse(call: Call, tensors: list, params: tuple, slots: Slots) -> tuple[Tensor, ...]:
    """Reads of the shards merge through their lse."""
    read, lse, rest = _alone(call, tensors, params, slots)
    for on, _, _ in reversed(slots.levels):
        read, lse = call.merge(read, lse, on)
    return read, lse, torch.zeros_like(rest)


def _best(call: Call, tensors: list, params: tuple, slots: Slots) -> tuple[Tensor, ...]:
    """The k best of the k best of every shard; where they are read, each shard reads those that it holds."""
    op = call.op
    if all(out.name != "read" for out in op.outputs):
        return _search(call, tensors, params, slots)
    given = {a.name: x for a, x in zip(op.args, tensors)}
    kind = "_compressed" if op.twin_of else ""
    search, read = call.ops[f"topk_search{kind}"], call.ops[f"selected_read{kind}"]
    with torch.no_grad():
        _, given["indices"] = _search(call._replace(op=search), [given[a.name] for a in search.args], params, slots)
    scale = params[1:]
    found, weights, lse = _rows(call._replace(op=read), [given[a.name] for a in read.args], scale, slots)
    return found, given["indices"], weights, lse


def _search(call: Call, tensors: list, params: tuple, slots: Slots) -> tuple[Tensor, Tensor]:
    scores, indices = _alone(call, tensors, params, slots)
    indices = torch.where(indices < 0, indices, indices + slots.first)
    for on, first, stop in reversed(slots.levels):
        scores, indices = _over_ranks.best(scores, indices, _within(first, stop), on)
    return scores, indices


def _within(first: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda slots: (slots >= first) & (slots < stop)


def _rows(call: Call, tensors: list, params: tuple, slots: Slots) -> tuple[Tensor, ...]:
    """Each shard serves the rows that it holds."""
    op = call.op
    names = [out.name for out in op.outputs]
    if op.selected is not None:
        return _product_rows(call, tensors, params, slots)
    if all(op.slots in out.axes.split() for out in op.outputs):
        return _alone(call, tensors, params, slots)
    if "lse" in names:
        read, weights, lse = _alone(call, tensors, params, slots)
        for on, _, _ in reversed(slots.levels):
            own = lse
            read, lse = call.merge(read, own, on)
            share = _over_ranks.share_of(own, _over_ranks.enter(lse, on))
            weights = _over_ranks.total(weights * share.unsqueeze(-1), on)
        return read, weights, lse
    (found,) = _alone(call, tensors, params, slots)
    if "scores" not in names:
        return (slots.total(found),)
    indices = tensors[op.index("indices")]
    found = slots.total(found.masked_fill(slots.own(indices) < 0, 0))
    return (found.masked_fill(indices < 0, -torch.inf),)


def _product_rows(call: Call, tensors: list, params: tuple, slots: Slots) -> tuple[Tensor, ...]:
    """Product keys: every rank searches the same short lists, and each shard of the values serves its rows."""
    query, subkeys, values, *scales = tensors
    pairs = values.new_empty((*values.shape[:-2], slots.size, 0), dtype=query.dtype)
    whole = call.ops["product_key_read"]
    _, indices, weights, lse = call.of(whole, [query, subkeys, pairs], params)
    reading = call.ops["sparse_read_compressed" if scales else "sparse_read"]
    low = values.dtype == query.dtype  # weights of 16 bits beside values of 16 bits
    given = [values, indices, weights.to(query.dtype) if low else weights, *scales]
    (read,) = _rows(call._replace(op=reading), given, (), slots)
    return read.to(query.dtype), indices, weights, lse


OVER_SLOTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"": _alone, "lse": _lse, "best": _best, "rows": _rows}
