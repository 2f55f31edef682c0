"""selected_scores: dot products of each token with k = 128 named rows of a large memory."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal

NEIGHBOURS = 128


def make(sizes, dtype, device, seed):
    """query [T, K], keys [N, K], indices [T, k]."""
    t, n, k = (sizes[axis] for axis in "TNK")
    generator = torch.Generator(device=device).manual_seed(seed)
    return {
        "query": normal((t, k), dtype, device, 3 * seed),
        "keys": normal((n, k), dtype, device, 1),
        "indices": torch.randint(n, (t, NEIGHBOURS), device=device, generator=generator),
    }


def bytes_moved(s, item):
    return s["T"] * (NEIGHBOURS * ((s["K"] + 1) * item + 8) + s["K"] * item)


CASES = [
    Case(
        op="selected_scores",
        sizes={"T": 2048, "N": 1 << 18, "K": 256},
        quick={"T": 512, "N": 1 << 15, "K": 256},
        make=make,
        flops=cost("selected_scores", k=NEIGHBOURS),
        bytes=bytes_moved,
        shared=("keys",),
        sample=("T", 64),
    )
]
