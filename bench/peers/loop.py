"""A Python loop over the tokens, as recurrent memories are usually written: one in-place interpolation per token."""

from __future__ import annotations

import torch

NAME = "loop"
DIRECTIONS = ("forward",)
QUICK = True


def gated_write(values, keys, query, write):
    def run():
        gates = torch.sigmoid((query.shape[-1] ** -0.5 * query) @ keys.mT).unsqueeze(-1)  # [T, N, 1]
        memory = values.clone()
        for t in range(len(write)):
            memory.lerp_(write[t], gates[t])
        return memory

    return run
