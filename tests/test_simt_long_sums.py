"""Sums over many tokens in the CUDA kernels, on the SIMT runtime in tests/simt.

A float32 sum that is 2^24 times a term does not change when the term is added. Here the first term is that large, so
that few tokens show it. The error of the partial sums must stay within the tolerance table.
"""

from __future__ import annotations

import json

import pytest
import torch
from cuda_support import can_run, library, on_host

import memkernels as mk
from memkernels.testing.compare import TOLERANCE

pytestmark = can_run
LARGE = 2.0**24


def ones(count: int, first: float = LARGE) -> torch.Tensor:
    x = torch.ones(count)
    x[0] = first
    return x


def sparse_read():
    """Gradient of the only row that 4096 tokens read, and of its weight."""
    values, indices = torch.zeros(1, 2, requires_grad=True), torch.zeros(4096, 1, dtype=torch.int64)
    read = mk.sparse_read(values, indices, torch.ones(4096, 1), backend="cuda")
    return torch.autograd.grad(read, values, ones(4096).unsqueeze(-1).expand(-1, 2))[0]


def topk_read():
    """Gradient of a mask, which is a sum of weights alone."""
    query, keys, mask = torch.zeros(4096, 1), torch.zeros(1, 1), torch.zeros(1, requires_grad=True)
    scores, _ = mk.topk_search(query, keys, 1, slot_mask=mask, backend="cuda")
    return torch.autograd.grad(scores, mask, ones(4096).unsqueeze(-1))[0]


def slot_usage():
    lse = torch.zeros(4096)
    lse[0] = -torch.tensor(LARGE).log()
    return mk.slot_usage(torch.zeros(4096, 1), torch.zeros(1, 1), lse, backend="cuda") - (torch.exp(-lse[0]) - LARGE)


def usage_keys():
    """A gradient by all pairs: of the keys, from a usage."""
    keys = torch.zeros(1, 2, requires_grad=True)
    query = ones(4096).unsqueeze(-1).expand(-1, 2)
    usage = mk.slot_usage(query, keys, torch.zeros(4096), scale=1.0, backend="cuda")
    return torch.autograd.grad(usage.sum(), keys)[0]


def softmax_write(last: float = 32 * LARGE):
    """The last token is added first. The others are added in tiles of 32, so it is 32 times as large."""
    write = ones(16384, last).flip(0).unsqueeze(-1)
    query, keys = torch.zeros(16384, 1), torch.zeros(1, 1)
    return mk.softmax_write(torch.zeros(1, 1), keys, query, write, erase=0.0, backend="cuda")


def memory_that_forgets():
    """5000 tokens write much through gates of 2e-9; the 2000 before them overwrite all, where long sums end."""
    scores = torch.full((7000,), -20.0)
    scores[:2000] = 60.0
    write = torch.linspace(1, 2, 7000)
    write[2000:] *= 1e8
    found = mk.gated_write(
        torch.full((1, 1), 9.0), torch.ones(1, 1), scores.unsqueeze(-1), write.unsqueeze(-1), scale=1.0, backend="cuda"
    )
    wanted = 0.0
    for a, w in zip(torch.sigmoid(scores.double()).tolist(), write.tolist()):
        wanted += a * (w - wanted)
    return found / wanted


SUMS = {
    "sparse_read": (sparse_read, LARGE + 4095),
    "topk_read": (topk_read, LARGE + 4095),
    "slot_usage": (slot_usage, LARGE + 4095),
    "keys of a usage": (usage_keys, LARGE + 4095),
    "softmax_write": (softmax_write, 32 * LARGE + 16383),
    "a memory that forgets": (memory_that_forgets, 1.0),
}


def error(name: str) -> float:
    """The error of the sum; runs in a process where the CUDA kernels run on the host."""
    run, wanted = SUMS[name]
    return float((run().double() / wanted - 1).abs().max())


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_many_terms_does_not_stand_still(name):
    done = on_host(
        library(), "import json, sys, test_simt_long_sums as t; print(json.dumps(t.error(sys.argv[1])))", name
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) < TOLERANCE[torch.float32]
