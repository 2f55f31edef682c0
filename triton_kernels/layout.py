"""Leading dimensions of one call, as the kernels see them, and the guards of the launchers.

A kernel sees token tensors as ``[B0, B1, F, T, ...]`` and memory tensors as ``[B0, B1, N, ...]``: two batch dimensions,
and one that holds every leading dimension the memory lacks, folded in front of ``T`` in row-major order. Views do this
without moving a number, and broadcast dimensions have stride 0. Only more than two batch dimensions, or shared
dimensions that do not merge, cost a copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDEX_LIMIT = 2**31 - 2**16  # tokens and slots are counted in int32, and a block may reach past the end


class Sizes(NamedTuple):
    """What a kernel counts: tokens of all folded dimensions, slots, columns of keys and values, the second batch
    dimension; and T where dimensions are folded in front of it, else None."""

    T: int
    N: int
    K: int
    V: int
    B1: int
    inner: int | None


class Call:
    """The leading dimensions of one call of ``op``.

    tokens, memory: ``(name, tensor or None, trailing sizes)`` of every argument; a size None may be anything. Raises
    RuntimeError where a tensor does not fit: kernels never see shapes that contradict one another.
    """

    def __init__(self, op: str, tokens: Sequence[tuple], memory: Sequence[tuple]) -> None:
        self.op = op
        token_leads = [self._lead(*item) for item in tokens if item[1] is not None]
        memory_leads = [self._lead(*item) for item in memory if item[1] is not None]
        first = next(item[1] for item in (*tokens, *memory) if item[1] is not None)
        self.device = first.device
        for name, tensor, _ in (*tokens, *memory):
            self.require(tensor is None or tensor.device == self.device, f"{name} must be on {self.device}")
        self.whole = torch.broadcast_shapes(*token_leads, *memory_leads)
        self.memory = torch.broadcast_shapes(*memory_leads) if memory_leads else self.whole
        rank = len(self.whole)
        own = (1,) * (rank - len(self.memory)) + tuple(self.memory)
        self.shared = [d for d in range(rank) if own[d] == 1 and self.whole[d] != 1]
        self.kept = [d for d in range(rank) if d not in self.shared]
        sizes = [self.whole[d] for d in self.kept if self.whole[d] != 1]
        self.batches = (1, 1, *sizes)[-2:] if len(sizes) <= 2 else (math.prod(sizes[:-1]), sizes[-1])
        self.B = math.prod(sizes)
        self.F = math.prod(self.whole[d] for d in self.shared)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"{self.op}: {what}")

    def require_on_device(self, holds: Tensor, what: str) -> None:
        """Fail on the device, without a synchronisation, where ``holds``, one bool, is False."""
        torch._assert_async(holds, f"{self.op}: {what}")

    def flat(self, name: str, x: Tensor | None, *sizes: int | None) -> Tensor | None:
        """An argument without leading dimensions, ``sizes`` as those of tails, whose last dimension is contiguous."""
        if x is None:
            return None
        self.require(x.device == self.device, f"{name} must be on {self.device}")
        self.require(self._lead(name, x, sizes) == (), f"{name} must have {len(sizes)} dimensions, got {x.dim()}")
        return unit_last(x)

    def floats(self, *tensors: Tensor | None) -> None:
        """All given tensors are float32, bfloat16 or float16."""
        for t in tensors:
            self.require(t is None or t.dtype in FLOATS, "tensors must be float32, bfloat16 or float16")

    def stats(self, *tensors: Tensor | None) -> None:
        """All given tensors are float32: statistics are kept in it."""
        for t in tensors:
            self.require(t is None or t.dtype == torch.float32, "lse, usage, retained and their like must be float32")

    def compressed(self, name: str, x: Tensor, scale: Tensor | None) -> None:
        """``x`` is floats, or has 8 bits and a ``scale`` per slot."""
        if x.dtype in (torch.int8, torch.float8_e4m3fn):
            self.require(scale is not None, f"{name} in 8 bits must have a scale")
        else:
            self.floats(x)
            self.require(scale is None, f"{name} must be int8 or float8_e4m3fn beside a scale")
        self.stats(scale)

    def mask(self, slot_mask: Tensor | None) -> None:
        """A mask is bool or float."""
        self.require(slot_mask is None or slot_mask.dtype in (torch.bool, *FLOATS), "slot_mask must be bool or float")

    def ranges(self, slot_range: Tensor | None) -> None:
        """Ranges of slots are int64."""
        fits = slot_range is None or slot_range.dtype == torch.int64
        self.require(fits, "slot_range must be int64")

    def _lead(self, name: str, tensor: Tensor, tail: tuple) -> tuple[int, ...]:
        shape, n = tuple(tensor.shape), len(tail)
        self.require(tensor.layout == torch.strided, f"{name} must be a dense tensor")
        fits = len(shape) >= n and all(w in (None, s) for s, w in zip(shape[len(shape) - n :], tail))
        self.require(fits, f"{name} must be [..., {', '.join(map(str, tail))}], got {list(shape)}")
        return shape[: len(shape) - n]

    def token_view(self, x: Tensor, tail: int, copy: bool = True) -> Tensor:
        """``x [..., T, (tail axes)]`` as ``[B0, B1, F, T, (tail axes)]``. copy=False: RuntimeError, no copy."""
        x = x.resolve_neg()
        split = x.dim() - tail - 1
        x = x.expand(*self.whole, *x.shape[split:]).permute(
            *self.kept, *self.shared, *range(len(self.whole), len(self.whole) + tail + 1)
        )
        shape = (*self.batches, self.F, *x.shape[len(self.whole) :])
        return x.reshape(shape) if copy else x.view(shape)

    def memory_view(self, x: Tensor, tail: int) -> Tensor:
        """``x [..., N, (tail axes)]`` as ``[B0, B1, N, (tail axes)]``."""
        x = x.resolve_neg()
        lead = x.shape[: x.dim() - tail - 1]
        rank = len(self.whole)
        lead = (1,) * (rank - len(lead)) + tuple(lead)
        rest = x.shape[x.dim() - tail - 1 :]
        x = x.reshape(*(lead[d] for d in self.kept), *rest)  # dimensions that the memory lacks have size 1: dropped
        return x.expand(*(self.whole[d] for d in self.kept), *rest).reshape(*self.batches, *rest)

    @contextlib.contextmanager
    def target(self, values: Tensor) -> Iterator[Tensor]:
        """Memory rows ``[..., N, D]`` as kernels may write them: ``values``, or a copy that is copied back."""
        own = tuple(values.shape[:-2]) == tuple(self.memory)
        self.require(own, "values must have all leading dimensions of the memory")
        spread = any(size > 1 and stride == 0 for size, stride in zip(values.shape, values.stride()))
        self.require(not spread, "values must not be expanded")
        lie = values.numel() == 0 or same_memory(self.slots(values)[0], values)
        target = values if lie else values.contiguous()
        yield target
        if target is not values:
            values.copy_(target)

    def sizes(self, T: int, N: int, K: int, V: int) -> Sizes:
        """Of a kernel on T tokens in each folded dimension."""
        return Sizes(self.F * T, N, K, V, self.batches[1], T if self.F > 1 else None)

    def rows(self, x: Tensor | None) -> tuple | None:
        """Token rows ``[..., T, D]`` for a kernel: ``(tensor, stride of B0, of B1, of F, of T)``."""
        if x is None:
            return None
        view = self.token_view(unit_last(x), 1)
        return (view, *view.stride()[:4])

    def numbers(self, x: Tensor | None) -> tuple | None:
        """Token numbers ``[..., T]`` for a kernel: ``(tensor, stride of B0, of B1, of F, of T)``."""
        if x is None:
            return None
        view = self.token_view(x, 0)
        return (as_bytes(view), *view.stride())

    def slots(self, x: Tensor | None) -> tuple | None:
        """Memory rows ``[..., N, D]`` for a kernel: ``(tensor, stride of B0, of B1, of N)``."""
        if x is None:
            return None
        view = self.memory_view(unit_last(as_bytes(x)), 1)
        return (view, *view.stride()[:3])

    def slot_numbers(self, x: Tensor | None) -> tuple | None:
        """Memory numbers ``[..., N]`` for a kernel: ``(tensor, stride of B0, of B1, of N)``."""
        if x is None:
            return None
        view = self.memory_view(x, 0)
        return (as_bytes(view), *view.stride())

    def token_result(self, *tail: int, dtype: torch.dtype, fill: float | None = None) -> tuple[Tensor, Tensor]:
        """A new tensor ``[*whole, *tail]`` and its view ``[B0, B1, F, T, ...]``; see :meth:`store`."""
        shape = (*self.whole, *tail)
        out = torch.empty(shape, dtype=dtype, device=self.device) if fill is None else self._full(shape, fill, dtype)
        try:
            return out, self.token_view(out, len(tail) - 1, copy=False)
        except RuntimeError:  # shared dimensions between batch dimensions that do not merge
            return out, torch.empty((*self.batches, self.F, *tail), dtype=dtype, device=self.device)

    def _full(self, shape, fill, dtype):
        return torch.full(shape, fill, dtype=dtype, device=self.device)

    def store(self, out: Tensor, view: Tensor) -> Tensor:
        """``out`` of :meth:`token_result` after a kernel has filled ``view``."""
        if out.numel() and not same_memory(out, view):
            sizes = [self.whole[d] for d in (*self.kept, *self.shared)]
            order = [*self.kept, *self.shared]
            tail = view.shape[3:]
            back = [order.index(d) for d in range(len(order))]
            out.copy_(view.reshape(*sizes, *tail).permute(*back, *range(len(order), len(order) + len(tail))))
        return out

    def memory_result(self, *tail: int, dtype: torch.dtype, fill: float | None = None) -> Tensor:
        """A new contiguous tensor ``[*memory, *tail]``; kernels see it as ``[B, *tail]``."""
        shape = (*self.memory, *tail)
        return torch.empty(shape, dtype=dtype, device=self.device) if fill is None else self._full(shape, fill, dtype)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


class Gradient:
    """The gradient of one argument: what a kernel writes (all leading dimensions), and what is handed back.

    Where the argument was broadcast, kernels write float32 for every place and the sum over places follows, in torch's
    fixed order.
    """

    def __init__(self, call: Call, argument: Tensor | None, wanted: bool, side: str, *tail: int) -> None:
        wanted = wanted and argument is not None and argument.dtype != torch.bool
        self.call, self.argument, self.side, self.wanted = call, argument, side, wanted
        self.out = self.view = None
        if not wanted:
            return
        lead = call.whole if side == "tokens" else call.memory
        alone = argument.numel() == math.prod(lead) * math.prod(tail)
        dtype = argument.dtype if alone else torch.float32
        if side == "tokens":
            self.out, self.view = call.token_result(*tail, dtype=dtype)
        else:
            self.out = self.view = call.memory_result(*tail, dtype=dtype)

    def rows(self) -> tuple | None:
        """For a kernel: ``(tensor, strides)`` as ``Call.rows`` or ``Call.slots`` give them, or None."""
        if not self.wanted:
            return None
        if self.side == "tokens":
            return (self.view, *self.view.stride()[:4])
        inner = math.prod(self.view.shape[len(self.call.memory) :])
        return (self.view, self.call.batches[1] * inner, inner, inner // max(self.view.shape[len(self.call.memory)], 1))

    def fill(self, value: float) -> None:
        """For calls in which no kernel runs."""
        if self.wanted:
            self.view.fill_(value)

    def result(self) -> Tensor:
        if not self.wanted:
            like = self.argument
            return torch.empty(0, dtype=torch.float32 if like is None else like.dtype, device=self.call.device)
        out = self.call.store(self.out, self.view) if self.side == "tokens" else self.out
        if out.shape != self.argument.shape:
            out = out.sum_to_size(self.argument.shape)
        return out.to(self.argument.dtype)


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether one is a view of the other."""
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def unit_last(x: Tensor) -> Tensor:
    """``x`` with a last dimension that is contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def as_bytes(x: Tensor) -> Tensor:
    """Bool and float8 as uint8, which kernels load on any GPU."""
    return x.view(torch.uint8) if x.dtype in (torch.bool, torch.float8_e4m3fn) else x


def allows_tf32() -> bool:
    """Whether torch may multiply float32 matrices in TF32.

    ``fp32_precision`` knows of ``set_float32_matmul_precision`` and of ``allow_tf32`` too, whose own getters raise once
    somebody has set ``fp32_precision``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(*tensors: Tensor) -> str:
    """How a kernel multiplies float32 matrices: as torch is told to."""
    return "tf32" if any(t.dtype == torch.float32 for t in tensors) and allows_tf32() else "ieee"
