"""The CUDA backend without a GPU: its kernels' own source on the CPU, and the compiled library.

The kernels compile for minutes, so these tests run where the CUDA build is asked for: ``make cuda``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from cuda_support import broken, grid, library, ops

from memkernels import _cuda, backends

pytestmark = pytest.mark.skipif(
    os.environ.get("MEMKERNELS_CUDA") != "1",
    reason="the CUDA backend is not built here (make cuda builds and tests it)",
)
DTYPES = "float32,bfloat16,float16"


def failures(done) -> list[str]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows, failed = json.loads(done.stdout.splitlines()[-1])
    assert rows
    return failed


@pytest.mark.parametrize("op", ops())
def test_kernels_equal_the_float64_reference(op):
    assert not failures(grid(library(), op, DTYPES, "full"))


@pytest.mark.parametrize("seed", ["2", "3", "4"])
def test_no_order_of_threads_changes_the_result(seed):
    """Threads go on in another order for every seed; what is not ordered by a barrier would show."""
    assert not failures(grid(library(), ",".join(ops()), MEMKERNELS_SIMT_SEED=seed))


def under_address_sanitizer(built, op):
    compiler = os.environ.get("CXX", "c++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return grid(built, op, DTYPES, LD_PRELOAD=runtime.stdout.strip(), ASAN_OPTIONS=options)


def test_no_address_is_wrong():
    assert not failures(under_address_sanitizer(library("address"), ",".join(ops())))


READ = ("softmax_read", ("softmax_read", "pairs"))
SEARCH = ("topk_search", ("topk_search", "sparse_read", "segments"))
FAULTS = {
    "removed barrier, read": ("softmax_read.cu", "      __syncthreads();\n      soften<Q>", "      soften<Q>", *READ),
    "removed barrier, search": (
        "topk_search.cu",
        "    __syncthreads();\n#pragma unroll\n    for (int n",
        "#pragma unroll\n    for (int n",
        *SEARCH,
    ),
    "wait for too few copies": (
        "softmax_read.cu",
        "wait_copies<kStages - 2>();\n    __syncthreads();",
        "wait_copies<kStages>();\n    __syncthreads();",
        *READ,
    ),
    "one slot too many": (
        "softmax_read.cu",
        "least(p.N, begin + plan.split_rows)",
        "least(p.N, begin + plan.split_rows + 1)",
        *READ,
    ),
    "unmasked tail": (
        "stream.h",
        "first + slot < end ? mask_at(mask, mask_base, first + slot) : -kInfinity",
        "mask_base == nullptr || first + slot < end ? mask_at(mask, mask_base, first + slot) : -kInfinity",
        *READ,
    ),
    "queue one place off": ("topk_search.cu", "queue[queued[n] + __popc", "queue[queued[n] + 1 + __popc", *SEARCH),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    file, old, new, op, kernels = FAULTS[fault]
    assert failures(grid(broken(tmp_path, file, old, new, op, kernels), op)), fault


def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(tmp_path):
    old, new = (
        "(Q * r.plan.padded + Q * r.plan.slots + 3 * Q) * 4",
        "(Q * r.plan.padded + Q * r.plan.slots + 2 * Q) * 4",
    )
    built = broken(tmp_path, "softmax_read.cu", old, new, *READ, "-DMEMKERNELS_SANITIZE=address")
    done = under_address_sanitizer(built, "softmax_read")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


# --- the compiled library ---

TARGETS = {"sm_80", "sm_90a", "sm_100", "sm_120"}


def resources() -> list[tuple[str, str, dict[str, int]]]:
    """(target, kernel, resources) of every kernel in the library."""
    assert _cuda.LIBRARY.exists(), "MEMKERNELS_CUDA=1 pip install . builds it"
    tool = shutil.which("cuobjdump")
    assert tool, "cuobjdump (CUDA toolkit) is needed to read the library"
    command = [tool, "--dump-resource-usage", _cuda.LIBRARY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, target = [], ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            target = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match.group(1)
        elif "REG:" in line:
            found.append((target, name, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}))
    return found


def test_the_library_has_code_for_every_target():
    assert {target for target, _, _ in resources()} == TARGETS
    assert _cuda.LIBRARY.stat().st_size < 40 * 2**20


def test_kernels_stay_within_their_resources():
    """No registers spilled to memory, at least two blocks to a processor, no static shared memory."""
    wrong = [
        (target, name, used)
        for target, name, used in resources()
        if used["STACK"] or used["LOCAL"] or used["REG"] > 168 or used["SHARED"] > 1024
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_library_takes_from_torch_only_the_c_shim():
    nm = [shutil.which("nm") or "nm", "-D", "--undefined-only", _cuda.LIBRARY]
    names = [
        line.split()[-1] for line in subprocess.run(nm, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    assert "aoti_torch_get_current_cuda_stream" in names
    known = re.compile(r"^(aoti_)?torch_\w+$|@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_\w+|__gmon_start__|__cxa_finalize)$")
    assert not [n for n in names if not known.search(n)]


def test_info_says_why_it_is_not_used():
    row = next(b for b in backends.BACKENDS if b.name == "cuda")
    why = row.missing()
    assert why is None or (len(why) < 200 and "\n" not in why)
