"""slot_write: explicit weights, an erase vector per token (Neural Turing Machine) or interpolation."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal, ratio

forward_flops = cost("slot_write")
backward_flops = cost("slot_write", "backward")


def make(sizes, dtype, device, seed):
    """values [N, V], weights [T, N], write [T, V], erase [T, V]."""
    t, n, v = (sizes[axis] for axis in "TNV")
    return {
        "values": normal((n, v), dtype, device, 4 * seed),
        "weights": torch.softmax(normal((t, n), dtype, device, 4 * seed + 1), -1),
        "write": normal((t, v), dtype, device, 4 * seed + 2),
        "erase": torch.sigmoid(normal((t, v), dtype, device, 4 * seed + 3)),
    }


def forward_bytes(s, item):
    return (2 * s["N"] * s["V"] + s["T"] * (s["N"] + 2 * s["V"])) * item


def backward_bytes(s, item):
    return (3 * s["N"] * s["V"] + 2 * s["T"] * (s["N"] + 2 * s["V"])) * item


def _case(direction, *goals):
    forward = direction == "forward"
    return Case(
        op="slot_write",
        sizes={"T": 512, "N": 1024, "V": 64},
        quick={"T": 64, "N": 256, "V": 64},
        name="erase and add",
        make=make,
        flops=forward_flops if forward else backward_flops,
        bytes=forward_bytes if forward else backward_bytes,
        direction=direction,
        grads=() if forward else ("values", "weights", "write", "erase"),
        sample=("N", 128) if forward else None,
        goals=goals,
    )


CASES = [_case("forward", ratio(10, "loop")), _case("backward")]
