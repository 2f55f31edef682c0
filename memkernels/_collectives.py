"""Everything that the library asks of torch.distributed: three collectives, and the parts of a DTensor.

Nothing else in the package calls a collective. Every call counts its bytes where someone meters them, and every failure
is one sentence that names the op and the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import _torch
from .spec import Op

__all__ = ["DTensor", "DeviceMesh", "Partial", "Ranks", "Replicate", "Shard"]


class Ranks(NamedTuple):
    """The ranks along one dimension of a mesh, as one op sees them: ``rank`` of ``size``."""

    op: str
    dimension: str
    group: dist.ProcessGroup
    size: int
    rank: int


def ranks(op: str, mesh: DeviceMesh, i: int) -> Ranks:
    """The ranks along dimension ``i`` of ``mesh``."""
    names = mesh.mesh_dim_names
    return Ranks(op, str(i) if names is None else names[i], mesh.get_group(i), mesh.size(i), mesh.get_local_rank(i))


# --- the collectives ---

# torch renames it: the first of these that there is.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Meter = dict[tuple[str, str], int]
_meters: list[Meter] = []


@contextmanager
def metered() -> Iterator[Meter]:
    """Count in a dictionary, (op, collective) -> bytes, what this rank receives from others inside the block."""
    meter: Meter = {}
    _meters.append(meter)
    try:
        yield meter
    finally:
        _meters.remove(meter)


def _count(on: Ranks, collective: str, received: float) -> None:
    for meter in _meters:
        key = (on.op, collective)
        meter[key] = meter.get(key, 0) + math.ceil(received)


def _failed(on: Ranks, collective: str, error: Exception) -> RuntimeError:
    reason = str(error).strip().partition("\n")[0]
    return RuntimeError(
        f"{on.op}: {collective} over group {on.dimension!r} must reach all of its {on.size} ranks, "
        f"got on rank {on.rank}: {reason}"
    )


def _run(on: Ranks, collective: str, function, *tensors: Tensor) -> None:
    if torch.compiler.is_compiling():
        function(*tensors, group=on.group)
        return
    try:
        function(*tensors, group=on.group)
    except (RuntimeError, ValueError) as error:
        raise _failed(on, collective, error) from error


def all_reduce(x: Tensor, on: Ranks) -> Tensor:
    """The sum of ``x`` over the ranks, in a new tensor: the same bits on each of them."""
    if _meters:
        _count(on, "all_reduce", 2 * (on.size - 1) / on.size * x.numel() * x.element_size())
    x = x.clone(memory_format=torch.contiguous_format)
    _run(on, "all_reduce", dist.all_reduce, x)
    return x


def all_gather(x: Tensor, on: Ranks) -> Tensor:
    """``[n, ...]`` of every rank, in the order of ranks: ``[size, n, ...]``."""
    if x.dtype == torch.bool:  # which not every backend of torch.distributed takes
        return all_gather(x.contiguous().view(torch.uint8), on).view(torch.bool)
    if _meters:
        _count(on, "all_gather", (on.size - 1) * x.numel() * x.element_size())
    gathered = x.new_empty((on.size * x.shape[0], *x.shape[1:]))
    _run(on, "all_gather", _all_gather, gathered, x.contiguous())
    return gathered.view(on.size, *x.shape)


def all_to_all(x: Tensor, on: Ranks) -> Tensor:
    """Of ``[size * n, ...]`` rank r gets block r of every rank, in the order of ranks: ``[size, n, ...]``."""
    if _meters:
        _count(on, "all_to_all", (on.size - 1) / on.size * x.numel() * x.element_size())
    blocks = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(on, "all_to_all", dist.all_to_all_single, blocks, x.contiguous())
    return blocks.view(on.size, x.shape[0] // on.size, *x.shape[1:])


def all_objects(thing: object, on: Ranks) -> list:
    """What every rank gives, in the order of ranks. For checks: it pickles."""
    things: list = [None] * on.size
    try:
        dist.all_gather_object(things, thing, group=on.group)
    except (RuntimeError, ValueError) as error:
        raise _failed(on, "all_gather_object", error) from error
    return things


# --- ranks that must agree ---

_checking: list[bool] = []


@contextmanager
def checked() -> Iterator[None]:
    """Inside the block every call on DTensors first compares itself over the ranks (:func:`agree`)."""
    _checking.append(True)
    try:
        yield
    finally:
        _checking.pop()


def _shown(call: tuple) -> str:
    op, tensors, params = call
    shapes = ", ".join("None" if t is None else f"{t[1]}{list(t[0])}" for t in tensors)
    return f"{op}({shapes}; {', '.join(map(str, params))})"


def agree(op: Op, tensors, params: tuple, mesh: DeviceMesh) -> None:
    """Where :func:`checked` is on, raise ValueError on every rank if not all make the same call.

    Compares op, global shapes, dtypes, placements and options, over each dimension of the mesh.
    """
    if not _checking:
        return
    given = [
        None if t is None else (tuple(t.shape), str(t.dtype).removeprefix("torch."), str(getattr(t, "placements", "")))
        for t in tensors
    ]
    own = (op.name, given, [str(p) for p in params])
    for i in range(mesh.ndim):
        on = ranks(op.name, mesh, i)
        calls = all_objects(own, on)
        for rank, other in enumerate(calls):
            if other != calls[0]:
                raise ValueError(
                    f"{op.name}: all ranks of group {on.dimension!r} must make the same call, got {_shown(calls[0])} "
                    f"on rank 0 and {_shown(other)} on rank {rank}"
                )


# --- the parts of a DTensor ---


def local(x: DTensor) -> Tensor:
    """The part of ``x`` on this rank, without a link to the graph of ``x``."""
    if torch.compiler.is_compiling():
        return x.to_local()
    part = _torch.local_part(x)
    return part.detach() if part.requires_grad else part


def wrapped(part: Tensor, mesh: DeviceMesh, placements: tuple, shape: tuple[int, ...]) -> DTensor:
    """The DTensor of ``shape`` whose part on this rank is ``part``, without a link to its graph."""
    stride = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        stride[i] = stride[i + 1] * max(shape[i + 1], 1)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))
