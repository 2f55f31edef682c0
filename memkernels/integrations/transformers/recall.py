"""recall: the documents of a store of tokens that are nearest to a text, all its tokens taken together.

    S(d) = 1/T sum_t (1 - min_{i in d} |q_t - k_i|^2 / f_t)

over the k records nearest to each token t, the farthest of which is at the distance ``f_t``. What is equally near to
every document, such as the marks of a dialogue, adds nothing to any of them.

Source: Khattab and Zaharia 2020, ColBERT (the best match of each token, summed over the tokens).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .token_store import TokenStore


def recall(store: TokenStore, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores of documents, best first; of equal ones the later first.

    Args:
        query: float32 ``[T, dim]``, from :meth:`TokenStore.project`. k: records of each token.

    Returns:
        ``(scores [M], documents [M])``, float32 in 0..1 and int64, of the documents that were found.
    """
    distances, _, slots = store.search(query, min(k, max(len(store), 1)))
    there = slots >= 0
    farthest = distances.masked_fill(~there, 0).amax(-1, keepdim=True)
    gain = torch.where(there & (farthest > 0), 1 - distances / farthest.clamp(min=1e-30), 0)
    numbers = store.records.columns_at(slots[there].cpu())[..., 1]
    documents, at = numbers.unique(return_inverse=True)
    rows = there.cpu().nonzero()[:, 0]
    best = torch.zeros(len(query) * max(len(documents), 1))
    best.scatter_reduce_(0, rows * len(documents) + at, gain[there].float().cpu(), "amax")
    scores = best.view(len(query), -1).mean(0)[: len(documents)]
    # A stable sort of the reversed list, so that of equal scores the later document comes first.
    order = scores.flip(0).argsort(descending=True, stable=True)
    return scores.flip(0)[order], documents.flip(0)[order]
