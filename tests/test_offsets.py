"""Softmax laws where scores are large: adding a number to every score changes no weight, and weights sum to one.

The expected results are computed here in float64 from the inputs of the op, without the library's own softmax. float32
represents the scores exactly, so any error comes from the arithmetic of the op.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import BACKENDS

import memkernels as mk

OFFSETS = (-3e38, -2.4e38, -1e30, -1e9, -1e7, -1e6, 0.0, 1e6, 1e9, 1e30, 3e38)
SIZES = (
    (1, 2),
    (3, 130),
    (40, 130),
    (40, 3000),
)  # tokens and slots: few and many tokens, one range of slots and several
CLOSE = {"rtol": 2e-6, "atol": 1e-7}


def moved(c, n):
    """Float scores [n]: c, and for every third slot c less 1 or less two float32 spacings, whichever is larger."""
    c = torch.tensor(c, dtype=torch.float32)
    unit = torch.maximum(torch.ones(()), 2 * (torch.nextafter(c.abs(), torch.tensor(torch.inf)) - c.abs()))
    lower = c - unit
    return torch.where(torch.arange(n) % 3 == 1, lower if torch.isfinite(lower) else c, c)


def truth(scores):
    """Softmax over the last axis in float64."""
    return torch.softmax(scores.double(), -1)


def values_of(n):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "slots"), SIZES)
@pytest.mark.parametrize("c", OFFSETS)
def test_reads_and_their_gradients_do_not_see_an_offset(c, tokens, slots, backend):
    mask, values = moved(c, slots).requires_grad_(), values_of(slots).requires_grad_()
    query, keys = torch.zeros(tokens, 4, requires_grad=True), torch.zeros(slots, 4)
    weights = truth(mask.detach())
    d = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(1))
    vector = torch.ones(4)
    reads = {
        "softmax_read": lambda: mk.softmax_read(query, keys, values, slot_mask=mask, return_lse=True, backend=backend),
        "additive_read": lambda: mk.additive_read(
            query, keys, values, vector, slot_mask=mask, return_lse=True, backend=backend
        ),
    }
    for name, run in reads.items():
        read, lse = run()
        torch.testing.assert_close(read.double(), (weights @ values.double()).expand(tokens, 5), **CLOSE, msg=name)
        torch.testing.assert_close(lse, torch.logsumexp(mask.double(), -1).float().expand(tokens), rtol=3e-7, atol=1e-6)
        dv, dm = torch.autograd.grad((read * d).sum(), (values, mask))
        torch.testing.assert_close(dv.double(), weights[:, None] * d.double().sum(0), rtol=1e-5, atol=1e-5)
        dp = values.detach().double() @ d.double().sum(0)
        torch.testing.assert_close(
            dm.double(), weights * (dp - weights @ dp), rtol=1e-4, atol=1e-5 * float(dp.abs().max())
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "slots"), SIZES)
@pytest.mark.parametrize("c", OFFSETS)
def test_weights_sum_to_one_at_any_offset(c, tokens, slots, backend):
    mask = moved(c, slots)
    query, keys = torch.zeros(tokens, 4), torch.zeros(slots, 4)
    weights = truth(mask)
    got = mk.address(query, keys, slot_mask=mask, backend=backend)
    torch.testing.assert_close(got.double(), weights.expand(tokens, slots), **CLOSE)
    k = min(slots, 8)
    *_, chosen = mk.topk_read(query, keys, values_of(slots), k, slot_mask=mask, return_slots=True, backend=backend)
    best = mask.sort(descending=True, stable=True).values[:k]
    torch.testing.assert_close(chosen.double(), truth(best).expand(tokens, k), **CLOSE)
    # The share 1 - weight of the memory that a write leaves, once for each token.
    written = mk.softmax_write(
        torch.ones(slots, 1), keys, query, torch.zeros(tokens, 1), slot_mask=mask, backend=backend
    )
    torch.testing.assert_close(written[:, 0].double(), (1 - weights) ** tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", OFFSETS)
def test_scan_reads_do_not_see_an_offset(c, backend):
    tokens, slots = 9, 70
    mask = moved(c, slots)
    zeros = torch.zeros(tokens, 4)
    values = values_of(slots).requires_grad_()
    # A large mask opens the gate of the write; writing the value that is there changes nothing.
    reads, _ = mk.memory_scan(
        values,
        torch.zeros(slots, 4),
        zeros,
        zeros,
        torch.zeros(tokens, 5),
        slot_mask=mask,
        read_first=True,
        backend=backend,
    )
    first = truth(mask) @ values.double()
    torch.testing.assert_close(reads[0].double(), first, **CLOSE)
    (dv,) = torch.autograd.grad(reads[0].sum(), values)
    torch.testing.assert_close(dv.double(), truth(mask)[:, None].expand(slots, 5), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", OFFSETS)
@pytest.mark.parametrize("words", [3, 70])
def test_losses_do_not_see_an_offset_of_the_logits(c, words, backend):
    logits = moved(c, words).repeat(4, 1).requires_grad_()
    own = torch.log_softmax(logits.detach().double(), -1)
    tokens, scores = torch.tensor([[1, 1, 0]]).repeat(4, 1), torch.full((4, 3), c if c > -1e38 else 0.0)
    mix = 0.25
    cached = torch.zeros(4, words, dtype=torch.float64)
    cached[:, 0], cached[:, 1] = 1 / 3, 2 / 3
    p = (1 - mix) * own.exp() + mix * cached
    targets = torch.tensor([0, 1, 2, 2])
    nll = mk.cache_nll(logits, targets, scores, tokens, mix, backend=backend)
    torch.testing.assert_close(nll.double(), -p.log().gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    (d,) = torch.autograd.grad(nll.sum(), logits)
    share = ((1 - mix) * own.exp() / p).gather(1, targets[:, None])
    one_hot = torch.nn.functional.one_hot(targets, words)
    torch.testing.assert_close(d.double(), -share * (one_hot - own.exp()), rtol=1e-5, atol=1e-6)
    logprobs = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    log_p = torch.where(cached == 0, own + math.log(1 - mix), p.log())  # its exponential may underflow
    torch.testing.assert_close(logprobs.double(), log_p, rtol=1e-6, atol=1e-6)
    (d,) = torch.autograd.grad(logprobs[:, 2].sum(), logits)
    torch.testing.assert_close(
        d.double(), (torch.nn.functional.one_hot(torch.full((4,), 2), words) - own.exp()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", OFFSETS)
def test_merged_reads_do_not_see_an_offset(c, backend):
    parts = 4
    lses = moved(c, parts)[:, None].repeat(1, 6).requires_grad_()
    reads = torch.randn(parts, 6, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    read, lse = mk.merge_reads(reads, lses, backend=backend)
    weights = truth(lses.detach().T)
    torch.testing.assert_close(read.double(), torch.einsum("ts,stv->tv", weights, reads.double()), **CLOSE)
    torch.testing.assert_close(lse.double(), torch.logsumexp(lses.double(), 0), rtol=2e-7, atol=1e-6)
    d_reads, d_lses = torch.autograd.grad(read.sum(), (reads, lses))
    torch.testing.assert_close(d_reads.double(), weights.T[..., None].expand(parts, 6, 5), **CLOSE)
    dp = reads.detach().double().sum(-1)
    wanted = weights.T * (dp - (weights.T * dp).sum(0))
    torch.testing.assert_close(d_lses.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("size", "scale"), [(1e4, 1.0), (1e15, 1e-3), (1e-15, 1e30), (1e-15, 1e38), (1e15, 1e-30), (1.0, 1e30)]
)
def test_large_scores_of_products(size, scale, tokens, backend):
    """Equal scores of any size share their weight; a score of half that size has a share only where both are small."""
    query, values = torch.full((tokens, 1), size), torch.tensor([[0.0], [1.0], [4.0]], requires_grad=True)
    keys = torch.tensor([[size], [size], [size / 2]])
    s = (scale * (query.double() @ keys.double().T))[0]
    weights = truth(s)
    read = mk.softmax_read(query, keys, values, scale=scale, backend=backend)
    torch.testing.assert_close(read.double(), (weights @ values.double()).expand(tokens, 1), rtol=1e-5, atol=1e-6)
    (dv,) = torch.autograd.grad(read.sum(), values)
    torch.testing.assert_close(dv.double()[:, 0], tokens * weights, rtol=1e-5, atol=1e-5)
    got = mk.address(query, keys, scale=scale, backend=backend)
    torch.testing.assert_close(got.double(), weights.expand(tokens, 3), rtol=1e-5, atol=1e-6)
    # A token whose scores cancel with the mask: the rest after cancellation decides.
    mask = torch.tensor([-float(s[0].float()), -float(s[0].float()), 0.0])
    if abs(float(s[0])) < 1e9:
        left = truth(s + mask.double())
        got = mk.address(query, keys, scale=scale, slot_mask=mask, backend=backend)
        torch.testing.assert_close(got.double(), left.expand(tokens, 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", [-1e6, -1e3, 1e3, 1e6])
def test_usage_is_off_by_no_more_than_the_rounding_of_the_lse(c, backend):
    mask = moved(c, 9)
    query, keys = torch.zeros(5, 4), torch.zeros(9, 4)
    _, lse = mk.softmax_read(query, keys, values_of(9), slot_mask=mask, return_lse=True, backend=backend)
    usage = mk.slot_usage(query, keys, lse, slot_mask=mask, backend=backend)
    exact = torch.exp(mask.double() - lse[0].double()) * 5
    torch.testing.assert_close(usage.double(), exact, rtol=1e-5, atol=1e-6)
    half = abs(c) * 2**-24
    assert bool(((usage / 5 / truth(mask)).log().abs() <= 1.01 * half + 1e-5).all())
