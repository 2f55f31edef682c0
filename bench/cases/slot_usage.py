"""slot_usage: what eviction needs of a softmax read. No goal of its own; it should keep up with the read."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal


def make(sizes, dtype, device, seed):
    """query [T, K], keys [N, K], lse [T]."""
    query = normal((sizes["T"], sizes["K"]), dtype, device, 2 * seed)
    keys = normal((sizes["N"], sizes["K"]), dtype, device, 2 * seed + 1)
    lse = torch.logsumexp(sizes["K"] ** -0.5 * (query @ keys.mT), -1)
    return {"query": query, "keys": keys, "lse": lse}


CASES = [
    Case(
        op="slot_usage",
        sizes={"T": 1024, "N": 8192, "K": 64},
        quick={"T": 512, "N": 1024, "K": 64},
        make=make,
        flops=cost("slot_usage"),
        bytes=lambda s, item: (s["T"] + s["N"]) * s["K"] * item,
    )
]
