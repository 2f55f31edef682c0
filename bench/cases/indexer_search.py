"""indexer_search, k = 64: exact search by scores of H small heads, with many tokens and with one."""

from __future__ import annotations

from ..case import Case, cost, normal

NEIGHBOURS = 64


def make(sizes, dtype, device, seed):
    """query [T, H, K], head_weights [T, H], keys [N, K]."""
    t, n, h, k = (sizes[axis] for axis in "TNHK")
    return {
        "query": normal((t, h, k), dtype, device, 3 * seed),
        "head_weights": normal((t, h), dtype, device, 3 * seed + 1),
        "keys": normal((n, k), dtype, device, 3 * seed + 2),
    }


def bytes_moved(s, item):
    return (s["N"] * s["K"] + s["T"] * s["H"] * (s["K"] + 1) + s["T"] * NEIGHBOURS) * item + 8 * s["T"] * NEIGHBOURS


def _case(t, n, quick, sample):
    return Case(
        op="indexer_search",
        sizes={"T": t, "N": n, "H": 16, "K": 64},
        quick={"T": quick[0], "N": quick[1], "H": 16, "K": 64},
        make=make,
        flops=cost("indexer_search", k=NEIGHBOURS),
        bytes=bytes_moved,
        options={"k": NEIGHBOURS},
        sample=("T", sample),
    )


CASES = [_case(256, 1 << 14, (64, 1 << 12), 16), _case(1, 1 << 18, (1, 1 << 14), 1)]
