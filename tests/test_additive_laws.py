"""Equations that additive_read must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

B, T, N, K, V = 2, 11, 37, 20, 13


def case(*lead: int, t: int = T, n: int = N, k: int = K, v: int = V):
    """query, keys, values, score_vector."""
    return randn(*lead, t, k), randn(*lead, n, k, seed=1), randn(*lead, n, v, seed=2), randn(*lead, k, seed=3)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 5, 2, 4), (T, N, K, V), (40, 300, 33, 9)])
def test_equals_the_written_out_definition(backend, sizes):
    t, n, k, v = sizes
    query, keys, values, u = case(t=t, n=n, k=k, v=v)
    read, lse = mk.additive_read(query, keys, values, u, return_lse=True, backend=backend)
    for row in range(t):
        s = torch.stack([(u * torch.tanh(query[row] + keys[i])).sum() for i in range(n)])
        close(lse[row], s.exp().sum().log())
        close(read[row], (s.exp() / s.exp().sum()) @ values)


def test_gradients_are_those_of_the_formula(native):
    """Against derivatives written by hand: 1 - tanh^2, and the softmax's weight times deviation from the mean."""
    query, keys, values, u = (x.requires_grad_() for x in case())
    mask = randn(N, seed=5).requires_grad_()
    dr, dl = randn(T, V, seed=6), randn(T, seed=7)
    read, lse = mk.additive_read(query, keys, values, u, slot_mask=mask, return_lse=True, backend=native)
    got = torch.autograd.grad((read * dr).sum() + (lse * dl).sum(), (query, keys, values, u, mask))
    with torch.no_grad():
        h = torch.tanh(query[:, None] + keys[None])
        p = torch.softmax(h @ u + mask, -1)
        dp = dr @ values.T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True) + dl[:, None])
        dh = ds[..., None] * u * (1 - h * h)
        wanted = dh.sum(1), dh.sum(0), p.T @ dr, torch.einsum("tn,tna->a", ds, h), ds.sum(0)
    for g, w in zip(got, wanted):
        close(g, w)


def test_slots_may_be_permuted(backend):
    query, keys, values, u = case(B)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    mask = randn(B, N)
    got = mk.additive_read(
        query, keys[:, order], values[:, order], u, slot_mask=mask[:, order], return_lse=True, backend=backend
    )
    for g, w in zip(got, mk.additive_read(query, keys, values, u, slot_mask=mask, return_lse=True, backend=backend)):
        close(g, w)


@pytest.mark.parametrize("cut", [0, 1, 17, N])
def test_parts_merge_to_the_whole(backend, cut):
    query, keys, values, u = case(B)
    whole = mk.additive_read(query, keys, values, u, return_lse=True, backend=backend)
    parts = [
        mk.additive_read(query, keys[:, at], values[:, at], u, return_lse=True, backend=backend)
        for at in (slice(0, cut), slice(cut, N))
    ]
    for g, w in zip(mk.merge_reads(*zip(*parts), backend=backend), whole):
        close(g, w)


def test_a_masked_slot_is_as_if_absent(backend):
    query, keys, values, u = case(B)
    keep = torch.arange(N) % 3 != 1
    keys, values = (x.masked_fill(~keep[:, None], torch.nan) for x in (keys, values))
    wanted = mk.additive_read(query, keys[:, keep], values[:, keep], u, backend=backend)
    close(mk.additive_read(query, keys, values, u, slot_mask=keep, backend=backend), wanted)
    numbers = torch.zeros(N).double().masked_fill(~keep, -torch.inf)
    close(mk.additive_read(query, keys, values, u, slot_mask=numbers, backend=backend), wanted)


def test_a_number_added_to_a_slot_multiplies_its_share(backend):
    query, keys, values, u = case()
    mask = torch.zeros(N).double()
    mask[4] = 2.0
    doubled = torch.cat([keys, keys[4:5]]), torch.cat([values, values[4:5]])
    many = torch.cat([torch.zeros(N), torch.tensor([2.0]).expm1().log()]).double()
    close(
        mk.additive_read(query, keys, values, u, slot_mask=mask, backend=backend),
        mk.additive_read(query, *doubled, u, slot_mask=many, backend=backend),
        1e-6,
    )


def test_nothing_addressable_reads_zero(backend):
    query, keys, values, u = (x.requires_grad_() for x in case(B))
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[1, 3] = True
    read, lse = mk.additive_read(query, keys, values, u, slot_mask=mask, return_lse=True, backend=backend)
    assert (read[0] == 0).all() and torch.isneginf(lse[0]).all()
    close(read[1].detach(), values[1, 3].detach().expand(T, V))
    for x in torch.autograd.grad(read.square().sum() + lse[1].sum(), (query, keys, values, u)):
        assert torch.isfinite(x).all() and (x[0] == 0).all()
    read, lse = mk.additive_read(query, keys[:, :0], values[:, :0], u, return_lse=True, backend=backend)
    assert (read == 0).all() and torch.isneginf(lse).all()


def test_heads_have_their_own_score_vectors(backend):
    query, keys, values, _ = case(B, 3)
    u = randn(3, K, seed=9)
    got = mk.additive_read(query, keys, values, u, backend=backend)
    for b in range(B):
        for h in range(3):
            close(got[b, h], mk.additive_read(query[b, h], keys[b, h], values[b, h], u[h], backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_units_are_exactly_one(backend, dtype):
    """tanh of a large number is 1 and its derivative 0: no overflow, no NaN."""
    query, keys, values, u = (x.to(dtype) for x in case())
    query = (1e4 * torch.sign(query)).requires_grad_()
    read, lse = mk.additive_read(query, keys, values, u, return_lse=True, backend=backend)
    s = (torch.sign(query.detach()) * u).sum(-1).double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    close(lse.detach().double(), s + torch.tensor(float(N)).log().double(), max(tolerance, 1e-7))
    close(read.detach().double(), values.double().mean(0).expand(T, V), tolerance)
    (gradient,) = torch.autograd.grad(lse.sum(), query)
    assert (gradient == 0).all()


def test_small_sums_keep_their_digits(native):
    """tanh(x) is x where x is small: a form like 1 - 2 / (1 + exp(2x)) alone would lose every digit."""
    query, keys = 1e-6 * randn(T, K).float(), torch.zeros(N, K)
    u, values = torch.full((K,), 1e6), torch.zeros(N, 1)
    _, lse = mk.additive_read(query, keys, values, u, return_lse=True, backend=native)
    wanted = 1e6 * torch.tanh(query.double()).sum(-1) + torch.tensor(float(N)).double().log()
    close(lse.double(), wanted, 1e-5)


def test_a_frozen_score_vector_changes_no_other_gradient(native):
    query, keys, values, u = case(B)
    first = [x.clone().requires_grad_() for x in (query, keys, values)]
    mk.additive_read(*first, u, backend=native).square().sum().backward()
    second = [x.clone().requires_grad_() for x in (query, keys, values, u)]
    mk.additive_read(*second, backend=native).square().sum().backward()
    assert all(bits(a.grad) == bits(b.grad) for a, b in zip(first, second))
