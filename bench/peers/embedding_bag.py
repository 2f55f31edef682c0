"""torch.nn.functional.embedding_bag with per-sample weights: torch's own fused gather and sum, dense gradient."""

from __future__ import annotations

from torch.nn.functional import embedding_bag

NAME = "embedding_bag"
DIRECTIONS = ("forward", "backward")
QUICK = True


def sparse_read(values, indices, weights):
    return lambda: embedding_bag(indices, values, mode="sum", per_sample_weights=weights)
