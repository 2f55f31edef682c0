"""topk_read, k = 32: exact search, softmax over the chosen, gather."""

from __future__ import annotations

from ..case import Case, bandwidth, cost, normal, peak, ratio

NEIGHBOURS = 32


def make(sizes, dtype, device, seed):
    """query [T, K], keys [N, K], values [N, V]."""
    t, n, k, v = (sizes[axis] for axis in "TNKV")
    return {
        "query": normal((t, k), dtype, device, 3 * seed),
        "keys": normal((n, k), dtype, device, 3 * seed + 1),
        "values": normal((n, v), dtype, device, 3 * seed + 2),
    }


def bytes_moved(s, item):
    return (s["N"] * s["K"] + s["T"] * (s["K"] + s["V"] + NEIGHBOURS * s["V"])) * item


def _case(t, n, kv, quick, sample, *goals):
    return Case(
        op="topk_read",
        sizes={"T": t, "N": n, "K": kv, "V": kv},
        quick={"T": quick[0], "N": quick[1], "K": kv, "V": kv},
        make=make,
        flops=cost("topk_read", k=NEIGHBOURS),
        bytes=bytes_moved,
        options={"k": NEIGHBOURS},
        sample=("T", sample),
        goals=goals,
    )


AHEAD = ratio(1, "eager", "faiss")
CASES = [
    _case(16, 1 << 20, 64, (16, 1 << 16), 2, peak(0.85), AHEAD),
    _case(256, 1 << 18, 64, (128, 1 << 15), 8, peak(0.88), AHEAD),
    _case(1024, 1 << 16, 128, (256, 1 << 14), 32, peak(0.90), AHEAD),
    _case(1, 1 << 20, 64, (1, 1 << 18), 1, bandwidth(0.92), AHEAD),
]
