"""gated_write: sigmoid gates, T tokens into N slots, forward and backward."""

from __future__ import annotations

from ..case import Case, cost, normal, ratio

forward_flops = cost("gated_write")
backward_flops = cost("gated_write", "backward")


def make(sizes, dtype, device, seed):
    """values [N, V], keys [N, K], query [T, K], write [T, V]."""
    t, n, k, v = (sizes[axis] for axis in "TNKV")
    return {
        "values": normal((n, v), dtype, device, 4 * seed),
        "keys": normal((n, k), dtype, device, 4 * seed + 1),
        "query": normal((t, k), dtype, device, 4 * seed + 2),
        "write": normal((t, v), dtype, device, 4 * seed + 3),
    }


def forward_bytes(s, item):
    return (s["N"] * (s["K"] + 2 * s["V"]) + s["T"] * (s["K"] + s["V"])) * item


def backward_bytes(s, item):
    return (s["N"] * (2 * s["K"] + 3 * s["V"]) + 2 * s["T"] * (s["K"] + s["V"])) * item


def _case(t, n, quick, direction, *goals):
    forward = direction == "forward"
    return Case(
        op="gated_write",
        sizes={"T": t, "N": n, "K": 64, "V": 64},
        quick={"T": quick[0], "N": quick[1], "K": 64, "V": 64},
        make=make,
        flops=forward_flops if forward else backward_flops,
        bytes=forward_bytes if forward else backward_bytes,
        direction=direction,
        grads=() if forward else ("values", "keys", "query", "write"),
        # Slots do not depend on one another, but the gradient of a token depends on all of them.
        sample=("N", 512) if forward else None,
        goals=goals,
    )


CASES = [
    _case(512, 4096, (128, 2048), "forward", ratio(45, "eager")),
    _case(2048, 1024, (256, 512), "forward", ratio(77, "eager")),
    _case(512, 4096, (128, 1024), "backward", ratio(18, "eager")),
    _case(2048, 1024, (256, 512), "backward", ratio(48, "eager")),
]
