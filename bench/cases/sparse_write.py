"""sparse_write: k = 8 slots of a large memory per token, which is copied (the form in place touches rows alone)."""

from __future__ import annotations

import torch

from ..case import Case, normal

NEIGHBOURS = 8


def make(sizes, dtype, device, seed):
    """values [N, V], indices [T, k] without duplicates in a token, weights [T, k], write [T, V]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    t, n, v = (sizes[axis] for axis in "TNV")
    step = n // NEIGHBOURS
    indices = torch.randint(step, (t, NEIGHBOURS), device=device, generator=generator)
    return {
        "values": normal((n, v), dtype, device, 0),
        "indices": indices + step * torch.arange(NEIGHBOURS, device=device),
        "weights": torch.rand((t, NEIGHBOURS), dtype=dtype, device=device, generator=generator),
        "write": normal((t, v), dtype, device, seed + 1),
    }


def flops(s):
    return 4 * s["T"] * NEIGHBOURS * s["V"]


def forward_bytes(s, item):
    """The copy, then every named row once in and once out."""
    return 2 * s["N"] * s["V"] * item + s["T"] * (NEIGHBOURS * (2 * s["V"] * item + 8 + item) + s["V"] * item)


def _case(direction):
    forward = direction == "forward"
    return Case(
        op="sparse_write",
        # Autograd of the loop keeps a copy of the memory per token, so its memory is a small one.
        sizes={"T": 1024, "N": 1 << 16, "V": 64} if forward else {"T": 256, "N": 1 << 13, "V": 64},
        quick={"T": 128, "N": 4096, "V": 64},
        make=make,
        flops=flops if forward else lambda s: 3 * flops(s),
        bytes=forward_bytes if forward else lambda s, item: 2 * forward_bytes(s, item),
        direction=direction,
        grads=() if forward else ("values", "weights", "write"),
        shared=("values",),
    )


CASES = [_case("forward"), _case("backward")]
