"""NeuralCache against its equation, written here as plain loops in float64, and learning."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn
from torch.nn import functional as F

from memkernels.nn import NeuralCache

B, T, N, K, W = 2, 7, 4, 3, 5


def cache_of(backend=None) -> NeuralCache:
    return NeuralCache(N, K, mix=0.3, theta=1.5, backend=backend).double()


def text(streams=B, length=T):
    """Logits, hidden states and targets."""
    targets = torch.randint(W, (streams, length), generator=torch.Generator().manual_seed(1))
    return randn(streams, length, W), randn(streams, length, K), targets


@torch.no_grad()
@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_nll_is_its_equation(backend):
    cache, (logits, hidden, targets) = cache_of(backend), text()
    got, _ = cache.nll(logits, hidden, targets, cache.initial_state(B))
    mix, theta = cache.mix.item(), cache.theta.item()
    assert (mix, theta) == pytest.approx((0.3, 1.5))
    for b in range(B):
        for t in range(T):
            own = torch.softmax(logits[b, t], -1)[targets[b, t]]
            entries = range(max(0, t - N), t)
            score = {j: math.exp(theta * float(hidden[b, t] @ hidden[b, j])) for j in entries}
            votes = sum(s for j, s in score.items() if targets[b, j] == targets[b, t])
            p = (1 - mix) * own + mix * votes / sum(score.values()) if score else own
            close(got[b, t], -torch.log(p))


@torch.no_grad()
def test_a_text_at_once_equals_position_by_position():
    cache, (logits, hidden, targets) = cache_of(), text()
    whole, after = cache.nll(logits, hidden, targets, cache.initial_state(B))
    state, parts = cache.initial_state(B), []
    for t in range(T):
        at = slice(t, t + 1)
        log_probs = cache.log_probs(logits[:, at], hidden[:, at], state)
        close(torch.logsumexp(log_probs, -1), torch.zeros(B, 1, dtype=torch.float64))
        parts.append(-log_probs.gather(-1, targets[:, at, None]).squeeze(-1))
        state = cache.append(hidden[:, at], targets[:, at], state)
    close(torch.cat(parts, 1), whole)
    assert torch.equal(state.keys, after.keys) and torch.equal(state.tokens, after.tokens)
    first, state = cache.nll(logits[:, :3], hidden[:, :3], targets[:, :3], cache.initial_state(B))
    second, _ = cache.nll(logits[:, 3:], hidden[:, 3:], targets[:, 3:], state)
    close(torch.cat([first, second], 1), whole)


def test_gradients_of_the_cache():
    cache, (logits, hidden, targets) = cache_of(), text()
    logits.requires_grad_()
    state = cache.append(hidden, targets, cache.initial_state(B))
    parameters = list(cache.parameters())
    assert torch.autograd.gradcheck(lambda *_: cache.nll(logits, hidden, targets, state)[0], (logits, *parameters))
    hidden.requires_grad_()
    assert not cache.append(hidden, targets, state).keys.requires_grad, "entries carry no gradient"


def test_mix_and_theta_are_learnt_over_a_frozen_model():
    """The model predicts nothing; the same 12 contexts recur, each followed by its own token."""
    torch.manual_seed(0)
    contexts, following = F.normalize(torch.randn(12, 16), dim=-1), torch.randint(W, (12,))
    cache = NeuralCache(64, 16)
    optimizer = torch.optim.Adam(cache.parameters(), lr=0.2)
    state, losses = cache.initial_state(2), []
    for _ in range(80):
        at = torch.randint(12, (2, 32))
        nll, state = cache.nll(torch.zeros(2, 32, W), contexts[at], following[at], state)
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
        losses.append(nll.mean().item())
    assert losses[0] > 1.0 and sum(losses[-20:]) / 20 < 0.2, losses
    assert cache.mix > 0.9 and cache.theta > 2.0


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match="NeuralCache: mix must lie between 0 and 1, got 1"):
        NeuralCache(N, K, mix=1)
    with pytest.raises(ValueError, match="NeuralCache: theta must be above 0, got 0"):
        NeuralCache(N, K, theta=0)
    cache = cache_of()
    with pytest.raises(ValueError, match=r"state.keys must be \[2, 4, 3\], got \[5, 4, 3\]"):
        cache.append(torch.zeros(B, T, K), torch.zeros(B, T, dtype=torch.int64), cache.initial_state(5))
    with pytest.raises(ValueError, match=r"K=3\] and tokens \[..., T\], got \[2, 7, 3\] and \[2, 6\]"):
        cache.append(torch.zeros(B, T, K), torch.zeros(B, T - 1, dtype=torch.int64), cache.initial_state(B))
