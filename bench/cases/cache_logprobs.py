"""cache_logprobs: the whole distribution, as a decoder needs it. No goal of its own."""

from __future__ import annotations

from ..case import Case, cost
from . import cache_nll


def make(sizes, dtype, device, seed):
    """logits [T, W], cache_scores [T, N], cache_tokens [T, N], mix [T]."""
    made = cache_nll.make(sizes, dtype, device, seed)
    del made["targets"]
    return made


def _case(direction):
    forward = direction == "forward"
    return Case(
        op="cache_logprobs",
        sizes={"T": 256, "W": 32000, "N": 256},
        quick={"T": 32, "W": 1000, "N": 64},
        make=make,
        flops=cost("cache_logprobs", direction),
        bytes=lambda s, item: (2 if forward else 3) * s["T"] * s["W"] * item,
        direction=direction,
        grads=() if forward else ("logits", "cache_scores", "mix"),
    )


CASES = [_case("forward"), _case("backward")]
