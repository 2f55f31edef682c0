"""The library's own op over the same slots multiplied out to float32: what compressing them buys."""

from __future__ import annotations

import memkernels as mk

NAME = "float32 slots"
DIRECTIONS = ("forward",)
QUICK = True


def softmax_read_compressed(query, keys, values, key_scale, value_scale):
    keys, values = keys * key_scale.unsqueeze(-1), values * value_scale.unsqueeze(-1)
    return lambda: mk.softmax_read(query, keys, values)
