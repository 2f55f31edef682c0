"""Finds and loads the native operator library and the processor module; says in one sentence when it cannot."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

ISAS = ("baseline", "avx2", "avx512")


@functools.cache
def missing() -> str | None:
    """Load the operators of the ``cpu`` backend once; the reason when that failed, else None."""
    path = Path(__file__).parent / "_lib" / "libmemkernels_cpu.so"
    if not path.exists():
        return "its native library is not built (pip install . builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"its native library does not load with torch {torch.__version__}: {error}"
    return None


@functools.cache
def host():
    """The torch-free module ``memkernels._host``: processor features, cache sizes and measured ceilings."""
    from . import _host

    return _host


def library_path() -> Path:
    return Path(__file__).parent / "_lib" / "libmemkernels_cpu.so"


def forced_isa() -> str | None:
    """The instruction set asked for through ``MEMKERNELS_CPU_ISA``, if any."""
    return os.environ.get("MEMKERNELS_CPU_ISA") or None
