"""Long sums in the Triton kernels, in Triton's interpreter: many small terms are not lost beside a large one."""

from __future__ import annotations

import pytest
from support import run_python

pytest.importorskip("triton")

COMPENSATED = """
import torch, memkernels as mk
# 2^24 and then a thousand of 0.01: a block of them is less than half of what float32 resolves there.
T = 2000
lse = torch.log(1 / torch.full((T,), 0.01, dtype=torch.float64)).float()
lse[0] = -24 * 0.6931471805599453
usage = mk.slot_usage(torch.zeros(T, 4), torch.zeros(200, 4), lse, backend="triton")
wanted = (-lse.double()).exp().sum()
print(float(((usage.double() - wanted).abs() / wanted).max()))

values = torch.zeros(5, 3, requires_grad=True)
weights = torch.full((1000, 2), 0.01)
weights[0, 0] = 2.0**24
read = mk.sparse_read(values, torch.full((1000, 2), 3), weights, backend="triton")
(got,) = torch.autograd.grad(read.sum(), values)
wanted = weights.double().sum()
print(float(((got[3].double() - wanted).abs() / wanted).max()))
"""

CUT = """
import sys, torch
from memkernels import _triton
package = _triton.kernels()
from memkernels.triton_kernels.launch import LONGEST, Plan
from memkernels.triton_kernels import configs
plan = Plan(*next(iter(configs.table().items())), 132)
for programs in (1, 131, 132, 10**4):
    for size in (0, 1, 1000, LONGEST, LONGEST + 1, 2**25, 2**31 - 2**16):
        for block in (16, 128):
            parts, span = plan.cut(programs, size, block)
            assert span <= LONGEST and parts * span >= size and (parts - 1) * span < max(size, 1), (parts, span)
            if programs >= 132:
                assert plan.cut(programs, size, block, sums=False)[0] == 1
            assert size > LONGEST or (parts, span) == plan.cut(programs, size, block, sums=False)
print("cut")
"""


def test_small_terms_are_not_lost_beside_a_large_sum():
    done = run_python(COMPENSATED, timeout=1800, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [float(x) for x in done.stdout.split()]
    assert len(errors) == 2 and max(errors) < 3e-7, errors


def test_no_sum_runs_on_beyond_the_longest_part():
    done = run_python(CUT, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "cut", done.stdout + done.stderr


BLOCKS = """
import torch, memkernels as mk
# Rows of several blocks of words: rising, so that each block moves the reference; with a tie in two blocks; plain.
z = 3 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
z[0] = z[0].sort().values
z[1, 4500] = z[1, 100] = z[1].max() + 1
targets, tokens, scores = torch.tensor([1, 4500, -1]), torch.tensor([1, 100, 7, -1]), torch.zeros(3, 4)

def run(z, backend):
    z.requires_grad_()
    given = z, targets, scores.to(z.dtype), tokens, 0.3
    nll, (lse, largest, entropy) = mk.cache_nll(*given, return_stats=True, backend=backend)
    return [nll, lse, largest, entropy, *torch.autograd.grad((nll + 2 * lse + 3 * largest + entropy).sum(), z)]

for got, wanted in zip(run(z, "triton"), run(z.detach().double(), "reference")):
    print(float((got.double() - wanted).abs().max()))
"""


def test_the_stats_of_a_row_of_several_blocks():
    done = run_python(BLOCKS, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [float(x) for x in done.stdout.split()]
    assert len(errors) == 5 and max(errors) < 1e-5, errors
