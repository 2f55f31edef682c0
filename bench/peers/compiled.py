"""torch.compile of the vectorised eager form. Only where it makes another program than torch's own fused operator."""

from __future__ import annotations

import functools

import torch

from . import eager

NAME = "torch.compile"
DIRECTIONS = ("forward", "backward")
QUICK = False  # compiling takes far longer than timing


@functools.cache  # also because naming torch.compile imports the compiler
def _compiled(function):
    return torch.compile(function, dynamic=False)


def gated_write(values, keys, query, write):
    return lambda: _compiled(eager.written)(values, keys, query, write)


def product_key_search(query, subkeys, k):
    return lambda: _compiled(eager.best_pairs)(query, subkeys, k)


def product_key_read(query, subkeys, values, k):
    return lambda: _compiled(eager.pair_read)(query, subkeys, values, k)


def additive_read(query, keys, values, score_vector):
    return lambda: _compiled(eager.additive_attention)(query, keys, values, score_vector)


def cache_nll(logits, targets, cache_scores, cache_tokens, mix, return_stats=False):
    run = eager.mixed_loss_and_stats if return_stats else eager.mixed_loss
    return lambda: _compiled(run)(logits, targets, cache_scores, cache_tokens, mix)


def cache_logprobs(logits, cache_scores, cache_tokens, mix):
    return lambda: _compiled(eager.mixed)(logits, cache_scores, cache_tokens, mix)


def gather_rows(values, indices, value_scale, dtype):
    return lambda: _compiled(eager.embedded)(values, indices, value_scale, dtype)


def memory_gate(hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt):
    return lambda: _compiled(eager.gated)(hidden, key, value, hidden_weight, key_weight, eps, signed_sqrt)
