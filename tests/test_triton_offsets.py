"""Softmax in the Triton kernels does not depend on a number added to all scores: laws, in Triton's interpreter.

A number added to every score changes no weight and no gradient. The kernels get scores with that number; the expected
result is the reference in float64 without it, or the mean where all scores are equal. Where float32 rounds away the
differences of scores beside the number, all scores are equal.
"""

from __future__ import annotations

import pytest
from support import run_python

pytest.importorskip("triton")

COMMON = """
import math
import torch
import memkernels as mk

T, N, K, V, W = 3, 70, 16, 8, 37
HUGE = (-3e38, -2.4e38, -1e9, -1e7, -1e6, 1e6, 1e9, 3e38)
generator = torch.Generator().manual_seed(0)
failures, DTYPE = [], torch.float32

def randn(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)

def quarters(*shape):  # small multiples of 1/4
    return torch.randint(-4, 5, shape, generator=generator).double() / 4

def compare(what, got, wanted, tolerance, floor=0.1):
    for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        finite = b[b.isfinite()].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance * max(size, floor), equal_nan=True):
            failures.append(f"{what}, {place}: {a.flatten()[:4].tolist()} for {b.flatten()[:4].tolist()}")

def run(backend, dtype, function, leaves):
    '''Results of function(backend, *leaves) and the gradients of all leaves.'''
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
    results = function(backend, *leaves)
    loss = sum((r.double() * torch.linspace(-1, 2, r.numel()).double().view(r.shape)).sum() for r in results)
    return [*results, *torch.autograd.grad(loss, leaves, allow_unused=True)]

def check(what, function, leaves, shifted, tolerance=2e-5, floor=0.1):
    '''The kernels on ``shifted`` leaves against the reference in float64 on ``leaves``.'''
    got, wanted = run("triton", DTYPE, function, shifted), run("reference", torch.float64, function, leaves)
    some = [i for i, x in enumerate(wanted) if x is not None]
    compare(what, [got[i] for i in some], [wanted[i] for i in some], tolerance, floor)

def of_mask(scale, k):
    '''Ops by a mask: name -> function(backend, query, keys, values, mask).'''
    def reader(b, q, K, v, m): return [mk.softmax_read(q, K, v, slot_mask=m, scale=scale, backend=b)]
    def weights(b, q, K, v, m): return [mk.address(q, K, slot_mask=m, scale=scale, backend=b)]
    def best(b, q, K, v, m): return [mk.topk_read(q, K, v, k, slot_mask=m, scale=scale, backend=b)]
    def additive(b, q, K, v, m): return [mk.additive_read(q * 0, K * 0, v, q[0], slot_mask=m, backend=b)]
    def writer(b, q, K, v, m):
        return list(mk.softmax_write(v, K, q, v[:T] + 1, slot_mask=m, scale=scale, return_retained=True, backend=b))
    def eraser(b, q, K, v, m):
        return [mk.softmax_write(v, K, q, v[:T] + 1, erase=v[:T] * 0 + 0.5, slot_mask=m, scale=scale, backend=b)]
    return {"softmax_read": reader, "address": weights, "topk_read": best, "additive_read": additive,
            "softmax_write": writer, "softmax_write, erase a tensor": eraser}
"""

