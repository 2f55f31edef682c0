"""What a benchmark case is: inputs, work, and goals. Free of timing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memkernels.registration import OPS

OWN = "memkernels"
MEMORY_LIMIT = 3 << 29  # bytes of all input sets of a case together
MAX_SETS = {"cpu": 8, "cuda": 16}


@dataclass(frozen=True)
class Goal:
    """One number to reach.

    kind: ``"ratio"`` (the fastest of those ``peers`` that run the case takes at least this many times as long; where
        none does it is not judged), ``"peak"``, ``"bandwidth"`` and, on a GPU, ``"copy"`` (share of the ceiling),
        ``"memory"`` (peak extra memory, at most this share of a [T, N] matrix).
    fast_bfloat16: judged only where bfloat16 dot products are faster than float32 multiply-adds.
    """

    kind: str
    value: float
    peers: tuple[str, ...] = ()
    fast_bfloat16: bool = False

    def text(self) -> str:
        if self.kind == "ratio":
            of = " and ".join(self.peers) if len(self.peers) < 3 else f"the best of {', '.join(self.peers)}"
            return f"{self.value:g}x {of}" if self.value >= 1 else f"at most {1 / self.value:g}x the time of {of}"
        if self.kind == "memory":
            return f"below 1/{1 / self.value:g} of [T, N]"
        ceiling = {"peak": "multiply-add peak", "bandwidth": "read bandwidth", "copy": "copy bandwidth"}
        return f"{self.value:.0%} of {ceiling[self.kind]}"


def ratio(value: float, *peers: str, fast_bfloat16: bool = False) -> Goal:
    return Goal("ratio", value, peers, fast_bfloat16)


def peak(value: float) -> Goal:
    return Goal("peak", value)


def bandwidth(value: float) -> Goal:
    return Goal("bandwidth", value)


def copy_bandwidth(value: float) -> Goal:
    return Goal("copy", value)


@dataclass(frozen=True)
class Case:
    """One row of the result.

    make: ``make(sizes, dtype, device, seed) -> {argument: tensor}``, the tensor arguments of the op.
    options: its other arguments.
    flops, bytes: of the sizes: multiply-adds (2 each) that an exact method needs, bytes that must cross the memory bus.
    grads: arguments that the backward is taken with respect to (direction ``"backward"``) or that require a gradient
        while the forward is timed (direction ``"forward"`` with ``autograd``).
    shared: arguments that all input sets have in common.
    sample: (axis, count): the float64 check covers that many tokens ("T") or slots ("N"); None checks everything.
    check: replaces the comparison with the reference; ``check(inputs, d_output, outputs) -> error``.
    measure: ``"time"`` in seconds or ``"memory"`` in bytes.
    in_place: the form of the op that writes into its first tensor is timed, without peers. ``make`` gives a memory
        of its own, and numbers with which a second call changes nothing.
    """

    op: str
    sizes: Mapping[str, int]
    quick: Mapping[str, int]
    make: Callable[..., dict[str, Tensor]]
    flops: Callable[[Mapping[str, int]], int]
    bytes: Callable[[Mapping[str, int], int], int]
    name: str = ""
    direction: str = "forward"
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    grads: tuple[str, ...] = ()
    autograd: bool = False
    shared: tuple[str, ...] = ()
    sample: tuple[str, int] | None = None
    check: Callable[..., float] | None = None
    measure: str = "time"
    in_place: bool = False
    devices: tuple[str, ...] = ("cpu",)

    def title(self, sizes: Mapping[str, int]) -> str:
        """The case at these sizes, in words."""
        return f"{self.name}, {size_text(sizes)}" if self.name else size_text(sizes)

    @property
    def needs_grad(self) -> bool:
        return self.autograd or self.direction == "backward"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def inputs(self, sizes: Mapping[str, int], device: str, cache_bytes: int) -> list[dict[str, Tensor]]:
        """Input sets to rotate through: several times the last-level cache where that is not too many or too much."""
        first = self.make(sizes, self.torch_dtype, device, seed=0)
        own = sum(t.nbytes for name, t in first.items() if name not in self.shared)
        count = min(math.ceil(4 * cache_bytes / max(own, 1)), MEMORY_LIMIT // max(own, 1), MAX_SETS[device])
        sets = [first]
        for seed in range(1, count):
            more = self.make(sizes, self.torch_dtype, device, seed=seed)
            sets.append({name: first[name] if name in self.shared else t for name, t in more.items()})
        return sets


def size_text(sizes: Mapping[str, int]) -> str:
    """``{"T": 1, "N": 1048576, "K": 64, "V": 64}`` -> ``"T=1 N=2^20 K=V=64"``."""

    def number(n: int) -> str:
        return f"2^{n.bit_length() - 1}" if n >= 1 << 17 and n & (n - 1) == 0 else str(n)

    merged = {k: v for k, v in sizes.items() if not (k == "V" and sizes.get("K") == v)}
    both = sizes.get("K") == sizes.get("V") and "K" in sizes
    return " ".join(f"{'K=V' if both and k == 'K' else k}={number(v)}" for k, v in merged.items())


def cost(op: str, direction: str = "forward", *, streams: str = "", **options: int) -> Callable[..., int]:
    """Operations of a call, as ``op`` declares them, of a case's sizes; ``streams``: the size that counts calls."""

    def flops(sizes: Mapping[str, int]) -> int:
        axes = {**sizes, **options, "h": sizes.get("K", 0) // 2}
        declared = OPS[op].flops if direction == "forward" else OPS[op].backward_flops
        return declared(axes) * (sizes[streams] if streams else 1)

    return flops


@functools.lru_cache(maxsize=4)
def _large(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Standard normal numbers. Large tensors are kept for the next case of the same shape: never write into one."""
    make = _large if math.prod(shape) >= 1 << 24 else _large.__wrapped__
    return make(shape, dtype, device, seed)
