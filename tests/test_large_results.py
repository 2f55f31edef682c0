"""Large results and memories. CPU kernels write results of at least 16 MiB with non-temporal stores, or those of chosen
rows into zero pages, and prefetch rows of memories of at least 32 MiB.

Against float64, and the same bits for any number of threads.
"""

from __future__ import annotations

import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import TOLERANCE, distance, norms

LEAST = 16 << 20  # kNonTemporalBytes of csrc/cpu/tiles/streaming.h


def _read(T: int):
    q, k, v, g = (torch.randn(s) for s in ((T, 128), (1 << 15, 128), (1 << 15, 128), (T, 128)))
    return lambda q, k, v, **how: mk.softmax_read(q, k, v, **how), (q, k, v), g


def _search(T: int):
    q, k, v, g = (torch.randn(s) for s in ((T, 128), (1 << 15, 128), (1 << 15, 128), (T, 128)))
    return lambda q, k, v, **how: mk.topk_read(q, k, v, 4, **how), (q, k, v), g


def _write(T: int):
    v, k, q, w, g = (torch.randn(s) for s in ((1 << 15, 128), (1 << 15, 128), (T, 128), (T, 128), (1 << 15, 128)))
    return lambda v, k, q, w, **how: mk.gated_write(v, k, q, w, **how), (v, k, q, w), g


def _scan():
    f, u = torch.rand(256, 16, 1024), torch.randn(256, 16, 1024)
    return lambda f, u, **how: mk.gated_scan(f, u, **how), (f, u), torch.randn_like(u)


def _words(op):
    z, c = torch.randn(133, 32000), torch.randn(133, 40)
    tokens, targets = torch.randint(0, 32000, (133, 40)), torch.randint(0, 32000, (133,))
    if op is mk.cache_nll:
        return lambda z, c, **how: op(z, targets, c, tokens, 0.3, **how), (z, c), torch.randn(133)
    return lambda z, c, **how: op(z, c, tokens, 0.3, **how), (z, c), torch.randn_like(z)


def _chosen(T: int):
    v, w, i = torch.randn(1 << 16, 128), torch.rand(T, 8), torch.randint(0, 1 << 16, (T, 8))
    return lambda v, w, **how: mk.sparse_read(v, i, w, **how), (v, w), torch.randn(T, 128)


CASES = {
    "few tokens": lambda: _read(3),
    "eight tokens": lambda: _read(8),
    "many tokens": lambda: _read(65),
    "five tokens search": lambda: _search(5),
    "twenty tokens search": lambda: _search(20),
    "seventy tokens search": lambda: _search(70),
    "four tokens write": lambda: _write(4),
    "many tokens write": lambda: _write(150),
    "gated_scan": _scan,
    "cache_nll": lambda: _words(mk.cache_nll),
    "cache_logprobs": lambda: _words(mk.cache_logprobs),
    "few rows chosen": lambda: _chosen(4),
    "many rows chosen": lambda: _chosen(2048),
}


def _run(f, leaves, cotangent, **how):
    leaves = [x.detach().requires_grad_() for x in leaves]
    result = f(*leaves, **how)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent.to(result.dtype))]


@pytest.mark.parametrize("name", CASES)
def test_results_larger_than_the_caches_are_right(name, threads):
    torch.manual_seed(0)
    f, leaves, cotangent = CASES[name]()
    got = _run(f, leaves, cotangent, backend="cpu")
    threads(1 if torch.get_num_threads() > 1 else 2)
    again = _run(f, leaves, cotangent, backend="cpu")
    assert all(map(torch.equal, got, again))
    assert max(x.nbytes for x in got) >= LEAST
    wanted = _run(f, [x.double() for x in leaves], cotangent, backend="reference")
    for have, want, norm in zip(got, wanted, norms(wanted), strict=True):
        assert distance(have, want, norm) <= TOLERANCE[torch.float32]
