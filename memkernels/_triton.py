"""Finds the Triton kernels and registers them; says in one sentence when it cannot. Triton itself is not imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

# Triton's interpreter runs the kernels on CPU tensors, for tests; Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cpu",) if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _beside() -> None:
    """In a checkout the kernels are beside this package, not in it: make them a lazily imported submodule."""
    name = f"{__package__}.triton_kernels"
    folder = Path(__file__).resolve().parent.parent / "triton_kernels"
    if importlib.util.find_spec(name) is not None or not folder.is_dir():
        return
    within = [str(folder)]
    found = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=within)
    assert found is not None and found.loader is not None
    found.loader = importlib.util.LazyLoader(found.loader)
    package = sys.modules[name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(package)
    vars(sys.modules[__package__])["triton_kernels"] = package  # as an import statement does


_beside()


def kernels():
    """The package of the kernels."""
    return importlib.import_module(f"{__package__}.triton_kernels")


def _load() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not INTERPRETED and torch.cuda.device_count() == 0:
        return "there is no CUDA device here"
    _libraries.append(kernels().register("cpu" if INTERPRETED else "cuda"))
    return None


_libraries: list[torch.library.Library] = []  # keeps the registered kernels alive
# Evaluated at import, so that torch.compile sees a constant.
_reason = _load()


def missing() -> str | None:
    """Why the operators of the ``triton`` backend are unavailable, or None when they are available."""
    return _reason
