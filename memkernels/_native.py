"""Finds and loads the native operator library and the host module; says in one sentence when it cannot."""

from __future__ import annotations

from pathlib import Path

import torch

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
LIBRARY = Path(__file__).parent / "_lib" / "libmemkernels_cpu.so"


def _load() -> str | None:
    if not LIBRARY.exists():
        return "its native library is not built (pip install . builds it)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"its native library does not load with torch {torch.__version__}: {error}"
    return None


# Settled at import: a constant to torch.compile, which cannot trace a look at the file system.
_reason = _load()


def missing() -> str | None:
    """Why the operators of the ``cpu`` backend are not there, or None when they are."""
    return _reason


def host():
    """The torch-free module ``memkernels._host``: processor features, cache sizes and measured ceilings."""
    from . import _host

    return _host
