"""Memory that is not to be had: a clear error every time, the process goes on, and later calls are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_python

CODE = (Path(__file__).parent / "starved.py").read_text()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "call", ["softmax_read", "gated_write", "additive_read", "memory_scan", "topk_read", "sparse_write", "gated_write_"]
)
def test_errors_are_clear_and_later_calls_right(call, threads):
    # Memory that is freed goes back to the system, so that the limit holds for the next call too.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = run_python(CODE, call, str(threads), OMP_NUM_THREADS=str(threads), **given_back)
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-2000:]}"
    assert done.stdout.splitlines()[-1] == "DONE"
