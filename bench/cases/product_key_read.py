"""product_key_read, k = 32: the best of n * n slots from two lists of n half keys, softmax over them, gather."""

from __future__ import annotations

from ..case import Case, cost, normal
from . import product_key_search

NEIGHBOURS = product_key_search.NEIGHBOURS


def make(sizes, dtype, device, seed):
    """query [T, K], subkeys [2, n, K / 2], values [n * n, V]."""
    inputs = product_key_search.make(sizes, dtype, device, seed)
    return inputs | {"values": normal((sizes["n"] ** 2, sizes["V"]), dtype, device, 2 * seed + 1)}


def bytes_moved(s, item):
    """Forward: half keys and queries, rows that are read, results."""
    return ((s["n"] + s["T"]) * s["K"] + s["T"] * (NEIGHBOURS + 1) * s["V"]) * item


def backward_bytes(s, item):
    """Rows that were read, what came in and goes out, and the gradient of every value."""
    return bytes_moved(s, item) + ((s["n"] + s["T"]) * s["K"] + s["n"] ** 2 * s["V"]) * item


def _case(direction):
    forward = direction == "forward"
    return Case(
        op="product_key_read",
        sizes={"T": 1024, "n": 512, "K": 128, "V": 128},
        quick={"T": 128, "n": 128, "K": 64, "V": 64},
        make=make,
        flops=cost("product_key_read", direction, k=NEIGHBOURS),
        bytes=bytes_moved if forward else backward_bytes,
        direction=direction,
        options={"k": NEIGHBOURS},
        grads=() if forward else ("query", "subkeys", "values"),
    )


CASES = [_case("forward"), _case("backward")]
