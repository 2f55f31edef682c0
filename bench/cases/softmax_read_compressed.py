"""softmax_read over int8 slots: one query, where the bytes of the memory are what it costs."""

from __future__ import annotations

import torch

from ..case import Case, ratio
from . import softmax_read

ROWS = ("keys", "values")


def make(sizes, dtype, device, seed):
    """The tensors of softmax_read with keys and values in int8, and the scale of each row."""
    tensors = softmax_read.make(sizes, dtype, device, seed)
    for name in ROWS:
        rows = tensors[name]
        scale = rows.abs().amax(-1) / 127
        tensors[name] = (rows / scale.unsqueeze(-1)).round_().to(torch.int8)
        tensors[f"{name[:-1]}_scale"] = scale
    return tensors


def bytes_moved(s, item):
    """One byte a number, one scale a row; the query and the read have their own dtype."""
    return s["N"] * (s["K"] + s["V"] + 2 * item) + s["T"] * (s["K"] + s["V"]) * item


CASES = [
    Case(
        op="softmax_read_compressed",
        sizes={"T": 1, "N": 1 << 20, "K": 128, "V": 128},
        quick={"T": 1, "N": 1 << 17, "K": 128, "V": 128},
        make=make,
        flops=softmax_read.forward_flops,
        bytes=bytes_moved,
        goals=(ratio(2.5, "float32 slots"),),
    )
]
