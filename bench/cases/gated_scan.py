"""gated_scan: many streams of many channels, and one stream of few."""

from __future__ import annotations

import torch

from ..case import Case, bandwidth, cost, normal


def make(sizes, dtype, device, seed):
    """forget, update [B, T, D]."""
    shape = tuple(sizes[axis] for axis in "BTD")
    return {
        "forget": torch.sigmoid(normal(shape, dtype, device, 2 * seed)),
        "update": normal(shape, dtype, device, 2 * seed + 1),
    }


def _case(b, t, d, direction, *goals):
    forward = direction == "forward"
    return Case(
        op="gated_scan",
        sizes={"B": b, "T": t, "D": d},
        quick={"B": b, "T": t // 8, "D": d},
        make=make,
        flops=cost("gated_scan", direction, streams="B"),
        bytes=lambda s, item: (3 if forward else 5) * s["B"] * s["T"] * s["D"] * item,
        direction=direction,
        grads=() if forward else ("forget", "update"),
        goals=goals,
    )


CASES = [
    _case(8, 2048, 512, "forward", bandwidth(0.8)),
    _case(1, 32768, 32, "forward"),
    _case(8, 2048, 512, "backward"),
]
