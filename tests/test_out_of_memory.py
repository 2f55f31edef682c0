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
    done = run_python(CODE, call, str(threads), OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-2000:]}"
    assert done.stdout.splitlines()[-1] == "DONE"


SHRUNK = """
import torch
import memkernels as mk

memory = torch.randn(64, 16)
read = torch.ops.memkernels_cpu.softmax_read.default
arguments = [torch.randn(3, 16), memory, memory.clone(), None, 0.25]
for bytes_left in (0, 100, 64 * 16 * 4 - 1):
    memory.untyped_storage().resize_(bytes_left)
    try:
        read(*arguments)
    except RuntimeError as error:
        assert str(error) == f"softmax_read: keys reaches beyond its storage of {bytes_left} bytes", error
    else:
        raise AssertionError(bytes_left)
print("DONE")
"""


def test_tensors_whose_storage_is_gone_are_refused():
    done = run_python(SHRUNK)
    assert done.stdout.splitlines()[-1:] == ["DONE"], done.stderr[-2000:]
