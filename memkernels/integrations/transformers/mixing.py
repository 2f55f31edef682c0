"""How much of the next token's distribution comes from the model, from a store's neighbours, and from the cache.

    p(w) = m_0 softmax(logits)[w] + sum_s m_s sum_{j: token_sj = w} softmax_j(-d_sj / T_s),     m_0 + m_1 + m_2 = 1
    m_s = n_s min(1, h / h_0)^2

``d_sj`` are the squared distances of the entries found in source s. n are constants to begin with, and a small network
of what was found once they are learned: nothing is computed from the logits, which are large. ``h`` is how often the
store's nearest record was right for the last tokens of the text, and ``h_0`` the 5% quantile of that where n was
learned: a text of another domain, where it is seldom right, hardly reads the memory.

Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models (constant share);
He et al. 2021, Efficient Nearest Neighbor Language Models (shares learned from features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

SOURCES = ("store", "cache")
_FEATURES = 1 + 6 * len(SOURCES)
_QUANTILE = 0.05  # 5% cost the least of 5, 10 and 20%; the square less than higher powers, and was enough
_HIDDEN = 16
_NEVER = -1e30  # finite, so that gradients of what is masked are 0 and not NaN


class Found(NamedTuple):
    """Entries of one source, nearest first: distances ``[..., k]``, +inf where there is none; tokens ``[..., k]``."""

    distances: Tensor
    tokens: Tensor


class Past(NamedTuple):
    """Of the text before a token: ``entries [...]``, how many the cache holds; ``rates [..., 2]``, how often the
    nearest entry of each source was right."""

    entries: Tensor
    rates: Tensor


class Mixing(nn.Module):
    """The shares of the sources and the weights of their entries.

    Args:
        shares: m of the store and of the cache to begin with. temperature: T to begin with.
    """

    usual: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, shares: Sequence[float], temperature: float):
        super().__init__()
        own = 1 - sum(shares)
        self.log_temperature = nn.Parameter(torch.full((len(SOURCES),), math.log(temperature)))
        self.hidden = nn.Linear(_FEATURES, _HIDDEN)
        self.shares = nn.Linear(_HIDDEN, 1 + len(SOURCES))
        nn.init.zeros_(self.shares.weight)
        with torch.no_grad():
            self.shares.bias.copy_(torch.tensor([math.log(x) if x > 0 else _NEVER for x in (own, *shares)]))
        self.register_buffer("usual", torch.zeros(()))  # h_0
        self.register_buffer("mean", torch.zeros(_FEATURES))
        self.register_buffer("deviation", torch.ones(_FEATURES))

    def forward(self, found: Sequence[Found], past: Past) -> tuple[Tensor, list[Tensor]]:
        """Log shares ``[..., 3]``, the model's first, and the log weights ``[..., k]`` of each source's entries, which
        sum to 1 (all ``_NEVER`` where it has none)."""
        weights = [self._weights(source, number) for number, source in enumerate(found)]
        there = [torch.isfinite(source.distances[..., 0]) for source in found]
        x = self.features(found, weights, past)
        shares = self.shares(torch.tanh(self.hidden((x - self.mean) / self.deviation)))
        absent = torch.stack([torch.zeros_like(there[0]), *(~x for x in there)], -1)
        shares = torch.softmax(shares.masked_fill(absent, _NEVER), -1)[..., 1:]
        trust = torch.where(self.usual > 0, past.rates[..., :1] / self.usual, 1).clamp(max=1).square()
        shares = shares * trust
        own = 1 - shares.sum(-1, keepdim=True)
        return torch.log(torch.cat([own, shares], -1).clamp(min=1e-30)), weights

    def _weights(self, source: Found, number: int) -> Tensor:
        there = torch.isfinite(source.distances)
        near = torch.where(there, source.distances, 0) * torch.exp(-self.log_temperature[number])
        return torch.log_softmax(-near.masked_fill(~there, -_NEVER), -1).masked_fill(~there, _NEVER)

    def features(self, found: Sequence[Found], weights: Sequence[Tensor], past: Past) -> Tensor:
        """What the shares depend on: ``[..., 13]``, without gradient."""
        rows = [torch.log1p(past.entries.float()), *past.rates.unbind(-1)]
        for source, log_weights in zip(found, weights):
            there = torch.isfinite(source.distances)
            near = torch.where(there, source.distances, 0)
            share = log_weights.exp() * there
            best = (share * (source.tokens == source.tokens[..., :1])).sum(-1)  # of the token that the nearest names
            entropy = -(share * torch.log(share + 1e-9)).sum(-1)
            spread = near.amax(-1) - near[..., 0]
            rows += [there[..., 0].float(), near[..., 0], best, entropy, spread]
        return torch.stack(rows, -1).detach()

    def mixture(self, found: Sequence[Found], past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``[..., 2k]``, tokens ``[..., 2k]`` and mix ``[...]`` for :func:`memkernels.cache_logprobs`."""
        shares, weights = self(found, past)
        scores = torch.cat([w + shares[..., 1 + i : 2 + i] for i, w in enumerate(weights)], -1)
        none = torch.cat([~torch.isfinite(source.distances) for source in found], -1)
        tokens = torch.cat([source.tokens for source in found], -1)
        mix = -torch.expm1(shares[..., 0].clamp(max=0))
        return scores.masked_fill(none, -torch.inf), tokens.masked_fill(none, -1), mix.clamp(0, 1)

    def nll(self, found: Sequence[Found], past: Past, targets: Tensor, own: Tensor) -> Tensor:
        """The loss ``[...]`` of targets ``[...]``, to which the model alone gives the log-probability ``own``."""
        shares, weights = self(found, past)
        parts = [shares[..., 0] + own]
        for number, (source, log_weights) in enumerate(zip(found, weights)):
            hit = log_weights.masked_fill(source.tokens != targets[..., None], _NEVER).logsumexp(-1)
            parts.append(shares[..., 1 + number] + hit)
        return -torch.stack(parts, -1).logsumexp(-1)


