"""Equations that cache_logprobs and cache_nll must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, W, N = 2, 9, 23, 15


def case(*lead: int, t: int = T, w: int = W, n: int = N):
    """logits, targets, cache_scores, cache_tokens, mix. Few words: some occur often in the cache, some never."""
    random = torch.Generator().manual_seed(1)
    return (
        3 * randn(*lead, t, w),
        torch.randint(0, w, (*lead, t), generator=random),
        2 * randn(*lead, t, n, seed=2),
        torch.randint(-1, w, (*lead, t, n), generator=random),
        torch.rand((*lead, t), generator=random, dtype=torch.float64),
    )


def dense(logits, scores, tokens, mix):
    """The mixture as probabilities, word by word."""
    p = torch.empty_like(logits)
    shares = torch.where(tokens == -1, -torch.inf, scores).softmax(-1)
    for w in range(logits.shape[-1]):
        p[..., w] = (1 - mix) * logits.softmax(-1)[..., w] + mix * torch.where(tokens == w, shares, 0).sum(-1)
    return p


@pytest.mark.parametrize("sizes", [(1, 1, 1), (T, W, N), (3, 1000, 200), (40, 7, 3)])
def test_equals_the_dense_formula(backend, sizes):
    logits, _, scores, tokens, mix = case(t=sizes[0], w=sizes[1], n=sizes[2])
    tokens[:, 0] = 0  # every row has an entry
    got = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    close(got.exp(), dense(logits, scores, tokens, mix), 1e-12)
    close(got.exp().sum(-1), torch.ones(sizes[0]).double(), 1e-12)


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0, "tensor"])
def test_the_loss_is_the_log_probability_of_the_target(backend, mix):
    logits, targets, scores, tokens, mixes = case(B)
    mix = mixes if mix == "tensor" else mix
    targets[0], targets[1, 0] = tokens[0, :, 2].clamp(min=0), -1
    loss = mk.cache_nll(logits, targets, scores, tokens, mix, backend=backend)
    logprobs = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    wanted = -logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    close(loss, wanted.masked_fill(targets == -1, 0))


def test_gradients_of_the_loss_are_those_of_the_log_probability(native):
    """Of both kernels, against derivatives written by hand: the model's share and the cache's share."""
    logits, targets, scores, tokens, mix = case(B)
    tokens[..., 0], targets[:, ::2] = 1, tokens[:, ::2, 3].clamp(min=0)
    leaves = [x.requires_grad_() for x in (logits, scores, mix)]
    d = randn(B, T)
    loss = mk.cache_nll(logits, targets, scores, tokens, mix, backend=native)
    got = torch.autograd.grad((loss * d).sum(), leaves)
    logprobs = mk.cache_logprobs(logits, scores, tokens, mix, backend=native)
    other = torch.autograd.grad(-(logprobs.gather(-1, targets[..., None]).squeeze(-1) * d).sum(), leaves)
    with torch.no_grad():
        own, shares = logits.softmax(-1), torch.where(tokens == -1, -torch.inf, scores).softmax(-1)
        hit = (tokens == targets[..., None]).double()
        p_own, p_cache = own.gather(-1, targets[..., None]), (shares * hit).sum(-1, keepdim=True)
        m = mix[..., None]
        p = (1 - m) * p_own + m * p_cache
        one = torch.nn.functional.one_hot(targets, W).double()
        wanted = (
            -d[..., None] * (1 - m) * p_own / p * (one - own),
            -d[..., None] * m / p * shares * (hit - p_cache),
            (-d[..., None] * (p_cache - p_own) / p).squeeze(-1),
        )
    for g, o, w in zip(got, other, wanted):
        close(g, w)
        close(o, w)


def test_no_mix_is_the_model_and_all_mix_is_the_cache(backend):
    logits, targets, scores, tokens, _ = case(B)
    tokens[..., 0] = 5
    close(mk.cache_logprobs(logits, scores, tokens, 0, backend=backend), logits.log_softmax(-1))
    alone = mk.cache_logprobs(logits, scores, tokens, 1, backend=backend)
    close(alone.exp(), dense(logits, scores, tokens, torch.ones(B, T).double()))
    never = ~(tokens.unsqueeze(-1) == torch.arange(W)).any(-2)
    assert torch.isneginf(alone[never]).all()
    loss = mk.cache_nll(logits, targets, scores, tokens, 1, backend=backend)
    assert torch.equal(torch.isposinf(loss), never.gather(-1, targets.unsqueeze(-1)).squeeze(-1))


def test_words_of_probability_zero_give_no_gradient(backend):
    logits, targets, scores, tokens, _ = case()
    tokens[:] = 3
    targets[:] = 4
    targets[0] = 3
    leaves = [x.requires_grad_() for x in (logits, scores, torch.ones(T).double())]
    loss = mk.cache_nll(logits, targets, scores, tokens, leaves[2], backend=backend)
    for x in torch.autograd.grad(loss[0] + loss[1:].sum(), leaves):
        assert torch.isfinite(x).all() and (x[1:] == 0).all()


@pytest.mark.parametrize("empty", ["scores", "tokens", "both", "no entries"])
def test_an_empty_cache_leaves_the_model(backend, empty):
    logits, targets, scores, tokens, mix = case(B)
    if empty == "no entries":
        scores, tokens = scores[..., :0], tokens[..., :0]
    if empty in ("scores", "both"):
        scores = scores.masked_fill(torch.arange(N) % (1 if empty == "scores" else 2) == 0, -torch.inf)
    if empty in ("tokens", "both"):
        tokens = tokens.masked_fill(torch.arange(N) % (1 if empty == "tokens" else 2) < 2, -1)
    leaves = [x.requires_grad_() for x in (logits, scores, mix)]
    logprobs = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    close(logprobs.detach(), logits.detach().log_softmax(-1))
    loss = mk.cache_nll(logits, targets, scores, tokens, mix, backend=backend)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    close(loss.detach(), plain.detach())
    d_logits, *others = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    close(d_logits, torch.autograd.grad(plain.sum(), logits)[0])
    assert all(x is None or (x == 0).all() for x in others)


def test_an_empty_entry_is_as_if_absent(backend):
    logits, targets, scores, tokens, mix = case(B)
    keep = torch.arange(N) % 4 != 1
    wanted = mk.cache_logprobs(logits, scores[..., keep], tokens[..., keep], mix, backend=backend)
    for s, j in (
        (scores.masked_fill(~keep, -torch.inf), tokens),
        (scores.masked_fill(~keep, torch.nan), tokens.masked_fill(~keep, -1)),
    ):
        close(mk.cache_logprobs(logits, s, j, mix, backend=backend), wanted)
        loss = mk.cache_nll(logits, targets, s, j, mix, backend=backend)
        close(loss, -wanted.gather(-1, targets.unsqueeze(-1)).squeeze(-1))


def test_entries_of_one_word_add_up(backend):
    """An entry cut in two of half the weight changes nothing; order does not matter either."""
    logits, _, scores, tokens, mix = case()
    wanted = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    half = torch.cat([scores - torch.tensor(2.0).log(), scores - torch.tensor(2.0).log()], -1)
    order = torch.randperm(2 * N, generator=torch.Generator().manual_seed(0))
    got = mk.cache_logprobs(logits, half[:, order], torch.cat([tokens, tokens], -1)[:, order], mix, backend=backend)
    close(got, wanted)


def test_numbers_added_to_all_scores_or_logits_change_nothing(backend):
    logits, _, scores, tokens, mix = case()
    wanted = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    close(mk.cache_logprobs(logits + 700, scores - 900, tokens, mix, backend=backend), wanted)


@pytest.mark.parametrize("part", [(0, 0), (0, slice(1)), (slice(B), slice(1)), (slice(1), slice(T)), (0, slice(T))])
def test_tokens_broadcast(backend, part):
    """[N], [1, N], [B, 1, N], [1, T, N] and [T, N]."""
    logits, targets, scores, tokens, mix = case(B)
    tokens = tokens[part]
    full = tokens.expand(B, T, N)
    for op, extra in ((mk.cache_logprobs, ()), (mk.cache_nll, (targets,))):
        got = op(logits, *extra, scores, tokens, mix, backend=backend)
        close(got, op(logits, *extra, scores, full.contiguous(), mix, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_float32(backend, dtype):
    logits, targets, scores, tokens, mix = case()
    low = logits.to(dtype), scores.to(dtype)
    got = mk.cache_nll(low[0], targets, low[1], tokens, mix.float(), backend=backend)
    assert got.dtype == mk.cache_logprobs(*low, tokens, 0.5, backend=backend).dtype == torch.float32
    exact = mk.cache_nll(low[0].double(), targets, low[1].double(), tokens, mix.float().double(), backend="reference")
    close(got.double(), exact, 1e-5)


@pytest.mark.parametrize("wild", [W, -2, 2**40, -(2**63)])
def test_a_word_out_of_range_is_refused(backend, wild):
    logits, targets, scores, tokens, mix = case()
    wrong = tokens.clone()
    wrong[4, 7] = wild
    calls = [
        ("cache_logprobs", "cache_tokens", lambda: mk.cache_logprobs(logits, scores, wrong, mix, backend=backend)),
        ("cache_nll", "cache_tokens", lambda: mk.cache_nll(logits, targets, scores, wrong, mix, backend=backend)),
        ("cache_nll", "targets", lambda: mk.cache_nll(logits, wrong[:, 7], scores, tokens, mix, backend=backend)),
    ]
    for op, argument, run in calls:
        with pytest.raises((RuntimeError, IndexError)) as caught:
            run()
        if backend == "cpu":
            assert str(caught.value) == f"{op}: {argument} must be in [-1, {W}), got {wild}"


def test_a_masked_word_has_no_probability_and_no_gradient(backend):
    logits, targets, scores, tokens, mix = case()
    tokens[:], targets[:], targets[1] = 3, 5, 4
    logits[:, 4] = -torch.inf
    leaves = [x.requires_grad_() for x in (logits, scores, mix)]
    logprobs = mk.cache_logprobs(logits, scores, tokens, mix, backend=backend)
    assert torch.isneginf(logprobs[:, 4]).all()
    live = torch.arange(W) != 4
    for x in torch.autograd.grad((logprobs[:, live] * randn(T, W - 1)).sum(), leaves):
        assert torch.isfinite(x).all()
    loss = mk.cache_nll(logits, targets, scores, tokens, mix, backend=backend)
    assert torch.isposinf(loss[1]) and torch.isfinite(loss[torch.arange(T) != 1]).all()


@pytest.mark.parametrize("w", [32_000, 32_003])
def test_a_large_gradient_is_the_same_wherever_its_memory_comes_from(w):
    """Non-temporal stores where rows end at register boundaries; on fresh pages and on reused ones."""
    t, n = 140, 5
    logits, targets, scores, tokens, mix = case(t=t, w=w, n=n)
    leaves = [logits.float().requires_grad_(), scores.float().requires_grad_(), mix.float().requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    d = randn(t, seed=3).float()

    def gradients(z, c, m, backend):
        return torch.autograd.grad(mk.cache_nll(z, targets, c, tokens, m, backend=backend), (z, c, m), d.to(z.dtype))

    wanted = gradients(*exact, "reference")
    first = [x.clone() for x in gradients(*leaves, "cpu")]
    for _ in range(3):  # memory freed here is reused in the next round
        again = gradients(*leaves, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(again, first))
        del again
    for got, want in zip(first, wanted):
        close(got.double(), want, 1e-6)
