"""A Python loop over the tokens, as recurrent memories are usually written: one in-place update per token."""

from __future__ import annotations

import torch

NAME = "loop"
DIRECTIONS = ("forward",)
QUICK = True


def slot_write(values, weights, write, erase):
    def run():
        memory = values.clone()
        for t in range(len(write)):
            a = weights[t].unsqueeze(-1)
            memory.mul_(1 - a * erase[t]).add_(a * write[t])
        return memory

    return run


def sparse_write(values, indices, weights, write):
    def run():
        memory = values.clone()
        for t in range(len(write)):
            rows = memory[indices[t]]
            memory[indices[t]] = torch.lerp(rows, write[t], weights[t].unsqueeze(-1))
        return memory

    return run


def gated_write(values, keys, query, write):
    def run():
        gates = torch.sigmoid((query.shape[-1] ** -0.5 * query) @ keys.mT).unsqueeze(-1)  # [T, N, 1]
        memory = values.clone()
        for t in range(len(write)):
            memory.lerp_(write[t], gates[t])
        return memory

    return run
