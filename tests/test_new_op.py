"""An op that is being added, as CONTRIBUTING.md says: tests pass at every step, in a copy of this checkout.

Its files are those of tests/new_op: at first the formula alone, then a CPU kernel for the forward direction, then both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from bench.cuda_check import cmake
from memkernels import _native

NAME = "decay_read"
SOURCES = ROOT / "tests" / "new_op"
# Where the files of an op lie.
FORMULA = {"decay_read.py": "memkernels/ops/decay_read.py"}
KERNELS = {
    "params.h": "csrc/params/decay_read.h",
    "kernel.cpp": "csrc/cpu/decay_read.cpp",
    "binding.cpp": "csrc/binding/decay_read.cpp",
}
# Objects that a library needs beside the kernels of its ops. The other ops are in the library of this checkout.
RUNTIME = {"binding", "choose_isa", "place", "processor", "threads"}
# Tests that go over all ops in one test.
OVER_ALL = (
    "every_op_is_here or every_op_has_backward or every_op_and_nothing or every_op_declares or every_public_function "
    "or every_case_is_taken or every_gap or reason_for_an_op or fake_tensors"
)
SLOW_OVER_ALL = "generated_blocks or the_rounds_are or the_smoke_is"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy with the formula of the new op, and its lines in ops/__init__.py."""
    copy = tmp_path_factory.mktemp("new_op") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
    _put(copy, FORMULA)
    index = copy / "memkernels" / "ops" / "__init__.py"
    text = index.read_text()
    text = text.replace("\nfrom .gated_scan", f"\nfrom .{NAME} import {NAME}\nfrom .gated_scan")
    index.write_text(text.replace('    "gated_scan",\n', f'    "{NAME}",\n    "gated_scan",\n'))
    return copy


def _put(copy: Path, places: dict[str, str]) -> None:
    for name, place in places.items():
        shutil.copy(SOURCES / name, copy / place)


def _build(copy: Path, without: str = "") -> None:
    """A native library with the new op, without its operator ``without``, and beside it the ops of this checkout."""
    _put(copy, KERNELS)
    for source in (copy / "csrc").rglob("*.cpp"):
        if source.stem not in {NAME, *RUNTIME}:
            source.unlink()
    if without:
        binding = copy / KERNELS["binding.cpp"]
        kept = [line for line in binding.read_text().splitlines() if f'MK_OPERATOR(m, "{without}"' not in line]
        binding.write_text("\n".join(kept) + "\n")
    torch_dir = Path(torch.__file__).parent
    flags = f"-Wl,--no-as-needed {_native.LIBRARY}"  # loaded together with it
    options = ["-DMEMKERNELS_HOST=OFF", f"-DTORCH_DIR={torch_dir}", f"-DCMAKE_MODULE_LINKER_FLAGS={flags}"]
    cmake(copy, copy / "build", "memkernels_cpu", *options)
    target = copy / "memkernels" / "_lib" / _native.NAME
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)  # another process may have it loaded
    shutil.copy(copy / "build" / _native.NAME, target)


def _tests(copy: Path, over_all: str) -> set[str]:
    """Run the tests of the new op and those that go over all ops; return the names of the former that passed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    # The library with the new op has a switch of its own that fills new memory, and no operator for it.
    chosen = f"({NAME} and not poisoned) or {over_all}"
    options = ["-rA", "--no-header", "-p", "no:cacheprovider", "-k", chosen]
    command = [sys.executable, "-m", "pytest", "tests", *options]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return set(re.findall(rf"^PASSED tests/test_(\w+\.py::\w+\[.*{NAME}.*\])", done.stdout, re.MULTILINE))


def _ran(passed: set[str], file: str, on: str) -> bool:
    return any(name.startswith(f"{file}.py") and on in name for name in passed)


def test_with_the_formula_alone(checkout):
    passed = _tests(checkout, f"{OVER_ALL} or {SLOW_OVER_ALL}")
    assert _ran(passed, "grid", on="reference") and not _ran(passed, "grid", on="cpu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_with_a_kernel_for_one_direction(checkout):
    _build(checkout, without=f"{NAME}_backward")
    passed = _tests(checkout, OVER_ALL)
    assert _ran(passed, "grid", on="cpu") and not _ran(passed, "torch", on="cpu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_with_kernels_for_both(checkout):
    _build(checkout)
    passed = _tests(checkout, OVER_ALL)
    assert all(_ran(passed, file, on="cpu") for file in ("grid", "torch", "determinism", "hostile", "gradients"))
