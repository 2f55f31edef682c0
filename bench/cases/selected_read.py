"""selected_read: attention of each token over k = 64 named slots of a large memory, and its gradient."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal

NEIGHBOURS = 64


def make(sizes, dtype, device, seed):
    """query [T, K], keys [N, K], values [N, V], indices [T, k]."""
    t, n, k, v = (sizes[axis] for axis in "TNKV")
    generator = torch.Generator(device=device).manual_seed(seed)
    return {
        "query": normal((t, k), dtype, device, 3 * seed),
        "keys": normal((n, k), dtype, device, 1),
        "values": normal((n, v), dtype, device, 2),
        "indices": torch.randint(n, (t, NEIGHBOURS), device=device, generator=generator),
    }


def forward_bytes(s, item):
    return s["T"] * (NEIGHBOURS * ((s["K"] + s["V"]) * item + 8) + (s["K"] + s["V"]) * item)


def backward_bytes(s, item):
    """The dense gradients are written once; the rows that were read are read again."""
    return s["N"] * (s["K"] + s["V"]) * item + forward_bytes(s, item)


def _case(direction, **more):
    return Case(
        op="selected_read",
        sizes={"T": 2048, "N": 1 << 18, "K": 128, "V": 128},
        quick={"T": 512, "N": 1 << 15, "K": 128, "V": 128},
        make=make,
        flops=cost("selected_read", direction, k=NEIGHBOURS),
        bytes=forward_bytes if direction == "forward" else backward_bytes,
        direction=direction,
        shared=("keys", "values"),
        **more,
    )


CASES = [_case("forward", sample=("T", 64)), _case("backward", grads=("query", "keys", "values"), sample=("T", 64))]
