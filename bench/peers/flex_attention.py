"""FlexAttention, compiled, without a score modification."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import flex_attention as flex

from ..sdpa import over_heads

NAME = "FlexAttention"
DIRECTIONS = ("forward", "backward")
QUICK = False  # compiling takes far longer than timing
DEVICES = ("cuda",)


@functools.cache
def _compiled():
    return torch.compile(flex.flex_attention, dynamic=False)


softmax_read = over_heads(lambda *tensors: _compiled()(*tensors))
