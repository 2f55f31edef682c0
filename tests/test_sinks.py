"""A sink, and the lse of reads of chosen slots, against the softmax written out, on every backend."""

from __future__ import annotations

import functools

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

B, T, N, K, V, k = 2, 5, 23, 6, 4, 7
QUERY, KEYS, VALUES = randn(B, T, K), randn(B, N, K, seed=1), randn(B, N, V, seed=2)
SINK = randn(B, T, seed=3)
SLOTS = (QUERY @ KEYS.mT).topk(k).indices
INF = torch.inf
OPS = ("softmax_read", "topk_read", "selected_read")


def whole(query, keys, values, sink, mask=0.0):
    """Softmax over the slots and the sink, which is one more slot of value 0."""
    scores = torch.cat([K**-0.5 * query @ keys.mT + mask, sink.expand(query.shape[:-1]).unsqueeze(-1)], -1)
    weights = torch.softmax(scores, -1)[..., :-1]
    return weights @ values, torch.logsumexp(scores, -1), weights


def best(count):
    """0 at the ``count`` best slots of every token and -inf elsewhere."""
    scores = K**-0.5 * QUERY @ KEYS.mT
    return torch.full_like(scores, -INF).scatter(-1, scores.topk(count).indices, 0.0)


def read(op, backend, *tensors, **options):
    """read and lse of ``op``; selected_read is given the slots that topk_read finds."""
    if op == "topk_read":
        return mk.topk_read(*tensors, k, return_lse=True, backend=backend, **options)
    run = mk.softmax_read if op == "softmax_read" else functools.partial(mk.selected_read, indices=SLOTS)
    return run(*tensors, return_lse=True, backend=backend, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sink", [SINK, SINK[:, :1], SINK[0], torch.tensor(0.4, dtype=torch.float64), -0.7])
def test_a_sink_is_one_more_slot_of_value_zero(backend, op, sink):
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEYS, VALUES)]
    leaves += [sink.clone().requires_grad_()] if isinstance(sink, torch.Tensor) else []
    given = leaves[3] if len(leaves) > 3 else sink
    got = read(op, backend, *leaves[:3], sink=given)
    number = given if isinstance(given, torch.Tensor) else torch.tensor(given, dtype=torch.float64)
    wanted = whole(*leaves[:3], number, 0.0 if op == "softmax_read" else best(k))[:2]
    for a, b in zip(got, wanted):
        close(a, b)
    for a, b in zip(*(torch.autograd.grad(r.sin().sum() + x.cos().sum(), leaves) for r, x in (got, wanted))):
        close(a, b)


def test_the_weights_beside_a_sink(backend):
    _, indices, weights, _ = mk.topk_read(
        QUERY, KEYS, VALUES, k, sink=SINK, return_slots=True, return_lse=True, backend=backend
    )
    close(weights, whole(QUERY, KEYS, VALUES, SINK, best(k))[2].gather(-1, indices))
    _, weights, _ = mk.selected_read(
        QUERY, KEYS, VALUES, SLOTS, sink=SINK, return_weights=True, return_lse=True, backend=backend
    )
    close(weights, whole(QUERY, KEYS, VALUES, SINK, best(k))[2].gather(-1, SLOTS))


@pytest.mark.parametrize("op", OPS)
def test_the_edges_of_a_sink(backend, op):
    """-inf changes no bit, +inf takes all, NaN stays with its token, and so does a memory without slots."""
    plain, lse = read(op, backend, QUERY, KEYS, VALUES)
    for none in (-INF, torch.full((T,), -INF, dtype=torch.float64)):
        got = read(op, backend, QUERY, KEYS, VALUES, sink=none)
        assert bits(got[0]) == bits(plain) and bits(got[1]) == bits(lse)
    sink = SINK[0].clone()
    sink[1], sink[2], sink[3] = INF, torch.nan, -INF
    got = read(op, backend, QUERY, KEYS, VALUES, sink=sink)
    assert (got[0][:, 1] == 0).all() and (got[1][:, 1] == INF).all()
    assert got[0][:, 2].isnan().all() and got[1][:, 2].isnan().all()
    assert bits(got[0][:, 3]) == bits(plain[:, 3]) and not got[0][:, [0, 4]].isnan().any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sink", [-INF, 0.5, INF])
