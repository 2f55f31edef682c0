"""additive_read: T * N * K hyperbolic tangents, for a sequence of queries and for one decoding step of a batch."""

from __future__ import annotations

from ..case import Case, cost, normal, ratio


def make(sizes, dtype, device, seed):
    """query [B, T, K], keys [B, N, K], values [B, N, V], score_vector [K]."""
    b, t, n, k, v = (sizes[axis] for axis in "BTNKV")
    return {
        "query": normal((b, t, k), dtype, device, 4 * seed),
        "keys": normal((b, n, k), dtype, device, 4 * seed + 1),
        "values": normal((b, n, v), dtype, device, 4 * seed + 2),
        "score_vector": normal((k,), dtype, device, 4 * seed + 3),
    }


def bytes_moved(s, item):
    return s["B"] * (s["N"] + s["T"]) * (s["K"] + s["V"]) * item


def _case(sizes, direction, *goals):
    forward = direction == "forward"
    return Case(
        op="additive_read",
        sizes=dict(zip("BTNKV", sizes)),
        quick={"B": 2, "T": min(sizes[1], 16), "N": 64, "K": 32, "V": 32},
        make=make,
        flops=cost("additive_read", direction, streams="B"),
        bytes=bytes_moved if forward else lambda s, item: 2 * bytes_moved(s, item),
        direction=direction,
        grads=() if forward else ("query", "keys", "values", "score_vector"),
        goals=goals,
    )


SEQUENCE, STEP = (4, 128, 512, 128, 128), (64, 1, 128, 128, 128)
CASES = [
    _case(SEQUENCE, "forward", ratio(4, "eager")),
    _case(SEQUENCE, "backward", ratio(4, "eager")),
    _case(STEP, "forward"),
    _case(STEP, "backward"),
]
