"""Finds and loads the library of the CUDA kernels where a GPU can run it; says in one sentence when it cannot."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from . import _native

# The variable names another build of the library: the rehearsal without a GPU sets it (bench/gpu).
LIBRARY = Path(os.environ.get("MEMKERNELS_CUDA_LIBRARY") or _native.FOLDER / "libmemkernels_cuda.so")
# Path of a library of the same kernels compiled for the CPU, which the tests set (tests/simt).
ON_HOST = os.environ.get("MEMKERNELS_CUDA_ON_HOST")
DEVICES = ("cpu",) if ON_HOST else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    if ON_HOST:
        torch.ops.load_library(ON_HOST)
        return None
    if not LIBRARY.exists():
        return "its native library is not built (MEMKERNELS_CUDA=1 pip install . builds it where nvcc is)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.device_count() == 0:
        return "there is no NVIDIA GPU here, or its driver is missing or too old for this torch"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"its native library does not load with torch {torch.__version__}: {error}"
    return torch.ops.memkernels_cuda.why_not() or None


def _allows_tf32() -> bool:
    # torch.set_float32_matmul_precision and allow_tf32 set this, too.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Evaluated at import, so that torch.compile sees a constant.
_reason = _load()
if _reason is None:
    # The kernels call this operator at run time, because the C shim of torch has no function for it.
    _questions = torch.library.Library("memkernels_cuda", "FRAGMENT")
    _questions.define("allows_tf32() -> bool")
    _questions.impl("allows_tf32", _allows_tf32, "CompositeExplicitAutograd")


def missing() -> str | None:
    """Why the operators of the ``cuda`` backend are unavailable, or None when they are available."""
    return _reason
