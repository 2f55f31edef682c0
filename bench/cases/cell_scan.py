"""cell_scan: the memory cell over a batch of streams."""

from __future__ import annotations

from ..case import Case, cost, normal, ratio


def make(sizes, dtype, device, seed):
    """inputs [B, T, 3D], weight [3D, D]."""
    b, t, d = (sizes[axis] for axis in "BTD")
    return {
        "inputs": normal((b, t, 3 * d), dtype, device, 2 * seed),
        "weight": 0.5 * d**-0.5 * normal((3 * d, d), dtype, device, 2 * seed + 1),
    }


def _bytes(s, item):
    return (s["B"] * s["T"] * 4 * s["D"] + 3 * s["D"] ** 2) * item


def _case(b, d, direction, *goals):
    forward = direction == "forward"
    return Case(
        op="cell_scan",
        sizes={"B": b, "T": 256, "D": d},
        quick={"B": b, "T": 32, "D": d},
        make=make,
        flops=cost("cell_scan", direction, streams="B"),
        bytes=_bytes if forward else lambda s, item: 2 * _bytes(s, item),
        direction=direction,
        grads=() if forward else ("inputs", "weight"),
        goals=goals,
    )


CASES = [
    _case(32, 256, "forward"),
    _case(1, 256, "forward", ratio(2, "loop")),
    _case(32, 256, "backward"),
]
