"""Softmaxes of the CUDA kernels where scores are large, on the SIMT runtime in tests/simt.

Adding the same number to all scores of a token changes no weight. Expected results are the float64 formula without that
number. float32 represents the scores exactly, so any error comes from the kernel. Every direction of every op with a
softmax, by streaming and all pairs (few tokens) and by tiles (many).
"""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from cuda_support import broken, can_run, library, on_host, seeded, whole
from support import operator, randn

import memkernels as mk
from memkernels.testing.compare import TOLERANCE

pytestmark = can_run
HUGE = (-3e38, -2.4e38, -1e9, -1e7, -1e6, -3e4, 3e4, 1e6, 1e9)
ONE, MANY = 1, 20  # tokens: more than 16 are taken in tiles
K, V = 8, 3


class Scores:
    """Queries, keys and a mask with exactly known scores: ``exact`` [T, N] in float64, less one number per case."""

    def __init__(self, name: str, query, keys, mask, scale: float, exact):
        self.name, self.query, self.keys, self.mask, self.scale, self.exact = name, query, keys, mask, scale, exact
        self.weights = exact.softmax(-1)


def grid(*shape: int, seed: int = 0) -> torch.Tensor:
    """Integers from -2 to 2."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases(tokens: int, slots: int):
    """The cases of this module's docstring in float32, and in 16 bits where these can represent the scores."""
    zeros = torch.zeros(tokens, slots, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        for c in (c for c in HUGE if abs(c) < largest):
            q, k = torch.zeros(tokens, K, dtype=dtype), torch.zeros(slots, K, dtype=dtype)
            yield Scores(f"all {c}, {dtype}", q, k, torch.full((slots,), c, dtype=dtype), 1.0, zeros)
    q, k, m = grid(tokens, K), grid(slots, K, seed=1), grid(slots, seed=2) / 4
    exact = q @ k.T / 4 + m
    for c in (-(2.0**20), 0.0, 2.0**20):
        yield Scores(f"quarters and {c}", q.float(), k.float(), (m + c).float(), 0.25, exact)
    mask = torch.tensor([1e9, 1e9 - 64, -math.inf] + [1e9] * (slots - 3), dtype=torch.float64)
    yield Scores("an empty slot, one 64 below", (0 * q).float(), (0 * k).float(), mask.float(), 1.0, mask - 1e9 + zeros)
    # 8 products of 1e4: their sums, in any order, are float32 numbers.
    yield Scores("large queries and keys", torch.full((tokens, K), 1e4), torch.full((slots, K), 1e4), None, 0.5, zeros)
    for power in (50, -50):
        size = 2.0**-power
        yield Scores(f"scale 2^{2 * power}", (q * size).float(), (k * size).float(), None, size**-2, q @ k.T)


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def differ(what: str, found, wanted, dtype=torch.float32) -> list[str]:
    """What is wrong with ``found``, measured against the largest number wanted."""
    found, wanted = found.detach().double(), wanted.detach().double()
    error = float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-30)
    return [] if error < TOLERANCE[dtype] else [f"{what}: error {error:.2g}"]


def gradients(what: str, results, inputs, exact_results, exact_inputs, weights_of_results, dtype) -> list[str]:
    """Gradients of a weighted sum of results: of each given input, against that of its float64 twin."""
    total = sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights_of_results))
    exact = sum((r * w).sum() for r, w in zip(exact_results, weights_of_results))
    there = [i for i, x in enumerate(inputs) if x is not None]
    found = torch.autograd.grad(total, [inputs[i] for i in there])
    wanted = torch.autograd.grad(exact, [exact_inputs[i] for i in there], allow_unused=True, materialize_grads=True)
    norm = max(float(w.abs().max()) for w in wanted)
    wrong = []
    for i, f, w in zip(there, found, wanted):
        own = float(w.abs().max())  # terms that cancel to nothing are measured against the largest gradient
        error = float((f.double() - w).abs().max()) / (own if own > 1e-6 * norm else norm)
        if not error < TOLERANCE[dtype]:
            wrong.append(f"{what}: gradient of input {i}: error {error:.2g}")
    return wrong


