"""Sums of more equal terms than a float32 counts: 2^25 ones. One accumulator stops at 2^24 = 16777216.

On the CPU only, where so many terms take seconds. A state that tokens add to one at a time has the limit of its dtype:
the pages of the ops say which.
"""

from __future__ import annotations

import pytest
import torch
from support import close

import memkernels as mk
from memkernels.nn import SlotUse

MANY = 2**25


def ones(*shape):
    return torch.ones(shape)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def slots():
    return torch.zeros(MANY, 1, dtype=torch.int64)


def gradient(run):
    values = zeros(1, 1, requires_grad=True)
    return torch.autograd.grad(run(values).sum(), values)[0][0, 0]


OPEN = torch.full((1,), 100.0)  # a mask that makes a gate exactly 1
SUMS = {
    "softmax_write": lambda: mk.softmax_write(zeros(1, 1), zeros(1, 1), zeros(MANY, 1), ones(MANY, 1), erase=0.0)[0, 0],
    "gated_write": lambda: mk.gated_write(
        zeros(1, 1), zeros(1, 1), zeros(MANY, 1), ones(MANY, 1), erase=0.0, slot_mask=OPEN
    )[0, 0],
    "slot_write": lambda: mk.slot_write(zeros(1, 1), ones(MANY, 1), ones(MANY, 1), erase=0.0)[0, 0],
    "sparse_read": lambda: mk.sparse_read(ones(1, 1), slots().T, ones(1, MANY))[0, 0],
    "slot_usage": lambda: mk.slot_usage(zeros(MANY, 1), zeros(1, 1), zeros(MANY))[0],
    "softmax_read, lse": lambda: mk.softmax_read(zeros(1, 1), zeros(MANY, 1), ones(MANY, 1), return_lse=True)[1].exp()[
        0
    ],
    "sparse_read, gradient": lambda: gradient(lambda values: mk.sparse_read(values, slots(), ones(MANY, 1))),
    "softmax_read, gradient": lambda: gradient(lambda values: mk.softmax_read(zeros(MANY, 1), zeros(1, 1), values)),
    "topk_read, gradient": lambda: gradient(lambda values: mk.topk_read(zeros(MANY, 1), zeros(1, 1), values, 1)),
}


@pytest.mark.parametrize("name", SUMS)
def test_two_to_the_25_ones_are_counted(name):
    with mk.use_backend("cpu"):
        close(SUMS[name]().double(), torch.tensor(float(MANY), dtype=torch.float64), 2e-6)


def test_the_use_of_a_slot_counts_on():
    use = SlotUse.none(1).after_read(torch.full((1,), 2.0**24), 1)
    for _ in range(8):
        use = use.after_read(ones(1), 1).after_write(zeros(1), 0)
    assert use.reads.item() == 2**24 + 8
