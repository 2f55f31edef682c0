"""Peak extra memory of a fused op, forward and backward: it never forms [T, N]. Measured in a fresh process."""

from __future__ import annotations

import pytest
from support import run_python

T = N = 8192
LIMIT = T * N * 4 // 20  # bytes: a twentieth of one [T, N] float32 matrix

# Scratch memory is the rise of the peak, less the results. The same call at small sizes comes first, so that threads,
# library code and memory pools do not count.
CODE = """
import sys
import torch
from support import operator
from memkernels.testing import Case, Subject
from memkernels.registration import OPS
from memkernels.spec import several

name, backend, direction, T, N = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
erase = {"erase": "uniform"} if len(sys.argv) > 6 else {}
op = OPS[name]
run = op.reference if backend == "reference" else operator(backend, name)

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def reset_peak():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")

def measure(t, n):
    s = Subject(op, Case("large", sizes={"T": t, "N": n, "K": 32, "V": 32, "k": 8}, tokens=(), memory=(), give=erase),
                torch.float32, "cpu")
    leaves = [x if x is None else x.detach() for x in s.inputs.tensors]
    if direction == "forward":
        reset_peak()
        before = status("VmRSS")
        results = run(*leaves, *s.inputs.params)
        own = sum(r.numel() * r.element_size() for r in several(results))
    else:
        wanting = [leaves[i].requires_grad_() for i in s.wanting]
        results = several(run(*leaves, *s.inputs.params))
        cotangents = s.cotangents(results)
        reset_peak()
        before = status("VmRSS")
        gradients = torch.autograd.grad([results[i] for i in cotangents], wanting, list(cotangents.values()))
        own = sum(g.numel() * g.element_size() for g in gradients)
    return status("VmHWM") - before - own

measure(64, 64)
measure(512, 512)
print(measure(T, N))
"""


def extra(op: str, backend: str, direction: str, *options: str, t: int = T, n: int = N) -> int:
    done = run_python(CODE, op, backend, direction, str(t), str(n), *options)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


READS = ("softmax_read", "additive_read", "slot_usage", "topk_search", "topk_read")
CALLS = [(op,) for op in (*READS, "gated_write", "memory_scan")]
CALLS += [(op, *erase) for op in ("slot_write", "softmax_write") for erase in ((), ("erase tensor",))]
CALLS.append(("gated_write", "erase tensor"))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_a_fused_op_never_forms_the_matrix_of_scores(native, call, direction):
    used = extra(call[0], native, direction, *call[1:])
    assert used < LIMIT, f"{used / 2**20:.1f} MiB of scratch, at most {LIMIT / 2**20:.1f} MiB"


def test_the_measurement_sees_a_matrix_of_scores():
    """The reference does form it, so this shows that the measurement would find one."""
    assert extra("softmax_read", "reference", "forward", t=2048, n=2048) > 2048 * 2048 * 4