def exact_scores(s: Scores):
    """Float64 twins of query, keys and mask, and scores whose value is ``s.exact`` and whose gradient is theirs."""
    q, k, m = leaves(*(None if x is None else x.double() for x in (s.query, s.keys, s.mask)))
    scores = s.scale * (q @ k.T) + (0 if m is None else m)
    # Without the offset, a constant, so that float64 does not round scores of 3e38.
    return (q, k, m), s.exact + (scores - scores.detach()).nan_to_num(0.0)


def softmax_read(s: Scores) -> list[str]:
    dtype, (tokens, slots) = s.query.dtype, s.exact.shape
    values = randn(slots, V, dtype=dtype)
    d_read, d_lse = randn(tokens, V, seed=3), randn(tokens, seed=4)
    q, k, m, v = leaves(s.query, s.keys, s.mask, values)
    read, lse = mk.softmax_read(q, k, v, scale=s.scale, slot_mask=m, return_lse=True, backend="cuda")
    (q64, k64, m64), scores = exact_scores(s)
    (v64,) = leaves(values.double())
    wanted, wanted_lse = scores.softmax(-1) @ v64, scores.logsumexp(-1)
    wrong = differ(f"{s.name}: read", read, wanted, dtype)
    # dlse reaches the scores by the same weights.
    wrong += gradients(
        s.name, (read, lse), (q, k, m, v), (wanted, wanted_lse), (q64, k64, m64, v64), (d_read, d_lse), dtype
    )
    ones = torch.autograd.grad(mk.softmax_read(q, k, v, scale=s.scale, slot_mask=m, backend="cuda").sum(), v)[0]
    return wrong + differ(
        f"{s.name}: gradients of values sum to T", ones.double().sum(0), torch.full((V,), float(tokens)), dtype
    )


def lse_and_rest(s: Scores) -> list[str]:
    """lse is the float32 number nearest to the truth or its neighbour; lse + rest is the truth."""
    read, lse, rest = operator("cuda", "softmax_read")(s.query, s.keys, s.keys, s.mask, None, s.scale)
    known = s.scale * (s.query.double() @ s.keys[0].double()) + (0.0 if s.mask is None else s.mask[0].double())
    left = s.exact.logsumexp(-1) - s.exact[:, 0]
    wrong = differ(f"{s.name}: read", read, s.weights @ s.keys.double(), s.query.dtype)
    if not bool(((lse.double() - known - left).abs() <= 2**-23 * (known.abs() + left.abs() + 1)).all()):
        wrong.append(f"{s.name}: lse {lse} of {known + left}")
    error = float(((lse.double() - known) + rest.double() - left).abs().max())
    return wrong if error < 1e-5 else [*wrong, f"{s.name}: lse and rest: error {error:.2g}"]


def address(s: Scores) -> list[str]:
    dtype = s.query.dtype
    q, k, m = leaves(s.query, s.keys, s.mask)
    weights = mk.address(q, k, scale=s.scale, slot_mask=m, backend="cuda")
    exact_inputs, scores = exact_scores(s)
    d_weights = randn(*s.exact.shape, seed=5)
    wrong = differ(f"{s.name}: weights", weights, s.weights, dtype)
    wrong += differ(f"{s.name}: sum of weights", weights.double().sum(-1), torch.ones(len(s.exact)), dtype)
    return wrong + gradients(s.name, [weights], (q, k, m), [scores.softmax(-1)], exact_inputs, [d_weights], dtype)


def slot_usage(s: Scores) -> list[str]:
    """Beside the given float32 lse: nothing else is rounded at the size of the scores."""
    dtype = s.query.dtype
    _, lse = mk.softmax_read(s.query, s.keys, s.keys, scale=s.scale, slot_mask=s.mask, return_lse=True, backend="cuda")
    q, k, m = leaves(s.query, s.keys, s.mask)
    usage = mk.slot_usage(q, k, lse, scale=s.scale, slot_mask=m, backend="cuda")
    exact_inputs, scores = exact_scores(s)
    all_of_it = s.scale * (s.query.double() @ s.keys.double().T) + (0.0 if s.mask is None else s.mask.double())
    scores = scores - scores.detach() + (all_of_it - lse.double().unsqueeze(-1))
    scores = torch.where(all_of_it.isneginf(), -math.inf, scores)
    d_usage = randn(s.exact.shape[1], seed=6)
    wanted = scores.exp().sum(0)
    wrong = differ(f"{s.name}: usage", usage, wanted)
    return wrong + gradients(s.name, [usage], (q, k, m), [wanted], exact_inputs, [d_usage], dtype)


