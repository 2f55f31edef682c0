"""Which implementation runs a call. The only selection code of the library.

A backend is one row of ``BACKENDS``: the namespace of its torch operators, the devices it serves, and a reason why it
cannot run at all, if there is one. What it has is read off the dispatcher, never listed by hand. ``auto`` takes the
first row that can run the call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


# In order of preference. On a GPU nothing has been measured yet: Triton comes first, because its products use the
# matrix units and those of the CUDA kernels do not. "reference" is not a row: it is the formula itself and runs
# anywhere.
BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", ("cpu",), _native.missing),
    Backend("triton", _triton.DEVICES, _triton.missing, _triton.DTYPES),
    Backend("cuda", _cuda.DEVICES, _cuda.missing, _cuda.DTYPES),
)

_BY_NAME = {b.name: b for b in BACKENDS}
NAMES = ("auto", "reference", *_BY_NAME)


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


def select(op: str, device: str, dtype: torch.dtype, name: str) -> Backend | None:
    """The backend for one call; None is the reference. A named backend that cannot run it raises its reason."""
    if _named(name) == "reference":
        return None
    if name == "auto":
        return next((b for b in BACKENDS if b.gap(op, device, dtype) is None), None)
    if (why := _BY_NAME[name].gap(op, device, dtype)) is not None:
        raise NotImplementedError(why)
    return _BY_NAME[name]
