"""What mixes a memory into the output, and lookup, in plain PyTorch."""

from __future__ import annotations

import torch

from ...peers import eager
from .form import Form


def mixed_loss(logits, targets, cache_scores, cache_tokens, mix):
    """No distribution over the vocabulary is formed: of the logits only the target's is needed, and their lse."""
    targets = targets.unsqueeze(-1)
    own = torch.exp(logits.gather(-1, targets).squeeze(-1) - torch.logsumexp(logits, -1))
    cached = (torch.softmax(cache_scores, -1) * (cache_tokens == targets)).sum(-1)
    return -torch.log((1 - mix) * own + mix * cached)


def slots(tokens, sizes, multipliers, token_map, orders, heads):
    return eager.ngram_slots(tokens, sizes, multipliers, token_map, orders, heads)()


FORMS = {
    "cache_logprobs": (Form("eager", eager.mixed),),
    "cache_nll": (Form("eager", eager.mixed_loss), Form("eager, lse", mixed_loss)),
    "ngram_slots": (Form("eager", slots),),
    "memory_gate": (Form("eager", eager.gated),),
}
