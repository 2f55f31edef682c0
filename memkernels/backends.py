"""Which implementation runs a call. The only selection code of the library.

A backend is one row of ``BACKENDS``: the namespace of its torch operators, the devices it serves, and a reason why it
cannot run at all, if there is one. What it has is read off the dispatcher, never listed by hand. ``auto`` takes the
first row that can run the call; on a GPU the faster one comes first, as far as that was measured (``fastest.json``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _cuda, _native, _torch, _triton
from .spec import FLOATS

DIRECTIONS = ("forward", "backward")
_SUFFIXES = {"forward": "", "backward": "_backward", "in-place": "_"}


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

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it has kernels for calls of ``dtype``; those on integers need no float at all."""
        return dtype in self.dtypes or dtype == torch.int64

    def gap(self, op: str, device: str, dtype: torch.dtype | None = None, direction: str = "forward") -> str | None:
        """The one sentence that says why this backend cannot run ``op`` there, or None when it can."""
        if (why := self.missing()) is not None:
            return f"{op}: backend {self.name!r} is not available: {why}"
        if device not in self.devices:
            return f"{op}: backend {self.name!r} runs on {' and '.join(self.devices)}, got tensors on {device}"
        if dtype is not None and not self.takes(dtype):
            return f"{op}: backend {self.name!r} has no kernel for {str(dtype).removeprefix('torch.')}"
        if (f"{self.namespace}::{op}{_SUFFIXES[direction]}", device) not in _kernels:
            return f"{op}: backend {self.name!r} has no {direction} kernel on {device}"
        return None


# Operators with a kernel, by (qualified name, device): read off the dispatcher once, when an op registers, so that
# choosing a backend is a look-up that torch.compile can trace.
_kernels: set[tuple[str, str]] = set()


def note_kernels(qualified: str) -> None:
    """Remember on which devices the operator ``qualified`` has a kernel."""
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if _torch.has_kernel(qualified, key):
            _kernels.add((qualified, device))


# In order of preference; on a GPU see ``_order``. "reference" is not a row: it is the formula and runs anywhere.
BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", ("cpu",), _native.missing),
    Backend("triton", _triton.DEVICES, _triton.missing, _triton.DTYPES),
    Backend("cuda", _cuda.DEVICES, _cuda.missing, _cuda.DTYPES),
)

_BY_NAME = {b.name: b for b in BACKENDS}
NAMES = ("auto", "reference", *_BY_NAME)

FASTEST = Path(__file__).with_name("fastest.json")  # written by python -m bench.fastest
FEW = 16  # with at most this many tokens per memory, a call is bound by latency or bandwidth


@functools.cache
def measured() -> dict[tuple[str, str, int, bool], str]:
    """(op, compute capability, bits of an element, few tokens?) -> the backend that was the fastest."""
    return {(r["op"], r["capability"], r["bits"], r["few"]): r["backend"] for r in json.loads(FASTEST.read_text())}


@_torch.constant
def _first(op: str, bits: int, few: bool) -> str:
    """The backend to try first on this GPU.

    Where nothing was measured, few tokens go to ``cuda``, whose kernels stream a memory and need no compilation at the
    first call. Many tokens go to ``triton``, which compiles for the matrix unit of this GPU.
    """
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return measured().get((op, capability, bits, few), "cuda" if few else "triton")


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


_DEFAULT = _named(os.environ.get("MEMKERNELS_BACKEND") or "auto")


class _Block:
    """One ``with use_backend(...)`` block: the frame that contains it, and whether that frame is of a generator."""

    __slots__ = ("name", "frame", "in_generator")

    def __init__(self, name: str):
        frame: Any = sys._getframe(1)
        while _is_driver(frame) or (_is_generator(frame) and _is_driver(frame.f_back)):
            frame = frame.f_back
        self.name, self.frame, self.in_generator = name, id(frame), _is_generator(frame)


def _is_generator(frame) -> bool:
    return bool(frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))


def _is_driver(frame) -> bool:
    """Does the frame run a generator as a context manager or fixture? Its blocks belong to whoever enters that."""
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("contextlib", "_pytest")


# The blocks that this thread or task is in, the innermost last.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("memkernels_backend", default=())
_traced: list[str] = []  # blocks in code that torch.compile traces, which it can do for a list and not for a ContextVar


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on backend ``name``. Blocks nest; ``backend=`` on a call wins.

    A block holds for its own thread or asyncio task, and for tasks created in it. A new thread begins with
    ``MEMKERNELS_BACKEND``, or else ``"auto"``. A block in a generator holds while the generator runs, and not for
    its consumer. The backward pass of a call runs on the backend of the call. Compiled code is compiled anew for
    another backend.

    ``name``: ``"auto"``, ``"reference"``, or a row of ``python -m memkernels info``. Raises ValueError for another
    name.
    """
    if torch.compiler.is_dynamo_compiling():
        _traced.append(_named(name))
        try:
            yield
        finally:
            _traced.pop()
        return
    block = _Block(_named(name))
    # A generator that was closed in another context leaves a block without a frame: drop it.
    _blocks.set((*(b for b in _blocks.get() if b.frame), block))
    try:
        yield
    finally:
        if block.in_generator:
            block.frame = 0
        _blocks.set(tuple(b for b in _blocks.get() if b is not block))


def requested() -> str:
    """The backend that a call without ``backend=`` gets: innermost ``use_backend``, else ``MEMKERNELS_BACKEND``."""
    if torch.compiler.is_dynamo_compiling() and (_traced or _torch.can_guard()):
        return _traced[-1] if _traced else _torch.guarded(__name__, "requested")
    blocks = _blocks.get()
    if not blocks:
        return _DEFAULT
    for block in blocks:
        if block.in_generator:
            return _nearest(blocks)
    return blocks[-1].name


def _nearest(blocks: tuple[_Block, ...]) -> str:
    """The block of the innermost frame that has one. A suspended generator is not among the frames."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        for block in reversed(blocks):
            if block.frame == id(frame):
                return block.name
        frame = frame.f_back
    return next((b.name for b in reversed(blocks) if not b.in_generator), _DEFAULT)


def select(
    op: str, device: str, dtype: torch.dtype, name: str, few: bool = False, direction: str = "forward"
) -> Backend | None:
    """The backend for one call; None is the reference. A named backend that cannot run the call raises its reason.

    few: at most ``FEW`` tokens share a memory. direction: ``"forward"``; ``"backward"`` for a call that needs a
    gradient, and so both kernels; ``"in-place"``.
    """
    if _named(name) == "reference":
        return None
    if name == "auto":
        able = (b for b in _order(op, device, dtype, few) if _lacks(b, op, device, dtype, direction) is None)
        return next(able, None)
    if (why := _lacks(_BY_NAME[name], op, device, dtype, direction)) is not None:
        raise NotImplementedError(why)
    return _BY_NAME[name]


def _lacks(backend: Backend, op: str, device: str, dtype: torch.dtype, direction: str) -> str | None:
    why = backend.gap(op, device, dtype)
    return why if why is not None or direction == "forward" else backend.gap(op, device, dtype, direction)
