"""Failed allocations: a clear error every time, the process goes on, and later calls are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_python

from memkernels import _native

CODE = (Path(__file__).parent / "starved.py").read_text()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "call", ["softmax_read", "gated_write", "additive_read", "memory_scan", "topk_read", "sparse_write", "gated_write_"]
)
def test_errors_are_clear_and_later_calls_right(call, threads):
    # malloc returns freed memory to the system, so that the limit holds for the next call too.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = run_python(CODE, call, str(threads), OMP_NUM_THREADS=str(threads), **given_back)
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-2000:]}"
    assert done.stdout.splitlines()[-1] == "DONE"


THREADS = """
import importlib.util
import resource
import sys

import pytest

spec = importlib.util.spec_from_file_location("_host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (100 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    with pytest.raises(RuntimeError):
        host.multiply_add_peak("float32", 64, 0.01)
assert host.multiply_add_peak("float32", 1, 0.01) > 0
print("DONE")
"""


def test_threads_that_cannot_be_started_are_an_error():
    done = run_python(THREADS, _native.host().__file__)
    assert done.stdout.splitlines() == ["DONE"], f"{done.returncode} {done.stderr[-2000:]}"
