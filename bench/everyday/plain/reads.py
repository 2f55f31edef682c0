"""Reads and searches in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from ...peers import eager
from .form import Form, closed, exact, masked, rows, scored


def weights(query, keys, slot_mask=None, gate="softmax"):
    scores = scored(query, keys, slot_mask)
    return torch.softmax(scores, -1) if gate == "softmax" else torch.sigmoid(scores)


def read(query, keys, values, slot_mask=None, slot_range=None):
    return torch.softmax(scored(query, keys, slot_mask, slot_range), -1).to(values.dtype) @ values


def _heads(x: Tensor, dims: int) -> Tensor:
    """[B, H, ...] of a tensor whose query has ``dims`` dimensions: the order that SDPA is fast in."""
    x = x[(None,) * (dims - x.dim())]
    return x if dims == 4 else x.unsqueeze(1) if dims == 3 else x[None, None]


def attention(query, keys, values, slot_mask=None, slot_range=None, causal=False):
    """Keys and values that streams share are expanded, without a copy."""
    q, k, v = (_heads(x, query.dim()) for x in (query, keys, values))
    k, v = (x.expand(*q.shape[:2], -1, -1) for x in (k, v))
    bias = None if slot_mask is None else _heads(slot_mask.unsqueeze(-2), query.dim())
    if bias is not None and bias.is_floating_point():
        bias = bias.to(query.dtype)
    if slot_range is not None and not causal:
        bias = ~closed(slot_range, keys.shape[-2])
    found = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    return found.reshape(*query.shape[:-1], values.shape[-1])


def causal_attention(query, keys, values, slot_range):
    return attention(query, keys, values, causal=True)


def is_causal(query, keys, slot_range=None, **rest) -> bool:
    """Does SDPA's own causal mask say the same as the range?"""
    square = slot_range is not None and query.shape[-2] == keys.shape[-2]
    return square and not slot_range[..., 0].any()


def folded_attention(query, keys, values, slot_mask=None):
    """One memory [N, K] is read as by one head with the tokens of all."""
    return attention(query.reshape(-1, query.shape[-1]), keys, values, slot_mask).reshape(
        *query.shape[:-1], values.shape[-1]
    )


def one_memory(query, keys, slot_range=None, **rest) -> bool:
    return keys.dim() == 2 and query.dim() > 2 and slot_range is None


def best(query, keys, k, slot_mask=None, slot_range=None):
    return torch.topk(scored(query, keys, slot_mask, slot_range), k)


def best_exact(query, keys, k, slot_mask=None):
    """Scores in float32: those rounded to 8 bits choose other slots."""
    return torch.topk(scored(query.float(), keys.float(), slot_mask), k)


def best_read(query, keys, values, k, slot_mask=None, search=best):
    scores, indices = search(query, keys, k, slot_mask)
    return summed(values, indices, torch.softmax(scores, -1).to(values.dtype))


def best_read_exact(**arguments):
    return best_read(**arguments, search=best_exact)


def in_16_bits(query, **rest) -> bool:
    return query.dtype == torch.bfloat16


def summed(values, indices, weights):
    return (weights.unsqueeze(-2) @ rows(values, indices)).squeeze(-2)


def indexed(values, indices, weights):
    return eager.weighted_rows(values, indices, weights)


def bag(values, indices, weights):
    k, width = indices.shape[-1], values.shape[-1]
    found = embedding_bag(indices.reshape(-1, k), values, mode="sum", per_sample_weights=weights.reshape(-1, k))
    return found.reshape(*indices.shape[:-1], width)


def one_table(values, **rest) -> bool:
    return values.dim() == 2


