"""Calls one native operator under a limit on the address space that is raised until the call succeeds.

test_out_of_memory.py runs it as a process. Every failure must name the op and the bytes, a memory that is written in
place must stay unchanged, and every call that succeeds must be right.
"""

from __future__ import annotations

import re
import resource
import sys

import torch

import memkernels as mk

name, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(0)
B, T, N, K, V = 8, 4, 32, 8, 20000


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def grads(result: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Of the sum of the squares of ``result``."""
    return list(torch.autograd.grad((result * result).sum(), inputs))


def softmax_read(B: int, V: int):
    x = leaf(B, T, K), leaf(B, N, K), leaf(B, N, V)
    return x, lambda q, k, v: grads(mk.softmax_read(q, k, v), q, k, v)


def additive_read(B: int, V: int):
    x = leaf(B, T, K), leaf(B, N, K), leaf(B, N, V), leaf(K)
    return x, lambda q, k, v, u: grads(mk.additive_read(q, k, v, u), q, k, v, u)


def gated_write(B: int, V: int):
    x = leaf(B, N, V), leaf(B, N, K), leaf(B, T, K), leaf(B, T, V)
    return x, lambda v, k, q, w: grads(mk.gated_write(v, k, q, w), v, k, q, w)


def memory_scan(B: int, V: int):
    x = leaf(B, N, V), leaf(B, N, K), leaf(B, T, K), leaf(B, T, K), leaf(B, T, V)
    return x, lambda v, k, r, q, w: grads(mk.memory_scan(v, k, r, q, w)[0], v, k, r, q, w)


def topk_read(B: int, V: int):
    x = leaf(B, T, K), leaf(B, N, K), leaf(B, N, V)
    return x, lambda q, k, v: grads(mk.topk_read(q, k, v, 3)[0], q, k, v)


def sparse_write(B: int, V: int):
    indices = torch.randint(0, N, (B, T, 3))
    x = leaf(B, N, V), leaf(B, T, 3), leaf(B, T, V)
    return x, lambda v, a, w: grads(mk.sparse_write(v, indices, a, w), v, a, w)


def gated_write_(B: int, V: int):
    x = [torch.randn(B, N, V), torch.randn(B, N, K), torch.randn(B, T, K), torch.randn(B, T, V)]

    def call(v, k, q, w):
        before, written = v.clone(), v.clone()
        try:
            mk.gated_write_(written, k, q, w)
        except RuntimeError:
            assert torch.equal(written, before), "the memory is half written"
            raise
        return [written]

    return x, call


def limit_to(margin: int | None) -> None:
    """Limit the address space to ``margin`` bytes more than the process uses; None: no limit."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    soft = resource.RLIM_INFINITY if margin is None else now + margin
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


make = globals()[name]
few, call_few = make(2, 5)
small = call_few(*few)  # starts threads and loads libraries before the limit
inputs, call = make(B, V)
with mk.use_backend("reference"):
    wanted = call(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))

errors, margin, told = 0, 1 << 16, ""
while True:
    limit_to(margin)
    try:
        results = call(*inputs)
    except RuntimeError as error:
        told, results = str(error), None
    limit_to(None)
    if results is not None:
        break
    # Around the operator torch allocates too, with its own error text.
    ours = re.fullmatch(rf"{name}(_backward)?: out of memory, could not allocate [1-9]\d* bytes", told)
    assert ours or "DefaultCPUAllocator: can't allocate memory" in told, told
    errors += bool(ours)
    assert all(torch.equal(x, y) for x, y in zip(small, call_few(*few))), "the next call gives another result"
    margin += margin // 4
assert errors >= 3, errors
for got, want in zip(results, wanted):
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
print("DONE")
