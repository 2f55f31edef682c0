"""Which axis of an op each dimension of a mesh cuts, read off the placements of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._collectives import DTensor, Ranks, Replicate, Shard
from .spec import Arg, Layout, Op

Cut = str | int  # an axis, or a leading dimension counted from the last, which is -1
Step = tuple[int, int, int]  # the part first:stop of this rank, of the size that the ranks share

# Arguments that say which slots, not what they hold: where they are replicated, each rank takes its part of them.
_SLICED = ("mask", "bool", "range", "index", "scale", "block_scale")


def mesh_of(op: Op, tensors: Sequence[Any]):
    """The mesh of all DTensors of a call."""
    meshes = {a.name: x.device_mesh for a, x in zip(op.args, tensors) if isinstance(x, DTensor)}
    name, mesh = next(iter(meshes.items()))
    for other, its in meshes.items():
        if its != mesh:
            raise ValueError(f"{op.name}: {other} must be on the mesh of {name}, {mesh}, got {its}")
    return mesh


def token_axis(op: Op) -> str | None:
    """The axis along which tokens are independent of each other; None where an op runs along it, or has none."""
    if op.slots is None and op.selected is None:
        return None
    return "T" if any("T" in a.axes.split() for a in op.args) else "k"


def cut(op: Op, layout: Layout, tensors: Sequence[Any], i: int) -> Cut | None:
    """What dimension ``i`` of the mesh cuts: an axis, a leading dimension, or nothing."""
    found: dict[Cut, str] = {}
    for arg, x in zip(op.args, tensors):
        if not isinstance(x, DTensor) or isinstance(x.placements[i], Replicate):
            continue
        placement = x.placements[i]
        if type(placement) is not Shard:
            raise ValueError(
                f"{op.name}: {arg.name} must be sharded or replicated on mesh dimension {i}, got {placement!r}"
            )
        axis = _axis(arg, x, placement.dim)
        columns = "V" if op.slots is not None else None
        if isinstance(axis, str) and axis not in (op.slots, token_axis(op), columns):
            raise ValueError(
                f"{op.name}: {arg.name} must not be sharded along {axis} on mesh dimension {i}, which an entry of the "
                "result needs whole"
            )
        if isinstance(axis, int) and x.shape[placement.dim] != layout.lead[axis]:
            raise ValueError(
                f"{op.name}: {arg.name} must be replicated on mesh dimension {i} along a dimension that it shares, "
                f"got {placement}"
            )
        found.setdefault(axis, arg.name)
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise ValueError(
            f"{op.name}: one axis must be sharded on mesh dimension {i}, got {_named(a)} of {first} and {_named(b)} "
            f"of {second}"
        )
    return next(iter(found), None)


def _axis(arg: Arg, x: Tensor, dim: int) -> Cut:
    place = dim - (x.dim() - len(arg.parsed))
    return arg.axes.split()[place] if place >= 0 else place


def _named(axis: Cut) -> str:
    return axis if isinstance(axis, str) else f"leading dimension {axis}"


def dimension(arg: Arg, x: Tensor, axis: Cut, layout: Layout) -> int | None:
    """Which dimension of ``x`` is ``axis``; None where it has no such one, or shares it."""
    lead = x.dim() - len(arg.parsed)
    if isinstance(axis, str):
        names = arg.axes.split()
        return lead + names.index(axis) if axis in names else None
    if lead + axis < 0 or x.shape[lead + axis] != layout.lead[axis]:
        return None
    return lead + axis


def gathers_tokens(op: Op, layout: Layout, axis: Cut) -> bool:
    """Does a call need the tokens of all ranks, because a result belongs to a memory that they share?"""
    if isinstance(axis, str):
        return axis == token_axis(op) and any(axis not in o.axes.split() for o in op.outputs)
    shared = len(layout.memory) < -axis or layout.memory[axis] != layout.lead[axis]
    return shared and any(o.lead == "memory" for o in op.outputs)


def steps(op: Op, layout: Layout, cuts: Sequence[Cut | None], lines: Sequence[Ranks]) -> list[Step]:
    """The part of this rank along each dimension of the mesh, as DTensor deals rows out."""
    inside: dict[Cut, int] = {}
    result = []
    for axis, on in zip(cuts, lines):
        size = 0 if axis is None else inside.get(axis, extent(layout, axis))
        block = -(-size // on.size)
        first = min(block * on.rank, size)
        stop = min(first + block, size)
        if axis is not None:
            inside[axis] = stop - first
        result.append((first, stop, size))
    return result


def extent(layout: Layout, axis: Cut) -> int:
    """The size of what is cut."""
    if isinstance(axis, int):
        return layout.lead[axis]
    return layout.axes["n"] ** 2 if axis == "nn" else layout.axes[axis]


def check_sliced(op: Op, arg: Arg, x: Tensor, axis: Cut, i: int) -> None:
    """Refuse a replicated argument beside those that are sharded, unless each rank may take its part of it."""
    if arg.dtype in _SLICED and not x.requires_grad:
        return
    got = x.placements[i] if isinstance(x, DTensor) else "a plain tensor"
    raise ValueError(
        f"{op.name}: {arg.name} must be sharded along {_named(axis)} on mesh dimension {i} as other arguments are, "
        f"got {got}"
    )
