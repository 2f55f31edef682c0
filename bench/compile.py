"""Compiles the Triton kernels that a call would launch, for an architecture, on a machine without a GPU.

The launchers run on meta tensors, as they do for every kind of call (``triton_kernels/replay.py``): what they note has
the very signature, constants and options that a launch on a GPU has.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from memkernels import _triton

from .compilation import MULTIPLY_ADDS, TARGETS, Build, Needs
from .launches import Launch, launches

_PACKAGE = _triton.kernels().__name__
configs, replay = (importlib.import_module(f"{_PACKAGE}.{name}") for name in ("configs", "replay"))

NOTHING: Mapping[str, Needs] = types.MappingProxyType({})


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched, and what its machine code needs."""

    key: str
    kernel: str
    arch: str
    dtype: str
    width: int
    constants: str
    row: tuple[str, str, int, int]  # of the table of configurations
    needs: Needs

    def faults(self) -> list[str]:
        """What must not be; empty when all is well."""
        found, needs = [], self.needs
        if needs.spills:
            found.append(f"{needs.spills} bytes spilled")
        limit = TARGETS[self.arch][1]
        if needs.shared > limit:
            found.append(f"{needs.shared} bytes of shared memory, above {limit}")
        if needs.matrix == MULTIPLY_ADDS and self.dtype != "float32":
            found.append("no matrix instruction")
        if needs.serialised:
            found.append("warp-group products are serialised")
        return found

    def __str__(self) -> str:
        what = f"sm_{self.arch} {self.dtype} {self.width} {self.kernel} ({self.constants})"
        n = self.needs
        return f"{what}: {n.registers} registers, {n.shared} bytes shared, {n.matrix or 'no products'}"


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(
    arch: str, dtype: str, width: int, only: tuple[str, ...] = (), known: Mapping[str, Needs] = NOTHING
) -> Iterator[Compiled]:
    """Everything that ``launches`` (those named in ``only``, or all) launch for one class.

    dtype: also ``"tf32"``. known: key of a build -> what it needs; others are compiled.
    """
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    seen = set()
    with _precision("high" if dtype == "tf32" else "highest"):
        for one in launches(kind, width, "meta"):
            if only and one.name not in only:
                continue
            for found in launched(one, arch):
                build = Build(found.build)
                if build.key not in seen:
                    seen.add(build.key)
                    needs, constants = known.get(build.key) or build.compile(), _words(found.constants)
                    yield Compiled(build.key, found.kernel, arch, dtype, width, constants, found.row, needs)


def launched(one: Launch, arch: str) -> list:
    """What a call on meta tensors launches on ``arch``, as ``triton_kernels/replay.py`` notes it."""
    with replay.Recording(arch, int(arch), torch.device("cuda", 0)) as recording:
        one.run()
    return recording.launches


def _words(constants: dict) -> str:
    shown = ("BLOCK", "num_", "maxnreg", "KIND", "GATE", "ERASE", "LIST", "PREC", "READ", "REVERSE", "MEASURE")
    return " ".join(f"{k.lower()}={v}" for k, v in constants.items() if k.startswith(shown))
