"""trace: what each token of a text owes to the records of a memory.

    share_t = p_memory(x_t) / p(x_t),      p_memory(w) = sum_{j: token_j = w} weight_j

where ``weight_j`` is the share of record j in the distribution ``p`` from which token t came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .memory import Vote
from .place import token_ids

if TYPE_CHECKING:
    from .attachment import Attachment


class Traced(NamedTuple):
    """A token of a text. text: what it adds to the text before it. probability: ``p``, given the tokens before it.
    share: of that probability that the records gave, 0..1. memory: the share of the records in the whole distribution.
    votes: the records of the largest weight, best first."""

    token: int
    text: str
    probability: float
    share: float
    memory: float
    votes: list[Vote]


@torch.no_grad()
def trace(attachment: Attachment, ids: Any, first: int, most: int) -> list[Traced]:
    """See :meth:`Attachment.trace`."""
    if isinstance(ids, torch.Tensor) and ids.dim() > 1 and ids.numel() != ids.shape[-1]:
        raise ValueError(f"trace: ids must be of one text, [T] or [1, T], got {list(ids.shape)}")
    ids = token_ids("trace", attachment.place, ids, None).cpu()
    if len(ids) < 2:
        raise ValueError(f"trace: ids must be of at least 2 tokens, got {len(ids)}")
    if not 1 <= first < len(ids):
        raise ValueError(f"trace: first must lie in 1..{len(ids) - 1}, got {first}")
    if most < 1:
        raise ValueError(f"trace: most must be at least 1, got {most}")
    if not attachment.enabled:
        raise ValueError("trace: the memories must be at work, got an attachment that is disabled")
    model: Any = attachment.model
    training = model.training
    given = ids[None, :-1].to(next(model.parameters()).device)
    try:
        model.eval()
        keep = len(ids) - first
        output = model(given, attention_mask=torch.ones_like(given), use_cache=False, logits_to_keep=keep)
    finally:
        model.train(training)
    told = [memory.votes(attachment.reads, ids, first, most) for memory in attachment.memories]
    tellers = [votes for votes in told if votes is not None]
    if not tellers:
        kinds = ", ".join(type(memory).__name__ for memory in attachment.memories)
        raise ValueError(f"trace: a memory must have records that vote (such as Neighbours), got {kinds}")
    logs = torch.log_softmax(output.logits[0, -keep:].float(), -1)
    probabilities = logs.gather(-1, ids[first:, None].to(logs.device))[:, 0].exp().tolist()
    tokenizer = next((memory.tokenizer for memory in attachment.memories if memory.tokenizer is not None), None)
    texts = pieces(tokenizer, ids.tolist())[first:]
    traced = []
    for token, text, probability, *votes in zip(ids[first:].tolist(), texts, probabilities, *tellers):
        share = sum(row.probability for row in votes) / max(probability, 1e-30)
        best = sorted((vote for row in votes for vote in row.best), key=lambda vote: -vote.weight)[:most]
        traced.append(Traced(token, text, probability, min(share, 1.0), sum(row.share for row in votes), best))
    return traced


def pieces(tokenizer: Any, ids: list[int], context: int = 8) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with the last of them."""
    found = []
    for at in range(len(ids)):
        start = max(0, at - context)
        before = tokenizer.decode(ids[start:at]).rstrip(_HALF) if at > start else ""
        text = tokenizer.decode(ids[start : at + 1])
        found.append((text.rstrip(_HALF) if at + 1 < len(ids) else text)[len(before) :])
    return found


_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of the first bytes of a character
