"""What cache_nll tells of the model's own distribution: log-sum-exp, the largest probability, the entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import close, randn
from torch.distributions import Categorical

import memkernels as mk

B, T, W, N = 2, 9, 23, 15
NAMES = ("lse", "largest", "entropy")


def case(*lead: int, t: int = T, w: int = W, n: int = N):
    """logits, targets, cache_scores, cache_tokens, mix."""
    random = torch.Generator().manual_seed(1)
    return (
        3 * randn(*lead, t, w),
        torch.randint(0, w, (*lead, t), generator=random),
        2 * randn(*lead, t, n, seed=2),
        torch.randint(-1, w, (*lead, t, n), generator=random),
        torch.rand((*lead, t), generator=random, dtype=torch.float64),
    )


def stats(logits, backend, n: int = 0):
    """Of logits in a call with ``n`` entries."""
    _, targets, scores, tokens, mix = case(*logits.shape[:-2], t=logits.shape[-2], n=n)
    targets, tokens = targets.clamp(max=logits.shape[-1] - 1), tokens.clamp(max=logits.shape[-1] - 1)
    exact = torch.promote_types(logits.dtype, torch.float32)
    given = logits, targets, scores.to(exact), tokens, mix.to(exact)
    return mk.cache_nll(*given, return_stats=True, backend=backend)[1]


def of_torch(logits):
    """The same by torch.distributions."""
    known = Categorical(logits=logits)
    return torch.logsumexp(logits, -1), known.probs.amax(-1), known.entropy()


@pytest.mark.parametrize("lead", [(), (B,)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (T, W, N), (3, 5000, 0), (40, 7, 3)])
def test_equal_those_of_torch_distributions(backend, lead, sizes):
    logits = case(*lead, t=sizes[0], w=sizes[1])[0]
    found = stats(logits, backend, sizes[2])
    for name, wanted in zip(NAMES, of_torch(logits)):
        close(getattr(found, name), wanted, 1e-12)


@pytest.mark.parametrize("kind", ["plain", "ties", "masked words"])
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 1, 2), (0, 2)])
def test_gradients_are_those_of_torch(backend, chosen, kind):
    logits = case(B, w=2100)[0]  # more than a block of words
    if kind == "ties":
        logits = (logits * 2).round() / 2
        logits[..., 5] = logits[..., 2090] = logits.amax(-1)
    z = logits.requires_grad_()
    masked = z.masked_fill(torch.arange(2100) % 3 == 0, -torch.inf) if kind == "masked words" else z
    d = [randn(B, T, seed=4 + i) for i in range(3)]
    found, wanted = stats(masked, backend, 4), of_torch(masked if kind != "masked words" else z[..., _kept(2100)])
    got = torch.autograd.grad(sum((found[i] * d[i]).sum() for i in chosen), z, retain_graph=True)[0]
    close(got, torch.autograd.grad(sum((wanted[i] * d[i]).sum() for i in chosen), z)[0], 1e-12)


def _kept(w):
    return torch.arange(w) % 3 != 0


def test_gradients_of_the_loss_and_the_stats_add_up(backend):
    logits, targets, scores, tokens, mix = case(B)
    targets[0, 0] = -1
    leaves = [x.requires_grad_() for x in (logits, scores, mix)]
    d = [randn(B, T, seed=4 + i) for i in range(4)]
    nll, found = mk.cache_nll(leaves[0], targets, leaves[1], tokens, leaves[2], return_stats=True, backend=backend)
    results = [nll, *found]
    together = torch.autograd.grad(sum((r * x).sum() for r, x in zip(results, d)), leaves, retain_graph=True)
    for got, leaf in zip(together, leaves):
        each = [
            torch.autograd.grad((r * x).sum(), leaf, retain_graph=True, allow_unused=True)[0]
            for r, x in zip(results, d)
        ]
        close(got, sum(x for x in each if x is not None), 1e-12)


def test_gradients_of_any_order(backend):
    _, targets, scores, tokens, mix = case(t=3, w=5, n=4)
    logits = (torch.arange(15).view(3, 5) * 0.37).sin().double().requires_grad_()

    def run(z):
        nll, found = mk.cache_nll(z, targets, scores, tokens, mix, return_stats=True, backend=backend)
        return nll, *found

    assert torch.autograd.gradcheck(run, logits)
    assert torch.autograd.gradgradcheck(run, logits)


def test_the_rest_of_a_call_does_not_matter_to_them_nor_they_to_the_loss(backend):
    logits, targets, scores, tokens, mix = case(B)
    plain = mk.cache_nll(logits, targets, scores, tokens, mix, backend=backend)
    nll, first = mk.cache_nll(logits, targets, scores, tokens, mix, return_stats=True, backend=backend)
    assert torch.equal(plain, nll)
    targets[0, 3], tokens[1] = -1, -1
    _, second = mk.cache_nll(logits, targets, scores + 1, tokens, 0.9, return_stats=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("offset", [0.0, -(2.0**20), 2.0**20, -3e38])
def test_a_number_added_to_all_logits_moves_the_lse_alone(backend, offset):
    words = (torch.randint(-64, 64, (T, 300), generator=torch.Generator().manual_seed(0)) / 8).float()
    moved = words + offset
    found = stats(moved, backend, 3)
    lse = torch.logsumexp(moved.double(), -1)
    _, largest, entropy = of_torch(moved.double() - moved.double().amax(-1, keepdim=True))
    torch.testing.assert_close(found.lse.double(), lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.largest.double(), largest, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=2e-6, atol=2e-6)


def test_entropy_of_a_uniform_and_of_a_certain_distribution(backend):
    even, sure = torch.zeros(1, 50_000), torch.zeros(1, 50_000)
    sure[0, 49_999] = 200
    found = stats(torch.cat([even, sure]), backend)
    torch.testing.assert_close(found.entropy, torch.tensor([np.log(50_000), 0]).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.largest, torch.tensor([1 / 50_000, 1]).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_read_as_they_are(native, dtype):
    logits = case(w=4100)[0].to(dtype)
    found, wanted = stats(logits, native, 4), stats(logits.float(), native, 4)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, wanted))


def test_masked_words_do_not_count(backend):
    logits = case()[0]
    masked = logits.masked_fill(torch.arange(W) % 4 != 1, -torch.inf)
    for got, wanted in zip(stats(masked, backend), stats(logits[:, 1::4], backend)):
        close(got, wanted, 1e-12)


def test_without_any_word(backend):
    """Every logit is -inf, or there are no words: -inf, 0 and 0, without gradient."""
    z = torch.full((T, W), -torch.inf, dtype=torch.float64).index_fill(0, torch.tensor([2]), 1.0).requires_grad_()
    _, _, scores, tokens, mix = case()
    given = torch.full((T,), -1), scores, tokens, mix
    found = mk.cache_nll(z, *given, return_stats=True, backend=backend)[1]
    nothing = torch.arange(T) != 2
    assert torch.isneginf(found.lse[nothing]).all() and all((x[nothing] == 0).all() for x in found[1:])
    (d,) = torch.autograd.grad(sum(x[:].masked_fill(torch.isinf(x), 0).sum() for x in found), z)
    assert (d[nothing] == 0).all() and torch.isfinite(d[2]).all() and d[2].abs().sum() > 0
    none = mk.cache_nll(z.detach()[:, :0], given[0], scores, torch.full_like(tokens, -1), mix, return_stats=True)[1]
    assert torch.isneginf(none.lse).all() and all((x == 0).all() for x in none[1:])


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_nan_stays_in_its_token(backend, wild):
    logits, targets, scores, tokens, mix = case(w=2100)
    clean = mk.cache_nll(logits, targets, scores, tokens, mix, return_stats=True, backend=backend)
    logits[4, 1000] = wild
    found = mk.cache_nll(logits, targets, scores, tokens, mix, return_stats=True, backend=backend)
    for got, wanted in zip((found[0], *found[1]), (clean[0], *clean[1])):
        assert torch.isnan(got[4])
        others = torch.arange(T) != 4
        assert torch.equal(got[others], wanted[others])


def test_a_mix_that_depends_on_them(backend):
    """The first call has no entries; its loss and a mixture by hand equal a second call with the mix."""
    logits, targets, scores, tokens, _ = case(B)
    targets[:, ::2] = tokens[:, ::2, 3].clamp(min=0)
    none = logits.new_empty(B, T, 0)
    own, found = mk.cache_nll(logits, targets, none, none.long(), 0, return_stats=True, backend=backend)
    mix = 0.5 * (1 - found.largest) * torch.sigmoid(found.entropy)
    shares = torch.where(tokens == -1, -torch.inf, scores).softmax(-1)
    cached = (shares * (tokens == targets[..., None])).sum(-1)
    wanted = -torch.log((1 - mix) * torch.exp(-own) + mix * cached)
    close(mk.cache_nll(logits, targets, scores, tokens, mix, backend=backend), wanted, 1e-12)


@pytest.mark.parametrize("op", ["cache_nll", "cache_logprobs"])
def test_mix_is_a_number_or_a_tensor(backend, op):
    logits, targets, scores, tokens, _ = case(B)
    extra = (targets,) if op == "cache_nll" else ()
    run = getattr(mk, op)
    full = torch.full((B, T), 0.25, dtype=torch.float64)
    wanted = run(logits, *extra, scores, tokens, full, backend=backend)
    for mix in (0.25, np.float32(0.25), torch.tensor(0.25), full[0, 0], full[0], full[:, :1].expand(B, T), full[:1]):
        assert torch.equal(run(logits, *extra, scores, tokens, mix, backend=backend), wanted)
    for mix, number in ((0, 0.0), (1, 1.0), (np.int64(1), 1.0), (True, None), ("half", None), (-0.1, None)):
        if number is None:
            with pytest.raises((TypeError, ValueError), match=f"{op}: mix must be"):
                run(logits, *extra, scores, tokens, mix, backend=backend)
        else:
            exact = run(logits, *extra, scores, tokens, torch.full_like(full, number), backend=backend)
            assert torch.equal(run(logits, *extra, scores, tokens, mix, backend=backend), exact)


@pytest.mark.parametrize("op", ["cache_nll", "cache_logprobs"])
def test_a_mix_of_no_dimension_gets_its_gradient(backend, op):
    logits, targets, scores, tokens, _ = case(B)
    extra = (targets,) if op == "cache_nll" else ()
    one = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    each = torch.full((B, T), 0.25, dtype=torch.float64, requires_grad=True)
    d = [
        torch.autograd.grad(getattr(mk, op)(logits, *extra, scores, tokens, m, backend=backend).sum(), m)[0]
        for m in (one, each)
    ]
    assert d[0].shape == () and d[1].abs().sum() > 0
    close(d[0], d[1].sum(), 1e-12)


def test_compiled_exported_and_under_autocast():
    logits, targets, scores, tokens, mix = (x.float() if x.is_floating_point() else x for x in case(B))

    def run(z):
        nll, found = mk.cache_nll(z, targets, scores, tokens, mix, return_stats=True)
        return nll.sum() + (found.lse * found.largest + found.entropy).sum()

    class Model(torch.nn.Module):
        def forward(self, z):
            return run(z)

    z = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(run(z), z)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(z), z)
    close(got, wanted, 1e-6)
    close(torch.export.export(Model(), (logits,)).module()(logits), run(logits), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = mk.cache_nll(logits.bfloat16(), targets, scores, tokens, mix, return_stats=True)[1]
    exact = stats(logits.bfloat16().double(), "reference")
    assert all(x.dtype == torch.float32 for x in low)
    for a, b in zip(low, exact):
        close(a.double(), b, 1e-5)