def written(values, weights, write, erase):
    for a, w, e in zip(weights, write, erase):
        values = values * (1 - a.unsqueeze(-1) * e) + a.unsqueeze(-1) * w
    return values


def softmax_write(s: Scores, by_vector: bool = False) -> list[str]:
    dtype, (tokens, slots) = s.query.dtype, s.exact.shape
    write, memory, d_out = randn(tokens, V, dtype=dtype), randn(slots, V, dtype=dtype, seed=1), randn(slots, V, seed=7)
    erase = torch.rand(tokens, V, generator=torch.Generator().manual_seed(8)).to(dtype) if by_vector else 1.0
    q, k, m, w, v = leaves(s.query, s.keys, s.mask, write, memory)
    out = mk.softmax_write(v, k, q, w, erase=erase, scale=s.scale, slot_mask=m, backend="cuda")
    (q64, k64, m64), scores = exact_scores(s)
    w64, v64 = leaves(write.double(), memory.double())
    e = erase.double() if by_vector else torch.ones(tokens, V, dtype=torch.float64)
    wanted = written(v64, scores.softmax(-1), w64, e)
    wrong = differ(f"{s.name}: values", out, wanted, dtype)
    return wrong + gradients(s.name, [out], (q, k, m, w, v), [wanted], (q64, k64, m64, w64, v64), [d_out], dtype)


def topk_read(s: Scores) -> list[str]:
    dtype, (tokens, slots) = s.query.dtype, s.exact.shape
    values, d_read = randn(slots, V, dtype=dtype), randn(tokens, V, seed=9)
    q, k, m, v = leaves(s.query, s.keys, s.mask, values)
    read = mk.topk_read(q, k, v, 5, scale=s.scale, slot_mask=m, backend="cuda")
    (q64, k64, m64), scores = exact_scores(s)
    (v64,) = leaves(values.double())
    chosen = torch.sort(s.exact, dim=-1, descending=True, stable=True).indices[:, :5]
    wanted = torch.einsum("tk,tkv->tv", scores.gather(-1, chosen).softmax(-1), v64[chosen])
    wrong = differ(f"{s.name}: read", read, wanted, dtype)
    return wrong + gradients(s.name, [read], (q, k, m, v), [wanted], (q64, k64, m64, v64), [d_read], dtype)


def merge_reads(tokens: int, parts: int) -> list[str]:
    wrong, rows = [], grid(parts, tokens, seed=1) / 4
    reads, d_read, d_lse = randn(parts, tokens, V), randn(tokens, V, seed=2), randn(tokens, seed=3)
    for c in (*HUGE, -1e38, 1e38, -(2.0**20), 2.0**20):
        exact = (rows if abs(c) == 2.0**20 else 0 * rows).requires_grad_()
        r, lses = leaves(reads.float(), (exact.detach() + c).float())
        read, lse = mk.merge_reads(r, lses, backend="cuda")
        (r64,) = leaves(reads.float().double())
        weights = exact.softmax(0)
        wanted = (weights.unsqueeze(-1) * r64).sum(0), exact.logsumexp(0)
        wrong += differ(f"{c}: read", read, wanted[0]) + differ(f"{c}: lse", lse.double() / c, 1 + wanted[1] / c)
        wrong += gradients(f"{c}", (read, lse), (r, lses), wanted, (r64, exact), (d_read, d_lse), torch.float32)
    return wrong


OPS = {
    "softmax_read": softmax_read,
    "lse and rest": lse_and_rest,
    "address": address,
    "slot_usage": slot_usage,
    "softmax_write": softmax_write,
    "softmax_write, erase vector": partial(softmax_write, by_vector=True),
    "topk_read": topk_read,
}


def laws(op: str) -> str:
    """What is wrong with an op, as JSON. Runs where the CUDA kernels run on the host."""
    if op == "merge_reads":
        return json.dumps(merge_reads(5, 3) + merge_reads(3, 70))
    wrong = []
    sizes = [(ONE, 70), (MANY, 70)]
    if op == "lse and rest":
        sizes += [(ONE, 600), (MANY, 600)]  # several ranges of slots, which are merged
    for tokens, slots in sizes:
        for s in cases(tokens, slots):
            wrong += [f"T={tokens} N={slots}, {w}" for w in OPS[op](s)]
    return json.dumps(wrong)


