"""Finds and loads the native operator library and the host module; says in one sentence when it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from . import _stamp

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
NAME = "libmemkernels_cpu.so"
PACKAGE = Path(__file__).resolve().parent


def _find() -> tuple[Path, str | None]:
    """The folder of the native libraries, and the reason if none can be used.

    Python that runs in a checkout imports the checkout and not the installed package. If the checkout is not built,
    the libraries of the installed package are used, provided that they were built from the same sources.
    """
    own = PACKAGE / "_lib"
    checkout = PACKAGE.parent
    if (own / NAME).exists() or not (checkout / "csrc").is_dir():
        return own, "pip install . in a checkout builds it"
    folders = (Path(entry or ".").resolve() / "memkernels" / "_lib" for entry in sys.path)
    installed = next((folder for folder in folders if (folder / NAME).exists()), None)
    if installed is None:
        return own, "make dev builds it"
    stamp = installed / _stamp.FILE
    if stamp.exists() and stamp.read_text() == _stamp.stamp(checkout):
        return installed, None
    return own, f"make dev builds it; the one in {installed} is of other sources than this checkout"


FOLDER, _how = _find()
LIBRARY = FOLDER / NAME


def _load() -> str | None:
    if not LIBRARY.exists():
        return f"its native library is not built ({_how})"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"its native library does not load with torch {torch.__version__}: {error}"
    return None


# Evaluated at import: torch.compile sees a constant. It cannot trace access to the file system.
_reason = _load()


def missing() -> str | None:
    """Why the operators of the ``cpu`` backend are unavailable, or None when they are available."""
    return _reason


def processor() -> dict[str, Any]:
    """What the loaded library says of the processor: its name, cores, caches in bytes and usable features."""
    facts = dict(line.partition(" ")[::2] for line in torch.ops.memkernels_cpu.processor().splitlines())
    return {
        "name": facts["name"],
        "cores": int(facts["cores"]),
        "caches": {name: int(facts[name]) for name in ("l1d", "l2", "l3", "line")},
        "features": facts["features"].split(),
    }


def host():
    """The torch-free module ``memkernels._host``: processor features, cache sizes and measured ceilings."""
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(f"memkernels._host is not built for Python {version}: make dev builds it") from error
    return _host
