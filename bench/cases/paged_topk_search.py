"""paged_topk_search, k = 32, pages of 1,024 slots in random order."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal, ratio

NEIGHBOURS, SLOTS = 32, 1024


def make(sizes, dtype, device, seed):
    """query [T, K], keys [F, S, K], pages [F]."""
    t, frames, slots, k = (sizes[axis] for axis in "TFSK")
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
    return {
        "query": normal((t, k), dtype, device, 2 * seed),
        "keys": normal((frames, slots, k), dtype, device, 2 * seed + 1),
        "pages": order.to(device),
    }


def bytes_moved(s, item):
    return (s["F"] * s["S"] + s["T"]) * s["K"] * item + s["T"] * NEIGHBOURS * 12


def _case(tokens, frames, direction, *goals):
    return Case(
        op="paged_topk_search",
        sizes={"T": tokens, "F": frames, "S": SLOTS, "K": 64},
        quick={"T": min(tokens, 64), "F": 16, "S": 128, "K": 32},
        make=make,
        flops=cost("paged_topk_search", direction, k=NEIGHBOURS),
        bytes=bytes_moved,
        direction=direction,
        options={"k": NEIGHBOURS},
        grads=() if direction == "forward" else ("query", "keys"),
        goals=goals,
    )


CASES = [
    _case(1, 1024, "forward", ratio(1, "eager")),
    _case(256, 256, "forward", ratio(2, "eager")),
    _case(256, 256, "backward"),
]