def wrong_in(built, op: str) -> list[str]:
    done = on_host(built, "import sys, test_simt_offsets as t; print(t.laws(sys.argv[1]))", op)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", [*OPS, "merge_reads"])
def test_adding_to_all_scores_changes_no_weight(op):
    assert not wrong_in(library(), op)


def a_weight_is_at_most_one() -> str:
    """Also where two kernels round a score of about 1e9 to different numbers."""
    wrong = []
    run, back = operator("cuda", "softmax_read"), operator("cuda", "softmax_read_backward")
    for tokens in (ONE, MANY):
        q, k, v, g = torch.zeros(tokens, K), torch.zeros(70, K), randn(70, V).float(), torch.ones(tokens, V)
        read, lse, rest = run(q, k, v, None, None, 1.0)
        largest = back(q, k, v, None, None, read, lse - 100, rest, g, None, 1.0, [False, False, True, False])[2].max()
        wrong += [] if largest == tokens else [f"T={tokens}: weights of {largest / tokens} on average"]
        lse[0] = math.nan
        d_values = back(q, k, v, None, None, read, lse, rest, g, None, 1.0, [False, False, True, False])[2]
        wrong += [] if bool(d_values.isnan().all()) else [f"T={tokens}: a NaN is gone"]
    # Scores of -1e6, equal for all slots, which the two passes of a write round differently.
    query, keys = -1e4 * (2 + randn(MANY, 64).float()), (2 + randn(1, 64, seed=1).float()).expand(70, -1)
    weights = mk.softmax_write(
        torch.zeros(70, MANY), keys, query, torch.eye(MANY), erase=0.0, scale=1.0, backend="cuda"
    )
    if not float(weights.max()) < 1.001 / 70:
        wrong.append(f"softmax_write: weights up to {weights.max()} of 70 equal ones")
    return json.dumps(wrong)


def test_a_weight_is_at_most_one_and_a_nan_stays():
    done = on_host(library(), "import test_simt_offsets as t; print(t.a_weight_is_at_most_one())")
    assert done.returncode == 0, done.stderr[-4000:]
    assert not json.loads(done.stdout.splitlines()[-1])


# op, file, text, text with the fault, source that is compiled with it
FAULTS = {
    "no rest": (
        "softmax_read",
        "read_ranges.h",
        "isinf(lse) ? 0.f : (top - lse) + log_sum",
        "0.f",
        "softmax_read.cu",
    ),
    "no rest, all pairs": (
        "address",
        "pair_tiles.h",
        "weight_of(s - lse - rest)",
        "weight_of(s - lse)",
        "pair_sums.cu",
    ),
    "no rest, tiles": (
        "softmax_read",
        "gradient_tiles.h",
        "added) - lse - rest)",
        "added) - lse)",
        "softmax_read_tiles_backward.cu",
    ),
    "scores in base 2, stream": (
        "softmax_read",
        "softmax_read.cu",
        "s[i] = exponential(s[i] - base)",
        "s[i] = exp2f(s[i] * kLog2e - base * kLog2e)",
        "softmax_read.cu",
    ),
    "scores in base 2, tiles": (
        "softmax_read",
        "softmax_read_tiles.cu",
        "power_of_two((s[n][i] - base) * kLog2e + lift)",
        "power_of_two(s[n][i] * kLog2e - base * kLog2e + lift)",
        "softmax_read_tiles.cu",
    ),
    "scores in base 2, a write": (
        "softmax_write",
        "gate_fragments.h",
        "at_most_zero(score(scale, x[j][i], added(j, i)) - row.top);",
        "score(scale, x[j][i], added(j, i)) * kLog2e - row.top * kLog2e;",
        "gated_write_tiles.cu",
    ),
    "weights from the lse, parts": (
        "merge_reads",
        "merge_reads.cu",
        "exponential(lse(s) - base) / sum",
        "exponential(lse(s) - (base + logf(sum)))",
        "merge_reads.cu",
    ),
    "weights from the lse, chosen slots": (
        "topk_read",
        "topk_search.cu",
        "const float e = list[j] == 0 ? 0.f : exponential(score_of(list[j]) - top);",
        "const float e = list[j] == 0 ? 0.f : exponential(score_of(list[j]) - (top + logf(sum))) * sum;",
        "topk_search.cu",
    ),
}


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    op, *change = FAULTS[fault]
    assert wrong_in(broken(tmp_path, *change), op), fault
