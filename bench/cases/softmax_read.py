"""softmax_read: many queries (bound by multiply-adds), few queries (bound by memory), backward, call overhead."""

from __future__ import annotations

from ..case import Case, bandwidth, cost, normal, peak, ratio

forward_flops = cost("softmax_read")
backward_flops = cost("softmax_read", "backward")

SDPA = "SDPA"


def make(sizes, dtype, device, seed):
    """query [1, 1, T, K], keys [1, 1, N, K], values [1, 1, N, V]: the order that scaled_dot_product_attention wants."""
    t, n, k, v = (sizes[axis] for axis in "TNKV")
    return {
        "query": normal((1, 1, t, k), dtype, device, 3 * seed),
        "keys": normal((1, 1, n, k), dtype, device, 3 * seed + 1),
        "values": normal((1, 1, n, v), dtype, device, 3 * seed + 2),
    }


def forward_bytes(s, item):
    return (s["N"] + s["T"]) * (s["K"] + s["V"]) * item


def backward_bytes(s, item):
    """Keys and values are read, their gradients written; the rest is small beside them or not the bound."""
    return 2 * forward_bytes(s, item)


def _sizes(t, n, kv):
    return {"T": t, "N": n, "K": kv, "V": kv}


def _forward(t, n, kv, quick, *goals, dtype="float32", **more):
    return Case(
        op="softmax_read",
        sizes=_sizes(t, n, kv),
        quick=_sizes(*quick),
        make=make,
        flops=forward_flops,
        bytes=forward_bytes,
        dtype=dtype,
        goals=goals,
        **more,
    )


def _backward(t, n, kv, quick, *goals, dtype="float32"):
    return Case(
        op="softmax_read",
        sizes=_sizes(t, n, kv),
        quick=_sizes(*quick),
        make=make,
        flops=backward_flops,
        bytes=backward_bytes,
        dtype=dtype,
        direction="backward",
        grads=("query", "keys", "values"),
        goals=goals,
    )


AHEAD = ratio(1, SDPA, "eager")
TINY = (1, 16, 16)
CASES = [
    _forward(512, 1024, 128, (512, 1024, 128), peak(0.90), AHEAD),
    _forward(2048, 8192, 128, (512, 2048, 128), peak(0.90), AHEAD, sample=("T", 128)),
    _forward(512, 1024, 64, (512, 1024, 64), peak(0.88), AHEAD),
    _forward(2048, 8192, 64, (512, 2048, 64), peak(0.88), AHEAD, sample=("T", 128)),
    _forward(1, 1 << 20, 128, (1, 1 << 17, 128), bandwidth(0.95), AHEAD),
    _forward(8, 1 << 20, 128, (8, 1 << 17, 128), bandwidth(0.90), AHEAD, sample=("T", 2)),
    _forward(1024, 4096, 128, (512, 1024, 128), peak(0.85), AHEAD, dtype="bfloat16"),
    _forward(1, 1 << 20, 128, (1, 1 << 17, 128), bandwidth(0.90), AHEAD, dtype="bfloat16"),
    _backward(1024, 4096, 128, (512, 1024, 128), peak(0.88), AHEAD),
    _backward(1024, 4096, 64, (512, 1024, 64), peak(0.88), AHEAD),
    _backward(1024, 4096, 128, (512, 1024, 128), peak(0.85), AHEAD, dtype="bfloat16"),
    _backward(1, 1 << 19, 128, (1, 1 << 16, 128), ratio(4, SDPA)),
    _backward(8, 1 << 19, 128, (8, 1 << 16, 128), ratio(4, SDPA)),
    _forward(*TINY, TINY, ratio(1 / 1.6, SDPA), name="call overhead, inference"),
    _forward(
        *TINY,
        TINY,
        ratio(1 / 2, SDPA),
        name="call overhead, autograd",
        autograd=True,
        grads=("query", "keys", "values"),
    ),
]