def best_pairs(query, subkeys, k):
    """Scores and slots of the k best of n * n pairs: the k best of each list, their sums, the k best of those."""
    halves = torch.einsum("...tch,...cnh->...ctn", query.unflatten(-1, (2, -1)), query.shape[-1] ** -0.5 * subkeys)
    scores, at = torch.topk(halves, min(k, subkeys.shape[-2]))
    (first, second), (i, j) = (x.unbind(-3) for x in (scores, at))
    sums, pair = torch.topk((first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2), k)
    width = second.shape[-1]
    return sums, i.gather(-1, pair // width) * subkeys.shape[-2] + j.gather(-1, pair % width)


def pair_read(query, subkeys, values, k):
    scores, slots = best_pairs(query, subkeys, k)
    return summed(values, slots, torch.softmax(scores, -1))


def chosen_scores(query, keys, indices):
    return (rows(keys, indices) @ (query.shape[-1] ** -0.5 * query).unsqueeze(-1)).squeeze(-1)


def chosen_read(query, keys, values, indices):
    return summed(values, indices, torch.softmax(chosen_scores(query, keys, indices), -1))


def heads_best(query, head_weights, keys, k, slot_range=None):
    """query [..., T, H, K]: one product for all heads of all tokens."""
    products = torch.relu((query.shape[-1] ** -0.5 * query).flatten(-3, -2) @ keys.mT)
    scores = (head_weights.unsqueeze(-2) @ products.unflatten(-2, query.shape[-3:-1])).squeeze(-2)
    if slot_range is not None:
        scores = scores.masked_fill(closed(slot_range, keys.shape[-2]), -torch.inf)
    return torch.topk(scores, k)


def additive(query, keys, values, score_vector, slot_mask=None):
    hidden = torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3))
    return torch.softmax(masked(hidden @ score_vector, slot_mask), -1) @ values


def usage(query, keys, lse, slot_mask=None):
    return torch.exp(exact(scored(query, keys, slot_mask)) - lse.unsqueeze(-1)).sum(-2)


def merged(reads, lses):
    """reads [S, ..., T, V], lses [S, ..., T]."""
    return (torch.softmax(lses, 0).to(reads.dtype).unsqueeze(-1) * reads).sum(0), torch.logsumexp(lses, 0)


def merged_two(reads, lses):
    (one, other), (first, second) = reads, lses
    lse = torch.logaddexp(first, second)
    shares = (torch.exp(x - lse).to(reads.dtype).unsqueeze(-1) for x in (first, second))
    return next(shares) * one + next(shares) * other, lse


def paged(query, keys, pages, k):
    scores, at = torch.topk(scored(query, keys.flatten(-3, -2)), k)
    size = keys.shape[-2]
    return scores, pages[at // size] * size + at % size


def embedded(values, indices, value_scale=None, dtype=None):
    return F.embedding(indices, values) if value_scale is None else eager.embedded(values, indices, value_scale, dtype)


FORMS = {
    "address": (Form("eager", weights),),
    "softmax_read": (
        Form("eager", read),
        Form("SDPA", attention),
        Form("SDPA, streams folded", folded_attention, one_memory),
        Form("SDPA, causal", causal_attention, is_causal),
    ),
    "topk_search": (Form("eager", best), Form("eager, float32 scores", best_exact, in_16_bits)),
    "topk_read": (Form("eager", best_read), Form("eager, float32 scores", best_read_exact, in_16_bits)),
    "sparse_read": (
        Form("eager", summed),
        Form("eager, indexed", indexed, one_table),
        Form("embedding_bag", bag, one_table),
    ),
    "selected_scores": (Form("eager", chosen_scores),),
    "selected_read": (Form("eager", chosen_read),),
    "indexer_search": (Form("eager", heads_best),),
    "product_key_search": (Form("eager", best_pairs),),
    "product_key_read": (Form("eager", pair_read),),
    "paged_topk_search": (Form("eager", paged),),
    "additive_read": (Form("eager", additive),),
    "slot_usage": (Form("eager", usage),),
    "merge_reads": (Form("eager", merged), Form("eager, two", merged_two, lambda reads, **rest: len(reads) == 2)),
    "gather_rows": (Form("eager", embedded),),
}