def test_no_open_slot_and_a_sink(backend, op, sink):
    """The read is 0, lse is the sink, gradients of both orders are finite, also where both are -inf."""
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEYS, VALUES, torch.full((T,), sink, dtype=torch.float64))]
    mask = torch.zeros(N, dtype=torch.bool)
    out, lse = read(op, backend, *leaves[:3], slot_mask=mask, sink=leaves[3])
    assert (out == 0).all() and (lse == sink).all()
    first = torch.autograd.grad(out.sum() + lse.sum(), leaves, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert (first[3] == (B if sink == 0.5 else 0)).all()


def test_a_sink_far_from_the_scores_has_finite_second_derivatives(backend):
    for far in (-300.0, 300.0):
        leaves = [x.clone().requires_grad_() for x in (QUERY, KEYS, VALUES, SINK + far)]
        results = mk.softmax_read(*leaves[:3], sink=leaves[3], return_lse=True, backend=backend)
        first = torch.autograd.grad(sum(r.square().sum() for r in results), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert all(g.isfinite().all() for g in (*first, *second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sink_beside_16_bits(backend, dtype):
    """Multiplied in float32 and rounded once; the sink may be float32."""
    tensors = [x.to(dtype) for x in (QUERY, KEYS, VALUES)]
    for sink in (SINK.to(dtype), SINK.float()):
        got, lse = mk.softmax_read(*tensors, sink=sink, return_lse=True, backend=backend)
        plain, own = mk.softmax_read(*tensors, return_lse=True, backend=backend)
        assert got.dtype == dtype and lse.dtype == torch.float32
        close(got, (plain.double() * torch.sigmoid(own.double() - sink.double()).unsqueeze(-1)).to(dtype), 1e-2)


def test_wrong_sinks_are_one_sentence(backend):
    wrong = [
        (randn(3, B, T), ValueError, r"sink must broadcast to \[2, 5\], \[\.\.\., T\], got \[3, 2, 5\]"),
        (SINK[:, :2], ValueError, r"sink must broadcast to \[2, 5\], \[\.\.\., T\], got \[2, 2\]"),
        (SINK.float(), TypeError, "sink must be float64, got float32"),
        (SINK > 0, TypeError, "sink must be float64, got bool"),
        ("zero", TypeError, r"sink must be a number or a tensor that broadcasts to \[\.\.\., T\], got str"),
        (True, TypeError, r"sink must be a number or a tensor that broadcasts to \[\.\.\., T\], got bool"),
        (torch.nan, ValueError, r"sink must be a number or a tensor that broadcasts to \[\.\.\., T\], got nan"),
        (SINK.to("meta"), ValueError, "sink must be on cpu, got meta"),
    ]
    for sink, error, sentence in wrong:
        for op in ("softmax_read", "topk_read"):
            with pytest.raises(error, match=f"^{op}: {sentence}$"):
                read(op, backend, QUERY, KEYS, VALUES, sink=sink)


@pytest.mark.parametrize("mask", ["none", "empty slots", "no slots"])
def test_the_lse_of_chosen_slots(backend, mask):
    open_slots = {"none": torch.ones(N), "empty slots": torch.arange(N) < 3, "no slots": torch.zeros(N)}[mask].bool()
    scores, _ = mk.topk_search(QUERY, KEYS, k, slot_mask=open_slots, backend="reference")
    got = mk.topk_read(QUERY, KEYS, VALUES, k, slot_mask=open_slots, return_lse=True, backend=backend)
    close(got[1], torch.logsumexp(scores, -1))


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_lse_of_chosen_pairs(backend, n):
    subkeys, values = randn(2, n, K // 2, seed=4), randn(n * n, V, seed=5)
    scores, _ = mk.product_key_search(QUERY, subkeys, k, backend="reference")
    plain = mk.product_key_read(QUERY, subkeys, values, k, return_slots=True, backend=backend)
    *same, lse = mk.product_key_read(QUERY, subkeys, values, k, return_slots=True, return_lse=True, backend=backend)
    close(lse, torch.logsumexp(scores, -1))
    assert all(bits(a) == bits(b) for a, b in zip(same, plain))


def test_best_slots_and_local_attention_merge_to_the_softmax_over_both(backend):
    """The read of memorizing transformers: chosen slots of a memory beside a causal window, as one softmax."""
    near_keys, near_values = randn(B, T, K, seed=6), randn(B, T, V, seed=7)
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEYS, VALUES, near_keys, near_values)]
    q, x, v, nx, nv = leaves
    far = mk.topk_read(q, x, v, k, return_lse=True, backend=backend)
    causal = torch.zeros(T, T, dtype=torch.float64).masked_fill(~torch.ones(T, T).tril().bool(), -INF)
    local = K**-0.5 * q @ nx.mT + causal
    near = (torch.softmax(local, -1) @ nv, torch.logsumexp(local, -1))
    read_all, lse = mk.merge_reads([far[0], near[0]], [far[1], near[1]], backend=backend)
    scores = torch.cat([K**-0.5 * q @ x.mT + best(k), local], -1)
    wanted = torch.softmax(scores, -1) @ torch.cat([v, nv], -2)
    close(read_all, wanted)
    close(lse, torch.logsumexp(scores, -1))
    for a, b in zip(*(torch.autograd.grad(r.sin().sum(), leaves, retain_graph=True) for r in (read_all, wanted))):
        close(a, b)
