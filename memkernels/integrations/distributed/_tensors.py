"""Tensors over ranks: how slots are dealt out, which of them a rank holds, and what a call moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ... import _collectives

COLUMN_BYTES = 64  # a row of fewer bytes on each rank wastes the cache line that it is read with


def flat_mesh(name: str, mesh: object) -> DeviceMesh:
    """``mesh``, a mesh of one dimension."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{name}: mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"{name}: mesh must have one dimension, such as mesh['slots'], got {mesh.ndim}")
    return mesh


def shard_slots(tensor: Tensor, mesh: DeviceMesh, *, local: bool = False, dim: int | None = None) -> DTensor:
    """A memory tensor as a DTensor that is sharded over its slots: rank r of R holds the r-th block of ceil(N / R).

    Args:
        tensor: keys or values ``[..., N, D]``, or a mask or scale ``[N]``. The whole; that of rank 0 is dealt out, as
            ``distribute_tensor`` does.
        mesh: of one dimension.
        local: ``tensor`` holds the slots of this rank only, dealt out in the way above.
        dim: the dimension of slots; default the last but one, or the only one.

    Returns:
        a DTensor, a Parameter where ``tensor`` is one.

    Raises:
        TypeError: ``tensor`` is no tensor, or a DTensor. ValueError: a mesh or ``dim`` that does not fit, or local
            parts that are not dealt out in blocks.
    """
    name = "shard_slots"
    mesh = flat_mesh(name, mesh)
    if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
        raise TypeError(f"{name}: tensor must be a plain tensor, got {type(tensor).__name__}")
    if not tensor.dim():
        raise ValueError(f"{name}: tensor must be [..., N, D] or [N], got []")
    dim = (max(tensor.dim() - 2, 0) if dim is None else dim) % tensor.dim()
    data = tensor.detach()
    whole = _from_parts(name, data, mesh, dim) if local else distribute_tensor(data, mesh, [Shard(dim)])
    return _like(tensor, whole)


def _from_parts(name: str, part: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    on = _collectives.ranks(name, mesh, 0)
    sizes = _collectives.all_objects(part.shape[dim], on)
    total = sum(sizes)
    block = -(-total // on.size)
    wanted = [min(block, max(total - block * rank, 0)) for rank in range(on.size)]
    if sizes != wanted:
        raise ValueError(f"{name}: the ranks must hold {wanted} of {total} slots, got {sizes}")
    shape = [*part.shape[:dim], total, *part.shape[dim + 1 :]]
    return _collectives.wrapped(part.contiguous(), mesh, (Shard(dim),), tuple(shape))


def slot_range(tensor: Tensor, dim: int | None = None) -> tuple[int, int]:
    """The slots ``first <= i < stop`` that this rank holds of a memory tensor; all of them where it is not sharded.

    dim: the dimension of slots; default as in :func:`shard_slots`.
    """
    if not isinstance(tensor, Tensor) or not tensor.dim():
        raise TypeError(f"slot_range: tensor must be [..., N, D] or [N], got {type(tensor).__name__}")
    dim = (max(tensor.dim() - 2, 0) if dim is None else dim) % tensor.dim()
    first, stop = 0, tensor.shape[dim]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for i, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard) and placement.dim == dim:
                block = -(-(stop - first) // mesh.size(i))
                begin = min(first + block * mesh.get_local_rank(i), stop)
                first, stop = begin, min(begin + block, stop)
    return first, stop


def shard_product_keys(subkeys: Tensor, values: Tensor, mesh: DeviceMesh) -> tuple[DTensor, DTensor]:
    """Subkeys ``[2, n, K/2]`` and values ``[n * n, V]`` of a product-key memory over the ranks of ``mesh``.

    Subkeys are replicated, for they are few. Values are sharded by columns while each rank has 64 bytes of a row or
    more, so that a read needs no communication; else by rows, which each rank weighs and sums where they lie.

    Raises:
        TypeError, ValueError: as :func:`shard_slots`.
    """
    name = "shard_product_keys"
    mesh = flat_mesh(name, mesh)
    for what, x in (("subkeys", subkeys), ("values", values)):
        if not isinstance(x, Tensor) or isinstance(x, DTensor) or x.dim() < 2:
            raise TypeError(f"{name}: {what} must be a plain tensor of at least 2 dimensions, got {type(x).__name__}")
    columns = values.shape[-1] * values.element_size() / mesh.size() >= COLUMN_BYTES
    lists = distribute_tensor(subkeys.detach(), mesh, [Replicate()])
    rows = distribute_tensor(values.detach(), mesh, [Shard(values.dim() - (1 if columns else 2))])
    return _like(subkeys, lists), _like(values, rows)


def _like(tensor: Tensor, whole: DTensor) -> Any:
    """``whole``, a Parameter or one that requires a gradient where ``tensor`` is that."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(whole, requires_grad=tensor.requires_grad)
    return whole.requires_grad_(tensor.requires_grad)


@contextmanager
def traffic() -> Iterator[dict[tuple[str, str], int]]:
    """Count the bytes that calls inside the block move: a dictionary (op, collective) -> bytes.

    It counts what this rank receives from the others, of forward and backward passes that run inside the block in eager
    mode: compiled code runs its collectives without this library.
    """
    with _collectives.metered() as meter:
        yield meter


def check_ranks() -> AbstractContextManager[None]:
    """A debug mode: inside the block each call on DTensors first compares op, shapes, dtypes and options over ranks.

    Where they differ, every rank raises ValueError. Without it such a call hangs, or mixes tensors up. It costs an
    exchange of pickled objects per call, and does nothing in code that torch.compile traces.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("check_ranks: it must be entered outside of compiled code, got a call inside of it")
    return _collectives.checked()