class Recorded(NamedTuple):
    """Positions of texts, for learning: what was found, and what the model alone said of the token that followed."""

    store: Found
    cache: Found
    past: Past
    targets: Tensor
    own: Tensor


def learn(mixing: Mixing, data: Recorded, *, steps: int, lr: float, batch: int, seed: int) -> list[float]:
    """Minimise the loss over the parameters of ``mixing`` by AdamW; the loss of each step.

    Temperatures begin at a fifth of the distance between the nearest entry and the last, where that can be told.
    """
    order = torch.Generator().manual_seed(seed)
    found = (data.store, data.cache)
    with torch.no_grad():
        for number, source in enumerate(found):
            full = torch.isfinite(source.distances[:, -1])
            if bool(full.any()):
                spread = (source.distances[full, -1] - source.distances[full, 0]).median()
                mixing.log_temperature[number] = torch.log(spread / 5 + 1e-4)
        x = mixing.features(found, [mixing._weights(s, i) for i, s in enumerate(found)], data.past)
        mixing.usual.copy_(torch.quantile(data.past.rates[:, 0][: 2**20], _QUANTILE))
        mixing.mean.copy_(x.mean(0))
        mixing.deviation.copy_(x.std(0) + 1e-3 if len(x) > 1 else torch.ones_like(x[0]))
    optimizer = torch.optim.AdamW(mixing.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / max(steps, 1))
    losses = []
    for _ in range(steps):
        at = torch.randint(len(data.targets), (batch,), generator=order).to(data.targets.device)
        some = [Found(source.distances[at], source.tokens[at]) for source in found]
        past = Past(*(x[at] for x in data.past))
        loss = mixing.nll(some, past, data.targets[at], data.own[at]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
