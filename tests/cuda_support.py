"""Builds the CUDA kernels for the CPU (tests/simt) and runs the contract grid on them."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT, run_python

from bench.cuda_check import cmake, tool

NAME = "libmemkernels_simt.so"
# In the CUDA build (make cuda), tests are larger, seed faults, and build under the address sanitizer.
WHOLE = os.environ.get("MEMKERNELS_CUDA") == "1"
whole = pytest.mark.skipif(not WHOLE, reason="make cuda seeds faults and builds under the address sanitizer")
ONE_IN = int(os.environ.get("MEMKERNELS_FAULTS") or 1)  # CI seeds one fault in so many (make cuda FAULTS=)
can_run = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the SIMT machine switches fibers on x86-64 only"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here"),
]
GRID = """
import json, sys
from memkernels.testing import check
rows = [r for op in sys.argv[1].split(",") for d in sys.argv[2].split(",")
        for r in check(op, "cuda", d, quick=sys.argv[3] == "quick")]
print(json.dumps([len(rows), [str(r) for r in rows if not r.passed]]))
"""
CASES = """
import json, sys
import torch
from memkernels.registration import OPS
from memkernels.testing.cases import Case
from memkernels.testing.grid import Subject

rows, op = [], OPS[sys.argv[1]]
for case in json.loads(sys.argv[2]):
    sizes = dict(zip("TNKVkH", case.pop("sizes")))
    lead = {"tokens": tuple(case.pop("tokens", (2,))), "memory": tuple(case.pop("memory", (2,)))}
    for dtype in sys.argv[3].split(","):
        for mixed in (False, True) if dtype != "float32" else (False,):
            this = Case(f"{sizes} {case}", sizes=sizes, mixed=mixed, **lead, **case)
            if not mixed or Case("", ("mixed",)).fits(op):
                rows += Subject(op, this, getattr(torch, dtype), "cpu").rows("cuda", sys.argv[4:])
print(json.dumps([str(r) for r in rows if not r.passed]))
"""
DTYPES = ("float32", "bfloat16", "float16")


def seeded(faults: dict) -> list[str]:
    """The faults that this run seeds: each compiles a kernel again and runs its cases."""
    return list(faults)[::ONE_IN]


def ops() -> list[str]:
    """The ops that have CUDA kernels: those of the bindings that csrc/cuda/sources.cmake finds."""
    found = []
    for kernel in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        binding = ROOT / "csrc" / "binding" / f"{kernel.stem}.cpp"
        if binding.exists():
            found += re.findall(r'MK_OPERATOR\(m, "(\w+)_backward"', binding.read_text())
    return [op for op in found if not op.endswith("_compressed")]


@functools.cache
def library(sanitize: str = "", target: str = "memkernels_simt") -> Path:
    """The kernels for the CPU, or another target. Built once, and again only where sources changed."""
    folder = ROOT / "build" / f"simt{'-' + sanitize if sanitize else ''}"
    cmake(ROOT / "tests" / "simt", folder, target, f"-DMEMKERNELS_SANITIZE={sanitize}")
    return folder / (NAME if target == "memkernels_simt" else target)


def broken(folder: Path, file: str, old: str, new: str, kernel: str, sanitize: str = "") -> Path:
    """The library with one fault: ``old`` in ``file`` is ``new`` where the source of ``kernel`` is compiled."""
    built = library(sanitize).parent
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (changed,) = (folder / "csrc" / "cuda").rglob(file)
    text = changed.read_text()
    assert text.count(old) == 1, f"{file} must contain the text of this fault once: {old!r}"
    changed.write_text(text.replace(old, new))
    command = [tool("ninja"), "-t", "commands", "memkernels_simt"]
    commands = subprocess.run(command, cwd=built, capture_output=True, text=True, check=True).stdout.splitlines()
    compile_one = next(c for c in commands if c.endswith(f"/{kernel}"))
    intact, part = compile_one.split(" -o ")[1].split()[0], folder / "broken.o"
    compile_one = compile_one.split(" -MD ")[0].replace(str(ROOT / "csrc"), str(folder / "csrc"))
    # First among the objects, because the linker keeps the first copy of an inline function.
    link = commands[-1].replace(intact, "").replace(f"-o {NAME}", f"-o {folder / NAME} {part}")
    (source,) = (folder / "csrc" / "cuda").rglob(kernel)
    for command in (f"{compile_one} -o {part} -c {source}", link):
        subprocess.run(command, shell=True, cwd=built, check=True)
    return folder / NAME


def grid(built: Path, op: str, dtypes: str = "float32", extent: str = "quick", **environment: str):
    """Runs the grid in a process of its own."""
    return on_host(built, GRID, op, dtypes, extent, **environment)


def asan_environment() -> dict[str, str]:
    """What a process needs that loads a library built under the address sanitizer."""
    # With the C++ runtime, because the sanitizer must find its function that throws.
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return {
        "LD_PRELOAD": " ".join(paths),
        # An allocation that is too large fails as without the sanitizer: torch raises.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    }


def on_host(built: Path, code: str, *args: str, **environment: str):
    """Runs ``code`` where the CUDA backend is ``built``, in a process of its own."""
    environment = {"MEMKERNELS_CUDA_ON_HOST": str(built), "OMP_NUM_THREADS": "1", **environment}
    return run_python(code, *args, timeout=1800, **environment)


def failures(done) -> list[str]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows, failed = json.loads(done.stdout.splitlines()[-1])
    assert rows
    return failed


def run_cases(built: Path, op: str, cases: list[dict], dtypes=DTYPES, directions=(), **environment: str):
    """Runs ``op`` in cases of the contract grid's form; ``sizes`` are T, N, K, V, k and H, in this order."""
    return on_host(built, CASES, op, json.dumps(cases), ",".join(dtypes), *directions, **environment)


def wrong(built: Path, op: str, cases: list[dict], **environment: str) -> list[str]:
    """What is wrong in these cases, in every dtype and direction."""
    done = run_cases(built, op, cases, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def is_noticed(done) -> bool:
    """Does a run over a library with a fault fail: by a wrong result, or by an error of the SIMT runtime?"""
    if done.returncode != 0:
        assert "simt: block" in done.stderr, done.stderr[-4000:]
        return True
    return bool(json.loads(done.stdout.splitlines()[-1]))