EQUAL = """
# q = k = 0: every score is the number itself.
zero_q, zero_k, values = torch.zeros(T, K).double(), torch.zeros(N, K).double(), randn(N, V)
for c in HUGE:
    for name, function in of_mask(0.25, N).items():
        mask = torch.zeros(N).double()
        check(f"{name} at {c}", function, [zero_q, zero_k, values, mask], [zero_q, zero_k, values, mask + c])
    q, k, mask = torch.zeros(T, K), torch.zeros(N, K), torch.full((N,), c)
    v = values.float().requires_grad_()
    read, lse = mk.softmax_read(q, k, v, slot_mask=mask, return_lse=True, backend="triton")
    (dv,) = torch.autograd.grad(read.sum(), v)
    compare(f"mean at {c}", [read[0], dv.sum(0)], [values.mean(0), torch.full((V,), float(T))], 1e-6)
    compare(f"lse at {c}", [lse / c], [(mask.double()[:1] + math.log(N)).expand(T) / c], 1.2e-7)
    # The rounding of the lse that is given, and nothing else.
    usage = mk.slot_usage(q, k, lse, slot_mask=mask, backend="triton")
    compare(f"slot_usage at {c}", [usage], [(mask.double()[:, None] - lse.detach().double()).exp().sum(1)], 2e-5)
    if c < 0:  # gates of 0: the scan reads what it has
        reads, new = mk.memory_scan(v, k, q, q, v.detach()[:T], slot_mask=mask, backend="triton")
        (dv,) = torch.autograd.grad(reads.sum() + new.sum(), v)
        compare(f"memory_scan at {c}", [reads[2], new, dv.sum(0) - N],
                [values.mean(0), values.float(), torch.full((V,), float(T))], 1e-4)
    # Reads of parts: the largest lse and the sum, in both directions.
    def merged(b, reads, lses): return [mk.merge_reads(reads, lses, backend=b)[0]]
    reads, lses = randn(5, T, V), torch.zeros(5, T).double()
    check(f"merge_reads at {c}", merged, [reads, lses], [reads, lses + c])
"""

EXACT = """
# Enough slots to be split into parts, which are merged.
q, k, values, mask = 4 * quarters(T, K), 4 * quarters(600, K), randn(600, V), quarters(600)
for c in (-1e9, 0.0, 2.0**20):
    exact = float(abs(c) < 1e9)
    leaves = [q * exact, k * exact, values, mask * exact]
    check(f"softmax_read in parts at {c}", of_mask(0.25, 1)["softmax_read"], leaves, [*leaves[:3], leaves[3] + c])
    check(f"softmax_write in parts at {c}", of_mask(0.25, 1)["softmax_write"], leaves, [*leaves[:3], leaves[3] + c])
# Scores that are multiples of 1/4, beside which 2^20 is exact: weights that differ.
q, k, values, mask = 4 * quarters(T, K), 4 * quarters(N, K), randn(N, V), quarters(N)
mask[5:20] = -torch.inf
for c in (-(2.0**20), 2.0**20):
    for name, function in of_mask(0.25, 20).items():
        check(f"{name} at {c}", function, [q, k, values, mask], [q, k, values, mask + c])
    for key_type in (torch.int8, torch.float8_e4m3fn):
        packed = k.to(key_type)
        def compressed(b, q, m):
            half = torch.full((N,), 0.5, dtype=q.dtype)
            return [mk.softmax_read(
                q, packed, packed, slot_mask=m, scale=0.25, key_scale=half, value_scale=half, backend=b
            )]
        check(f"{key_type} at {c}", compressed, [q, mask], [q, mask + c])
    reads, lses = randn(5, T, V), quarters(5, T)
    def merged(b, reads, lses): return [mk.merge_reads(reads, lses, backend=b)[0]]
    check(f"merge_reads at {c}", merged, [reads, lses], [reads, lses + c])
def scanned(b, v, k, q, w, m):
    return list(mk.memory_scan(v, k, q, w, v[:T], slot_mask=m, scale=0.25, backend=b))
for c in (0.0, -(2.0**20)):  # gates are sigmoids: the number belongs to them, in the reference too
    leaves = [values, k, q, 4 * quarters(T, K), mask + c]
    check(f"memory_scan at {c}", scanned, leaves, leaves, 1e-4)

# Masks whose units of log2 would overflow or round differences away; -inf alone is an empty slot.
for high in (1e9, -1e9, 0.0):
    mask = torch.full((N,), -torch.inf).double()
    mask[7], mask[68] = high, high - 64
    for name, function in of_mask(0.25, 2).items():
        leaves = [q * 0, k * 0, values, mask]
        check(f"{name}, mask {high}", function, leaves, leaves)
    mask[7], mask[68], mask[30] = -3.3e38, -3.3e38, -3.4e38
    for name, function in of_mask(0.25, 3).items():
        leaves = [q * 0, k * 0, values, mask]
        check(f"{name}, lowest masks", function, leaves, leaves)
"""

