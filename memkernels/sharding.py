"""Ops on DTensors: which part of a call each rank computes, and how the parts become the result of the whole.

The rules are read off the declaration of an op. Every dimension of the mesh may *cut* one axis:

- tokens (``T``) and leading dimensions: each rank computes its own. An op whose results belong to a memory that the
  tokens share gathers them first, in the order of ranks, which is the order in which one process writes them;
- value columns (``V``): each rank computes its own columns, and all of them the weights;
- slots (``N``, or ``nn`` of product keys): what :class:`~memkernels.spec.Op` says in ``over_slots``. Keys, values and
  masks never move. Slot numbers are those of the whole everywhere; ranges and indices are shifted on the way in.

Plain tensors beside DTensors count as replicated: the same on every rank. Where no tensor of tokens is a DTensor, what
belongs to tokens comes back plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _collectives, _cuts, _over_ranks, spec
from ._collectives import DTensor, Ranks, Replicate, Shard
from ._cuts import Cut, Step
from ._over_slots import OVER_SLOTS, Call, Slots
from .spec import Arg, Layout, Op, Out, bare

__all__ = ["Call", "plan"]


class Place(NamedTuple):
    """How an argument becomes the tensor that this rank computes with.

    gathers: (dimension, first, stop, size, ranks) of parts that are put together, in this order. slices: (dimension,
    first, stop, ranks) of what this rank takes. enters: ranks over which its gradient is summed.
    """

    wrapped: bool = False
    gathers: tuple = ()
    slices: tuple = ()
    enters: tuple = ()

    def take(self, x: Any) -> Any:
        if self.wrapped:
            x = _over_ranks.unwrapped(x)
        for dim, first, stop, size, on in self.gathers:
            x = _over_ranks.whole(x, dim, first, stop, size, on)
        for dim, first, stop, on in self.slices:
            x = _over_ranks.part(x, dim, first, stop, on)
        for on in self.enters:
            x = _over_ranks.enter(x, on)
        return x


class Result(NamedTuple):
    """How what this rank computed becomes a result.

    placements: None for one that is plain. sizes: (dimension, size) of the axes that are cut. alike: ranks that compute
    the same of it.
    """

    placements: tuple | None
    sizes: tuple
    alike: tuple

    def give(self, x: Tensor, mesh: Any) -> Tensor:
        for on in self.alike:
            x = _over_ranks.first(x, on)
        if self.placements is None:
            return x
        shape = list(x.shape)
        for dim, size in self.sizes:
            shape[dim] = size
        return _over_ranks.wrap(x, mesh, self.placements, tuple(shape))


class Recipe(NamedTuple):
    """A call on DTensors with certain placements, from its arguments to its results. slots: None where whole."""

    call: Call
    mesh: Any
    places: tuple[Place, ...]
    results: tuple[Result, ...]
    slots: Slots | None

    def run(self, *inputs: Any) -> Any:
        call, n = self.call, len(self.places)
        params = inputs[n:]
        _collectives.agree(call.op, inputs[:n], params, self.mesh)
        tensors = [x if x is None else place.take(x) for place, x in zip(self.places, inputs)]
        if self.slots is None:
            found = call.of(call.op, tensors, params)
        else:
            found = OVER_SLOTS[call.op.over_slots](call, tensors, params, self.slots)
        return bare([result.give(x, self.mesh) for result, x in zip(self.results, found)])


def plan(call: Call, tensors: list, params: tuple) -> Callable[..., Any]:
    """What runs calls with tensors of these shapes, with whatever placements."""
    layout = spec.check(call.op, tensors, () if call.op.typed is None else params)
    n = len(tensors)
    if torch.compiler.is_compiling():
        return _recipe(call, layout, tensors).run
    recipes: dict[tuple, Recipe] = {}

    def run(*inputs):
        key = tuple([_key(x) for x in inputs[:n]])
        recipe = recipes.get(key)
        if recipe is None:
            recipe = recipes[key] = _recipe(call, layout, inputs[:n])
        return recipe.run(*inputs)

    return run


def _key(x: Any) -> Any:
    """What a recipe depends on. Of a mesh its identity: an equal one that was made later has other groups."""
    if not isinstance(x, DTensor):
        return x is not None and x.requires_grad
    return x.placements, id(x.device_mesh), x.requires_grad


# --- from placements to a recipe ---


def _recipe(call: Call, layout: Layout, tensors: Sequence[Any]) -> Recipe:
    op = call.op
    mesh = _cuts.mesh_of(op, tensors)
    cuts = [_cuts.cut(op, layout, tensors, i) for i in range(mesh.ndim)]
    lines = [_collectives.ranks(op.name, mesh, i) for i in range(mesh.ndim)]
    steps = _cuts.steps(op, layout, cuts, lines)
    gathered = [c is not None and _cuts.gathers_tokens(op, layout, c) for c in cuts]
    places = [
        Place() if x is None else _place(op, arg, x, layout, list(zip(cuts, lines, steps, gathered)))
        for arg, x in zip(op.args, tensors)
    ]
    own = [None if g else c for c, g in zip(cuts, gathered)]
    slots = _slots(call, layout, own, lines, steps)
    plain = not any(isinstance(x, DTensor) for arg, x in zip(op.args, tensors) if arg.side == "tokens")
    results = [
        _result(out, layout, own, lines, plain) for out in op.outputs if not (call.inplace and out.name == op.inplace)
    ]
    return Recipe(call, mesh, tuple(places), tuple(results), slots)


def _place(op: Op, arg: Arg, x: Tensor, layout: Layout, ways: list[tuple[Cut | None, Ranks, Step, bool]]) -> Place:
    gathers: list[tuple] = []
    slices: list[tuple] = []
    enters: list[Ranks] = []
    wrapped = isinstance(x, DTensor)
    for i, (cut, on, (first, stop, size), gathered) in enumerate(ways):
        if cut is None or on.size == 1:
            continue
        dim = _cuts.dimension(arg, x, cut, layout)
        sharded = isinstance(x, DTensor) and isinstance(x.placements[i], Shard)
        if gathered:
            if sharded:  # the innermost part is put together first
                gathers.insert(0, (dim, first, stop, size, on))
        elif sharded:
            continue
        elif dim is not None:
            _cuts.check_sliced(op, arg, x, cut, i)
            slices.append((dim, first, stop, on))
        elif arg.is_float and x.is_floating_point() and cut != op.slots:
            enters.append(on)
    return Place(wrapped, tuple(gathers), tuple(slices), tuple(enters))


def _slots(call: Call, layout: Layout, cuts: list[Cut | None], lines: list[Ranks], steps: list[Step]) -> Slots | None:
    op, levels, base = call.op, [], 0
    for cut, on, (first, stop, _) in zip(cuts, lines, steps):
        if cut is not None and cut == op.slots and on.size > 1:
            levels.append((on, base + first, base + stop))
            base += first
    if not levels:
        return None
    if call.name == "reference":
        raise NotImplementedError(
            f"{op.name}: backend 'reference' is the formula over all slots, got slots sharded over "
            f"{levels[0][0].size} ranks"
        )
    alone = op.over_slots or all(op.slots in out.axes.split() for out in op.outputs)
    if not alone or op.over_slots not in OVER_SLOTS:
        raise NotImplementedError(
            f"{op.name}: slots must be replicated, because a token needs all of them at once, got slots sharded over "
            f"{levels[0][0].size} ranks"
        )
    return Slots(_cuts.extent(layout, op.slots or ""), tuple(levels))


def _result(out: Out, layout: Layout, cuts: list[Cut | None], lines: list[Ranks], plain: bool) -> Result:
    names = out.axes.split()
    lead = layout.lead if out.lead == "all" else layout.memory
    placements: list[Any] = []
    sizes: list[tuple[int, int]] = []
    alike: list[Ranks] = []
    for cut, on in zip(cuts, lines):
        if cut is None or (isinstance(cut, str) and cut not in names):
            placements.append(Replicate())
            if cut == "V" and out.grad:
                alike.append(on)
            continue
        dim = len(lead) + (cut if isinstance(cut, int) else names.index(cut))
        placements.append(Shard(dim))
        sizes.append((dim, _cuts.extent(layout, cut)))
    replicated = all(isinstance(p, Replicate) for p in placements)
    bare_one = plain and replicated and out.lead == "all"
    return Result(None if bare_one else tuple(placements), tuple(sizes), tuple(alike))
