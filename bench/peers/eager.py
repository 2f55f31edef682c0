"""Plain PyTorch, vectorised: the form an author writes who knows PyTorch well. Forms [T, N]."""

from __future__ import annotations

import torch

NAME = "eager"
DIRECTIONS = ("forward", "backward")
QUICK = True


def softmax_read(query, keys, values):
    scale = query.shape[-1] ** -0.5
    return lambda: torch.softmax(scale * query @ keys.mT, -1) @ values


def slot_usage(query, keys, lse):
    scale = query.shape[-1] ** -0.5
    return lambda: torch.exp(scale * query @ keys.mT - lse.unsqueeze(-1)).sum(-2)


def written(values, keys, query, write):
    gate = torch.sigmoid(keys @ (query.shape[-1] ** -0.5 * query).mT)  # [N, T]
    return interpolated(values, gate, write)


def interpolated(values, gate, write):
    """Suffix products in log space: what token t writes is kept by the tokens after it. gate: [N, T].

    Tokens run along the last axis, where a cumulative sum is contiguous and fastest.
    """
    log_kept = torch.cumsum(torch.log1p(-gate), -1)
    total = log_kept[..., -1:]
    return torch.exp(total) * values + (gate * torch.exp(total - log_kept)) @ write


def softmax_write(values, keys, query, write):
    scale = query.shape[-1] ** -0.5
    return lambda: interpolated(values, torch.softmax(keys @ (scale * query).mT, 0), write)


def gated_write(values, keys, query, write):
    return lambda: written(values, keys, query, write)


def topk_search(query, keys, k):
    scale = query.shape[-1] ** -0.5
    return lambda: torch.topk(scale * query @ keys.mT, k)[0]


def topk_read(query, keys, values, k):
    scale = query.shape[-1] ** -0.5

    def run():
        scores, indices = torch.topk(scale * query @ keys.mT, k)
        return weighted_rows(values, indices, torch.softmax(scores, -1))

    return run


def sparse_read(values, indices, weights):
    return lambda: weighted_rows(values, indices, weights)


def weighted_rows(values, indices, weights):
    return (weights.unsqueeze(-2) @ values[indices]).squeeze(-2)
