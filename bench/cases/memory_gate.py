"""memory_gate: its passes over hidden states, keys and values, for one branch and for four."""

from __future__ import annotations

import torch

from ..case import Case, bandwidth, cost, normal, ratio

HIDDEN_BYTES = 20 << 20  # of one call, whose result takes non-temporal stores; sets exceed the last-level cache
SHARES = {"forward": 0.85, "backward": 0.75}  # of the read bandwidth


def make(sizes, dtype, device, seed):
    """hidden, key [T, B, D], value [T, D], weights [B, D]; each key is close to its state, or to its opposite."""
    t, b, d = (sizes[axis] for axis in "TBD")
    hidden, key, value = (
        normal(shape, dtype, device, 5 * seed + i) for i, shape in enumerate([(t, b, d), (t, b, d), (t, d)])
    )
    sign = 1 - 2 * (torch.arange(t * b, device=device) % 2).view(t, b, 1)
    weights = (1 + normal((b, d), dtype, device, 5 * seed + i) / 4 for i in (3, 4))
    tensors = hidden, (key / 4 + sign * hidden).to(dtype), value, *weights
    return dict(zip(("hidden", "key", "value", "hidden_weight", "key_weight"), tensors))


def forward_bytes(s, item):
    """Hidden state, key and result of each branch, and the value."""
    return s["T"] * s["D"] * (3 * s["B"] + 1) * item


def backward_bytes(s, item):
    """Hidden state, key, the gradients of both and of the result; the value and its gradient."""
    return s["T"] * s["D"] * (5 * s["B"] + 2) * item


def case(branches: int, dim: int, dtype: str, direction: str) -> Case:
    forward = direction == "forward"
    tokens = HIDDEN_BYTES // (branches * dim * getattr(torch, dtype).itemsize)
    return Case(
        op="memory_gate",
        sizes={"T": tokens, "B": branches, "D": dim},
        quick={"T": 16, "B": branches, "D": dim},
        make=make,
        flops=cost("memory_gate", direction, streams="T"),
        bytes=forward_bytes if forward else backward_bytes,
        direction=direction,
        dtype=dtype,
        options={"eps": 1e-6, "signed_sqrt": True},
        grads=() if forward else ("hidden", "key", "value", "hidden_weight", "key_weight"),
        goals=(bandwidth(SHARES[direction]), ratio(3, "eager"), ratio(1, "torch.compile")),
    )


CASES = [
    case(branches, dim, dtype, direction)
    for direction in SHARES
    for branches, dim in ((1, 1024), (4, 2560))
    for dtype in ("float32", "bfloat16")
]