LARGE = """
# Large queries and keys, no mask: both directions sum a score in the same order.
values = randn(N, V)
for width in (16, 64, 128):
    for name, function in of_mask(width**-0.5, N).items():
        def of_values(b, v):
            q, k = (torch.full((n, width), 1e4 if b == "triton" else 0.0, dtype=v.dtype) for n in (T, N))
            results = function(b, q, k, v, None)
            return [results[0] @ v] if name == "address" else results
        if name != "additive_read":
            check(f"{name}, {width} columns of 1e4", of_values, [values], [values])
def product(b, v):
    q, subkeys = (torch.full(n, 1e4, dtype=v.dtype) for n in ((T, 16), (2, 8, 8)))
    return [mk.product_key_read(q, subkeys, v, 64, backend=b)]
check("product_key_read of 1e4", product, [values[:64]], [values[:64]])

# A scale that is huge or tiny, of queries and keys that are the opposite.
q, k, mask = quarters(T, K), quarters(N, K), quarters(N)
for power in (100, -100):
    small = 2.0 ** (-1 - power // 2)
    for name, function in of_mask(2.0**power, 20).items():
        if name != "additive_read":
            leaves = [q * small, k * small, values, mask]
            check(f"{name}, scale 2^{power}", function, leaves, leaves, floor=0.0)
"""

CACHE = """
def nll(b, z, c, mix): return [mk.cache_nll(z, targets, c, words, mix, backend=b)]
def logprobs(b, z, c, mix): return [mk.cache_logprobs(z, c, words, mix, backend=b)]
targets = torch.tensor([3, 11, -1])
words = torch.randint(-1, W, (T, 70), generator=generator)
words[0, 5] = 3
mix = torch.full((T,), 0.25).double()
equal = torch.zeros(T, W).double(), torch.zeros(T, 70).double()
exact = quarters(T, W), quarters(T, 70)
for c, (z, s) in [*((c, equal) for c in HUGE), (-(2.0**20), exact), (2.0**20, exact)]:
    for function in (nll, logprobs):
        check(f"{function.__name__} at {c}", function, [z, s, mix], [z + c, s + c, mix])
"""

AGAIN = """
# A score that was rounded another way when the lse was taken: a weight ends at 1, and NaN stays NaN.
q, k, v = torch.zeros(T, K), torch.zeros(N, K), torch.ones(N, V)
q[1] = torch.nan
read = torch.ops.memkernels_triton.softmax_read(q, k, v, None, None, 1.0)[0]
backward = torch.ops.memkernels_triton.softmax_read_backward
for queries, wanted in ((q[::2], 2.0), (q, torch.nan)):
    n = len(queries)
    lse, rest = torch.full((n,), -64.0), torch.zeros(n)
    dv = backward(queries, k, v, None, None, read[:n], lse, rest, torch.ones(n, V), None, 1.0, [True] * 4)[2]
    compare(f"{n} tokens", [dv], [torch.full((N, V), wanted)], 1e-6)
"""

HALF = """
# In float16 the number is smaller; sums are float32 all the same.
DTYPE = torch.float16
zero_q, zero_k, values, mask = torch.zeros(T, K).double(), torch.zeros(N, K).double(), quarters(N, V), torch.zeros(N)
for c in (-6e4, 6e4):
    for name, function in of_mask(0.25, N).items():
        leaves = [zero_q, zero_k, values, mask.double()]
        check(f"float16 {name} at {c}", function, leaves, [*leaves[:3], leaves[3] + c], 2e-3)
"""


@pytest.mark.parametrize("law", ["EQUAL", "EXACT", "LARGE", "CACHE", "AGAIN", "HALF"])
def test_what_all_scores_have_in_common_changes_nothing(law):
    code = COMMON + globals()[law] + "print('RESULT', *failures, sep=chr(10))"
    done = run_python(code, timeout=1800, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout.split("RESULT", 1)[1].strip(), done.stdout
