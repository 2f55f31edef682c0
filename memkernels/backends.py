"""Which implementation runs a call. The only selection code of the library.

A backend is one row of ``BACKENDS``: the namespace of its torch operators, the devices it serves, and a reason why it
cannot run at all, if there is one. What it has is read off the dispatcher, never listed by hand. ``auto`` takes the
first row that can run the call; on a GPU the faster one comes first, as far as that was measured (``fastest.json``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _cuda, _native, _triton
from .spec import FLOATS

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Backend:
    """One row: ``devices`` it runs on, ``missing()`` says why it is not there at all (or None), ``dtypes`` it takes."""

    name: str
    devices: tuple[str, ...]
    missing: Callable[[], str | None]
    dtypes: tuple[torch.dtype, ...] = FLOATS

    @property
    def namespace(self) -> str:
        return f"memkernels_{self.name}"

    def gap(self, op: str, device: str, dtype: torch.dtype | None = None, direction: str = "forward") -> str | None:
        """The one sentence that says why this backend cannot run ``op`` there, or None when it can."""
        if (why := self.missing()) is not None:
            return f"{op}: backend {self.name!r} is not available: {why}"
        if device not in self.devices:
            return f"{op}: backend {self.name!r} runs on {' and '.join(self.devices)}, got tensors on {device}"
        if dtype is not None and dtype not in self.dtypes:
            return f"{op}: backend {self.name!r} has no kernel for {str(dtype).removeprefix('torch.')}"
        suffix = "" if direction == "forward" else "_backward"
        if (f"{self.namespace}::{op}{suffix}", device) not in _kernels:
            return f"{op}: backend {self.name!r} has no {direction} kernel on {device}"
        return None


# Operators with a kernel, by (qualified name, device): read off the dispatcher once, when an op registers, so that
# choosing a backend is a look-up that torch.compile can trace.
_kernels: set[tuple[str, str]] = set()


def note_kernels(qualified: str) -> None:
    """Remember on which devices the operator ``qualified`` has a kernel."""
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            _kernels.add((qualified, device))


# In order of preference; on a GPU see ``_order``. "reference" is not a row: it is the formula itself, runs anywhere.
BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", ("cpu",), _native.missing),
    Backend("triton", _triton.DEVICES, _triton.missing, _triton.DTYPES),
    Backend("cuda", _cuda.DEVICES, _cuda.missing, _cuda.DTYPES),
)

_BY_NAME = {b.name: b for b in BACKENDS}
NAMES = ("auto", "reference", *_BY_NAME)

FASTEST = Path(__file__).with_name("fastest.json")  # written by python -m bench.fastest
FEW = 16  # tokens that share a memory: up to so many, a call is bound by latency and bandwidth


@functools.cache
def measured() -> dict[tuple[str, str, int, bool], str]:
    """(op, compute capability, bits of an element, few tokens?) -> the backend that was the fastest."""
    return {(r["op"], r["capability"], r["bits"], r["few"]): r["backend"] for r in json.loads(FASTEST.read_text())}


def _first(op: str, bits: int, few: bool) -> str:
    """The backend to ask first on this GPU.

    Where nothing was measured: few tokens go to ``cuda``, whose kernels stream a memory and need no compilation at the
    first call; many to ``triton``, which compiles for the matrix unit of the very GPU.
    """
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return measured().get((op, capability, bits, few), "cuda" if few else "triton")


# As torch.compiler.assume_constant_result does, which would import the compiler here.
_first._dynamo_marked_constant = True


def _order(op: str, device: str, dtype: torch.dtype, few: bool) -> tuple[Backend, ...]:
    if device != "cuda":
        return BACKENDS
    bits = 8 * dtype.itemsize
    # Under torch.compile `few` may be symbolic: a branch makes it a constant, and a guard.
    first = _BY_NAME[_first(op, bits, True) if few else _first(op, bits, False)]
    return (first, *(b for b in BACKENDS if b is not first))


def _named(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_requested = [_named(os.environ.get("MEMKERNELS_BACKEND") or "auto")]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on backend ``name`` (process-wide, nests; ``backend=`` on a call wins).

    ``name``: ``"auto"``, ``"reference"``, or a row of ``python -m memkernels info``. Raises ValueError for another
    name.
    """
    _requested.append(_named(name))
    try:
        yield
    finally:
        _requested.pop()


def requested() -> str:
    """The backend that a call without ``backend=`` gets: innermost ``use_backend``, else ``MEMKERNELS_BACKEND``."""
    return _requested[-1]


def select(op: str, device: str, dtype: torch.dtype, name: str, few: bool = False) -> Backend | None:
    """The backend for one call, of a few tokens per memory or more; None is the reference. A named backend that cannot
    run it raises its reason."""
    if _named(name) == "reference":
        return None
    if name == "auto":
        return next((b for b in _order(op, device, dtype, few) if b.gap(op, device, dtype) is None), None)
    if (why := _BY_NAME[name].gap(op, device, dtype)) is not None:
        raise NotImplementedError(why)
    return _BY_NAME[name]
