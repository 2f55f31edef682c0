"""Product-key search and read against those of all pairs, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, K = 2, 9, 6


def pairs(subkeys):
    """The n * n keys that the subkeys stand for: [..., 2, n, h] -> [..., n * n, 2h]."""
    n = subkeys.shape[-2]
    first = subkeys[..., 0, :, :].repeat_interleave(n, -2)
    second = subkeys[..., 1, :, :].repeat(*[1] * (subkeys.dim() - 3), n, 1)
    return torch.cat([first, second], -1)


def written_out(query, subkeys, k, scale):
    """Every score in a loop, ordered by (score descending, slot ascending)."""
    n, h = subkeys.shape[-2:]
    scores, slots = [], []
    for q in query:
        row = [
            (-float(scale * (q[:h] @ subkeys[0, i] + q[h:] @ subkeys[1, j])), i * n + j)
            for i in range(n)
            for j in range(n)
        ]
        row = [*sorted(row)[:k], *[(torch.inf, -1)] * (k - n * n)]
        scores.append([-s for s, _ in row])
        slots.append([i for _, i in row])
    return torch.tensor(scores, dtype=query.dtype), torch.tensor(slots)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
@pytest.mark.parametrize("k", [1, 5, 20, 300])
@pytest.mark.parametrize("scale", [None, -1.5, 0.0])
def test_equals_the_written_out_search(backend, n, k, scale):
    """Also for k > n and k > n * n. With a scale of 0 all pairs are equal: the result is the first slots in order."""
    query, subkeys = randn(T, K), randn(2, n, K // 2, seed=1)
    scores, indices = mk.product_key_search(query, subkeys, k, scale=scale, backend=backend)
    wanted, slots = written_out(query, subkeys, k, K**-0.5 if scale is None else scale)
    close(scores, wanted)
    assert torch.equal(indices, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(5, 7), (31, 32), (64, 9), (40, 700)])
def test_equal_sums_go_to_the_smaller_slot(backend, dtype, n, k):
    """Small integers: arithmetic is exact and most sums tie with others, within a row of pairs and across rows."""
    query, subkeys = randn(40, K).round().to(dtype), randn(2, n, K // 2, seed=1).round().to(dtype)
    got = mk.product_key_search(query, subkeys, k, scale=1.0, backend=backend)
    wanted = mk.topk_search(query, pairs(subkeys), k, scale=1.0, backend="reference")
    assert torch.equal(got[1], wanted[1]) and torch.equal(got[0], wanted[0])


@pytest.mark.parametrize("k", [4, 33])
def test_equals_the_search_of_all_pairs(backend, k):
    query, subkeys = randn(B, T, K, seed=3), randn(B, 2, 25, K // 2)
    got = mk.product_key_search(query, subkeys, k, backend=backend)
    wanted = mk.topk_search(query, pairs(subkeys), k, backend="reference")
    close(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_gradients_are_those_of_the_search_of_all_pairs(native):
    query, subkeys = randn(B, 3, T, K, seed=3).requires_grad_(), randn(B, 1, 2, 11, K // 2).requires_grad_()
    d = randn(B, 3, T, 20)
    grads = []
    for scores in (
        mk.product_key_search(query, subkeys, 20, backend=native)[0],
        mk.topk_search(query, pairs(subkeys), 20, backend="reference")[0],
    ):
        grads.append(torch.autograd.grad((scores * d).sum(), (query, subkeys)))
    for got, want in zip(*grads):
        close(got, want)


def test_rows_that_nobody_chose_have_no_gradient(native):
    query, subkeys = randn(1, K), randn(2, 50, K // 2, seed=1).requires_grad_()
    scores, indices = mk.product_key_search(query, subkeys, 3, backend=native)
    (gradient,) = torch.autograd.grad(scores.sum(), subkeys)
    chosen = torch.zeros(2, 50, dtype=torch.bool)
    chosen[0, indices // 50], chosen[1, indices % 50] = True, True
    assert torch.equal((gradient != 0).any(-1), chosen)


def test_the_two_lists_may_trade_places(backend):
    """Slot i * n + j becomes j * n + i."""
    n, k = 13, 20
    query, subkeys = randn(T, K), randn(2, n, K // 2, seed=1)
    scores, indices = mk.product_key_search(query, subkeys, k, backend=backend)
    other = torch.cat([query[:, K // 2 :], query[:, : K // 2]], -1)
    again, swapped = mk.product_key_search(other, subkeys.flip(0), k, backend=backend)
    close(again, scores)
    assert torch.equal(swapped % n * n + swapped // n, indices)


def test_it_finds_the_values_of_a_large_memory(backend):
    """Search, softmax and sparse read make the layer: the same as a read of the k best of all pairs."""
    n, k = 12, 8
    query, subkeys, values = randn(T, K), randn(2, n, K // 2, seed=1), randn(n * n, 5)
    scores, indices = mk.product_key_search(query, subkeys, k, backend=backend)
    got = mk.sparse_read(values, indices, torch.softmax(scores, -1), backend=backend)
    close(got, mk.topk_read(query, pairs(subkeys), values, k, backend="reference"))


@pytest.mark.parametrize("half", [0, 1])
def test_an_infinite_score_wins_and_a_negative_one_is_never_chosen(backend, half):
    query, subkeys = torch.ones(1, 4).double(), torch.zeros(2, 5, 2).double()
    subkeys[half, 3, 0], subkeys[half, 1, 0] = torch.inf, -torch.inf
    scores, indices = mk.product_key_search(query, subkeys, 25, scale=1.0, backend=backend)
    rows = indices[0] // 5 if half == 0 else indices[0] % 5
    assert (rows[:5] == 3).all() and (scores[0, :5] == torch.inf).all()
    assert (scores[0, 5:20] == 0).all() and not (rows[:20] == 1).any()
    assert (indices[0, 20:] == -1).all() and torch.isneginf(scores[0, 20:]).all()


@pytest.mark.parametrize(("n", "k"), [(5, 1), (5, 9), (12, 8), (4, 20)])
def test_the_read_is_that_of_all_pairs(backend, n, k):
    """Forward and gradients; also for k > n and k > n * n."""
    leaves = (randn(B, T, K, seed=3), randn(2, n, K // 2), randn(n * n, 5))
    query, subkeys, values = (x.requires_grad_() for x in leaves)
    found = mk.product_key_read(query, subkeys, values, k, return_slots=True, backend=backend)
    wanted = mk.topk_read(query, pairs(subkeys), values, k, return_slots=True, backend="reference")
    assert torch.equal(found[1], wanted[1])
    cotangents = [randn(*x.shape, seed=5) for x in found[::2]]
    for got, want in zip(found[::2], wanted[::2]):
        close(got.detach(), want.detach())
    gradients = [torch.autograd.grad(results[::2], leaves, cotangents) for results in (found, wanted)]
    for got, want in zip(*gradients):
        close(got, want)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_read_is_its_formula(backend, scale):
    """Every score in a loop, the best of them, their softmax, their rows."""
    n, k = 6, 7
    query, subkeys, values = randn(T, K), randn(2, n, K // 2, seed=1), randn(n * n, 4)
    read, indices, weights = mk.product_key_read(
        query, subkeys, values, k, scale=scale, return_slots=True, backend=backend
    )
    scores, slots = written_out(query, subkeys, k, K**-0.5 if scale is None else scale)
    assert torch.equal(indices, slots)
    shares = torch.tensor([[math.exp(s - max(row)) for s in row] for row in scores.tolist()], dtype=torch.float64)
    shares /= shares.sum(-1, keepdim=True)
    close(weights, shares)
    close(read, torch.stack([sum(w * values[i] for w, i in zip(p, s)) for p, s in zip(shares, slots.tolist())]))


def test_the_read_touches_only_rows_that_were_chosen(native):
    """Other rows may be NaN, and have no gradient; the rows that were read have all of it."""
    n, k = 40, 3
    query, subkeys, values = randn(1, K), randn(2, n, K // 2, seed=1), randn(n * n, 4)
    _, slots, weights = mk.product_key_read(query, subkeys, values, k, return_slots=True, backend="reference")
    chosen = torch.zeros(n * n, dtype=torch.bool)
    chosen[slots[0]] = True
    subkeys.requires_grad_()
    values = values.masked_fill(~chosen.unsqueeze(-1), torch.nan).requires_grad_()
    read = mk.product_key_read(query, subkeys, values, k, backend=native)
    of_subkeys, of_values = torch.autograd.grad(read.square().sum(), (subkeys, values))
    close(read.detach(), weights @ values.detach()[slots[0]])
    close(of_values[slots[0]], weights.mT @ (2 * read.detach()))
    assert torch.equal((of_values != 0).any(-1), chosen)
    rows = torch.zeros(2, n, dtype=torch.bool)
    rows[0, slots // n], rows[1, slots % n] = True, True
    assert torch.equal((of_subkeys != 0).any(-1), rows)


def test_a_read_of_no_slots_is_zero(backend):
    subkeys, values = randn(2, 0, K // 2), randn(0, 4)
    read, indices, weights = mk.product_key_read(randn(T, K), subkeys, values, 3, return_slots=True, backend=backend)
    assert (read == 0).all() and (indices == -1).all() and (weights == 0).all()
