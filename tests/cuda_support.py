"""Builds the CUDA kernels for the CPU (tests/simt) and runs the contract grid on them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import ROOT, run_python

GRID = """
import json, os, sys
from memkernels.testing import check
rows = [r for op in sys.argv[1].split(",") for d in sys.argv[2].split(",")
        for r in check(op, "cuda", d, quick=sys.argv[3] == "quick")]
print(json.dumps([len(rows), [str(r) for r in rows if not r.passed]]))
"""


def ops() -> list[str]:
    """The ops that have CUDA kernels, as the build lists them."""
    text = (ROOT / "csrc" / "cuda" / "sources.cmake").read_text()
    return text.split('set(CUDA_OPS "')[1].split('"')[0].split(";")


def build(folder: Path, *options: str) -> Path:
    """The library of the kernels for the CPU, built in ``folder``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tool = {name: shutil.which(name, path=path) for name in ("cmake", "ninja")}
    configure = [tool["cmake"], "-S", ROOT / "tests" / "simt", "-B", folder, "-G", "Ninja", *options]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool['ninja']}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    for command in (configure, [tool["cmake"], "--build", folder, "--parallel", jobs]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "libmemkernels_simt.so"


@functools.cache
def library(sanitize: str = "") -> Path:
    """Built once, and again only where sources changed."""
    return build(ROOT / "build" / f"simt{'-' + sanitize if sanitize else ''}", f"-DMEMKERNELS_SANITIZE={sanitize}")


def broken(folder: Path, file: str, old: str, new: str, op: str, kernels: tuple[str, ...], *options: str) -> Path:
    """The library with one fault: ``old`` in ``file`` replaced by ``new``, with the kernels of one op only."""
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    text = (copy / "cuda" / file).read_text()
    assert text.count(old) == 1, f"{file} must contain the text of this fault once: {old!r}"
    (copy / "cuda" / file).write_text(text.replace(old, new))
    for kernel in (copy / "cuda").glob("*.cu"):
        if kernel.stem not in kernels:
            kernel.unlink()
    return build(folder / "build", f"-DCSRC={copy}", f"-DCUDA_OPS={op}", *options)


def grid(built: Path, op: str, dtypes: str = "float32", extent: str = "quick", **environment: str):
    """Runs the grid in a process of its own."""
    environment = {"MEMKERNELS_CUDA_ON_HOST": str(built), "OMP_NUM_THREADS": "1", **environment}
    return run_python(GRID, op, dtypes, extent, timeout=1800, **environment)
