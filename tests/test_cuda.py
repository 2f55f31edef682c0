"""The CUDA backend as nvcc compiles it, read back without a GPU. tests/test_simt.py runs its kernels.

``python -m bench.cuda_check`` prints what these tests read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from bench import cuda_check
from memkernels import backends
from memkernels.registration import OPS

# Compiling for every GPU takes minutes: `make cuda` asks for it.
WHY = cuda_check.missing() or (None if os.environ.get("MEMKERNELS_CUDA") == "1" else "make cuda compiles for GPUs")
nvcc = pytest.mark.skipif(WHY is not None, reason=str(WHY))


@pytest.fixture(scope="module")
def library():
    return cuda_check.build()


@pytest.fixture(scope="module")
def kernels(library):
    return cuda_check.kernels(library)


@nvcc
def test_the_library_has_code_for_every_target(library, kernels):
    assert {kernel.target for kernel in kernels} == set(cuda_check.TARGETS)
    names = {target: {k.name for k in kernels if k.target == target} for target in cuda_check.TARGETS}
    assert len({len(found) for found in names.values()}) == 1, "a kernel is missing on some target"
    assert "sm_80" in cuda_check.read(library, "--list-ptx"), "there is no PTX for other GPUs"
    assert library.stat().st_size < 40 * 2**20


@nvcc
def test_kernels_stay_within_their_resources(kernels):
    """No registers spilled, no array on the stack, at least two blocks per SM, no static shared memory."""
    wrong = [(k.target, cuda_check.plain(k.name), fault) for k in kernels for fault in k.faults()]
    assert not wrong, "\n".join(map(str, wrong))


@nvcc
def test_the_library_takes_from_torch_only_the_c_shim(library):
    command = [shutil.which("nm") or "nm", "-D", "--undefined-only", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[-1] for line in lines]
    assert "aoti_torch_get_current_cuda_stream" in names
    headers = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in headers, "torch loads libtorch_cuda privately: its symbols are found by name alone"
    known = re.compile(r"^(aoti_)?torch_\w+$|@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_\w+|__gmon_start__|__cxa_finalize)$")
    assert not [n for n in names if not known.search(n)]


def test_info_says_why_it_is_not_used():
    row = next(b for b in backends.BACKENDS if b.name == "cuda")
    why = row.missing()
    assert why is None or (len(why) < 200 and "\n" not in why)
    for op in OPS:
        gap = row.gap(op, "cuda")
        assert gap is None or gap.startswith(f"{op}: backend 'cuda' ")
