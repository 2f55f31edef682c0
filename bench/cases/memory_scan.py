"""memory_scan: one stream that writes and reads a memory of a few hundred slots at every token."""

from __future__ import annotations

from ..case import Case, cost, normal, ratio

forward_flops = cost("memory_scan")
backward_flops = cost("memory_scan", "backward")


def make(sizes, dtype, device, seed):
    """values [N, V], keys [N, K], read_query and write_query [T, K], write [T, V]."""
    t, n, k, v = (sizes[axis] for axis in "TNKV")
    shapes = {"values": (n, v), "keys": (n, k), "read_query": (t, k), "write_query": (t, k), "write": (t, v)}
    return {name: normal(shape, dtype, device, 5 * seed + i) for i, (name, shape) in enumerate(shapes.items())}


def forward_bytes(s, item):
    return (s["N"] * (s["K"] + 2 * s["V"]) + s["T"] * 2 * (s["K"] + s["V"])) * item


def _case(t, n, direction, *goals):
    forward = direction == "forward"
    return Case(
        op="memory_scan",
        sizes={"T": t, "N": n, "K": 64, "V": 64},
        quick={"T": 128, "N": n, "K": 64, "V": 64},
        make=make,
        flops=forward_flops if forward else backward_flops,
        bytes=forward_bytes if forward else lambda s, item: 3 * forward_bytes(s, item),
        direction=direction,
        grads=() if forward else ("values", "keys", "read_query", "write_query", "write"),
        goals=goals,
    )


CASES = [
    _case(2048, 64, "forward", ratio(10, "loop"), ratio(3, "eager")),
    _case(2048, 256, "forward", ratio(10, "loop"), ratio(3, "eager")),
    _case(512, 128, "backward", ratio(3, "eager")),
]
