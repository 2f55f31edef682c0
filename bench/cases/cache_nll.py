"""cache_nll: a loss over a vocabulary of W words and a cache of N entries per token."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal, ratio


def make(sizes, dtype, device, seed):
    """logits [T, W], targets [T], cache_scores [T, N], cache_tokens [T, N], mix [T]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    t, w, n = (sizes[axis] for axis in "TWN")
    return {
        "logits": normal((t, w), dtype, device, 2 * seed),
        "targets": torch.randint(w, (t,), device=device, generator=generator),
        "cache_scores": normal((t, n), dtype, device, 2 * seed + 1),
        "cache_tokens": torch.randint(w, (t, n), device=device, generator=generator),
        "mix": torch.rand((t,), device=device, generator=generator),
    }


def bytes_moved(s, item):
    return s["T"] * (s["W"] * item + s["N"] * (8 + item))


def _case(direction, *goals, **options):
    forward = direction == "forward"
    return Case(
        op="cache_nll",
        name="with stats" if options else "",
        sizes={"T": 256, "W": 32000, "N": 256},
        quick={"T": 32, "W": 1000, "N": 64},
        make=make,
        flops=cost("cache_nll", direction),
        bytes=bytes_moved if forward else lambda s, item: 2 * bytes_moved(s, item),
        direction=direction,
        grads=() if forward else ("logits", "cache_scores", "mix"),
        options=options,
        goals=goals,
    )


CASES = [
    _case("forward", ratio(3, "eager")),
    _case("backward", ratio(3, "eager")),
    _case("forward", return_stats=True),
]
