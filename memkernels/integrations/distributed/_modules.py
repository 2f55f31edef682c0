"""Modules over ranks: a memory whose slots are sharded, and one that data-parallel ranks write together."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from ... import _collectives, _over_ranks
from ...nn import ExternalMemory, MemoryState
from ._tensors import flat_mesh, shard_slots

METHODS = ("read", "write", "write_")


class SlotParallel(ParallelStyle):
    """Shards the slots of a module: ``parallelize_module(model, mesh["slots"], {"memory": SlotParallel()})``.

    The parameters and buffers ``names`` of the module become DTensors sharded over slots (:func:`shard_slots`), those
    of rank 0 on all ranks. Its other parameters stay plain, and its reads stay plain tensors, the same bits on every
    rank of the mesh: the rest of the model does not change.

    The methods ``read``, ``write`` and ``write_`` run the hooks of FSDP2 once ``fully_shard`` was applied to the
    module.

    Args:
        names: what has slots; default those of ``keys`` and ``values`` that the module has.

    Raises (when it is applied):
        ValueError: the module has none of the names, or the mesh several dimensions.
    """

    def __init__(self, *names: str):
        super().__init__()
        self.names = names

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        mesh = flat_mesh("SlotParallel", device_mesh)
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        names = self.names or tuple(name for name in ("keys", "values") if name in own)
        missing = [name for name in names if name not in own]
        if missing or not names:
            wanted = ", ".join(missing) or "keys or values"
            raise ValueError(
                f"SlotParallel: {type(module).__name__} must have {wanted}, got {', '.join(own) or 'none'}"
            )
        for name in names:
            setattr(module, name, shard_slots(own[name], mesh))
        for name in METHODS:
            if hasattr(module, name):
                _follow_fsdp(module, name)
        return module


def _follow_fsdp(module: nn.Module, name: str) -> None:
    """Make the method ``name`` a forward method of FSDP2 as soon as the module is one of its modules."""
    inner = getattr(module, name)
    registered: list[Callable] = []

    @functools.wraps(inner)
    def method(self, *args, **kwargs):
        if not isinstance(self, FSDPModule):
            return inner(*args, **kwargs)
        if not registered:
            outer = self.__dict__[name]  # another style may have wrapped this method
            self.__dict__[name] = inner
            register_fsdp_forward_method(module, name)
            registered.append(self.__dict__[name])
            self.__dict__[name] = outer
        return registered[0](*args, **kwargs)

    setattr(module, name, types.MethodType(method, module))


class RankOrderWrites(ParallelStyle):
    """The rule by which data-parallel ranks write one memory: ``{"memory": RankOrderWrites()}`` on the data mesh.

    Every ``write`` and ``write_`` of an :class:`~memkernels.nn.ExternalMemory` into a memory that all streams share
    gathers the tokens of all ranks, and each rank writes all of them, in the order of ranks: what one process would
    write that had the batches of the ranks one after the other. So the state stays the same on every rank. A state
    with a memory per stream belongs to the rank of its streams and is written as without this style.

    ``keep`` compares the state over the ranks first and raises ValueError on all of them where it differs. Without this
    style each rank keeps what it wrote itself, and what overwrites the others is left to the data-parallel wrapper.

    Raises (when it is applied):
        TypeError: the module is no ExternalMemory. ValueError: the mesh has several dimensions.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        mesh = flat_mesh("RankOrderWrites", device_mesh)
        if not isinstance(module, ExternalMemory):
            raise TypeError(f"RankOrderWrites: module must be an ExternalMemory, got {type(module).__name__}")
        for name in ("write", "write_"):
            _gather_tokens(module, name, mesh)
        _compare_before_keep(module, mesh)
        return module


def _gather_tokens(module: ExternalMemory, name: str, mesh: DeviceMesh) -> None:
    inner = getattr(module, name)

    @functools.wraps(inner)
    def method(self, x: Tensor, state: MemoryState, *, address=None, token_mask=None) -> MemoryState:
        if state.values.dim() != self.values.dim():
            return inner(x, state, address=address, token_mask=token_mask)
        on = _collectives.ranks(f"ExternalMemory.{name}", mesh, 0)
        streams = _collectives.all_objects(x.shape[0], on)
        if x.dim() < 3 or len(set(streams)) > 1:
            raise ValueError(
                f"ExternalMemory.{name}: x must be [B, T, model_dim] with the same B on all ranks, got {list(x.shape)} "
                f"on rank {on.rank}, B over ranks {streams}"
            )
        gathered = [None if t is None else _of_all_ranks(t, on) for t in (x, address, token_mask)]
        return inner(gathered[0], state, address=gathered[1], token_mask=gathered[2])

    setattr(module, name, types.MethodType(method, module))


def _of_all_ranks(x: Tensor, on: _collectives.Ranks) -> Tensor:
    """``[B, ...]`` of all ranks, ``[R * B, ...]``. Each rank has its own loss, so gradients are summed over ranks."""
    size = x.shape[0]
    whole = _over_ranks.whole(x, 0, size * on.rank, size * (on.rank + 1), size * on.size, on)
    return _over_ranks.enter(whole, on) if x.is_floating_point() else whole


def _compare_before_keep(module: ExternalMemory, mesh: DeviceMesh) -> None:
    inner = module.keep

    @functools.wraps(inner)
    def keep(self, state: MemoryState) -> None:
        on = _collectives.ranks("ExternalMemory.keep", mesh, 0)
        sums = _collectives.all_objects(_fingerprint(state.values), on)
        if any(other != sums[0] for other in sums):
            raise ValueError(
                f"ExternalMemory.keep: state must be the same on all {on.size} ranks of group {on.dimension!r}, got "
                f"different ones; write it through this module"
            )
        inner(state)

    module.__dict__["keep"] = types.MethodType(keep, module)


def _fingerprint(values: Tensor) -> tuple[float, float]:
    """Two sums that differ where the values do, but for a coincidence."""
    own = (_collectives.local(values) if isinstance(values, DTensor) else values).detach().double().flatten()
    order = torch.arange(1, own.numel() + 1, device=own.device, dtype=torch.float64)
    return own.sum().item(), torch.dot(own, order.sqrt()).item()
