"""FlexAttention, compiled, without a score modification."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import flex_attention as flex

NAME = "FlexAttention"
DIRECTIONS = ("forward", "backward")
QUICK = False  # compiling takes far longer than timing
DEVICES = ("cuda",)


@functools.cache
def _compiled():
    return torch.compile(flex.flex_attention, dynamic=False)


def softmax_read(query, keys, values):
    return lambda: _compiled()(query, keys, values)
