"""product_key_search, k = 32: the best of n * n slots from two lists of n half keys."""

from __future__ import annotations

from ..case import Case, cost, normal, ratio

NEIGHBOURS = 32


def make(sizes, dtype, device, seed):
    """query [T, K], subkeys [2, n, K / 2]."""
    t, n, k = (sizes[axis] for axis in "TnK")
    return {
        "query": normal((t, k), dtype, device, 2 * seed),
        "subkeys": normal((2, n, k // 2), dtype, device, 2 * seed + 1),
    }


def bytes_moved(s, item):
    return (s["n"] + s["T"]) * s["K"] * item + s["T"] * NEIGHBOURS * (8 + item)


def _case(direction, *goals):
    forward = direction == "forward"
    return Case(
        op="product_key_search",
        sizes={"T": 1024, "n": 512, "K": 128},
        quick={"T": 128, "n": 128, "K": 64},
        make=make,
        flops=cost("product_key_search", direction, k=NEIGHBOURS),
        bytes=bytes_moved,
        direction=direction,
        options={"k": NEIGHBOURS},
        grads=() if forward else ("query", "subkeys"),
        goals=goals,
    )


CASES = [_case("forward", ratio(4, "eager")), _case("backward")]
