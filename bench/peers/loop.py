"""A Python loop over the tokens, as recurrent memories are usually written: one in-place update per token."""

from __future__ import annotations

import numpy as np
import torch

NAME = "loop"
DIRECTIONS = ("forward",)
QUICK = True
HEADS = False


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


def gated_scan(forget, update):
    def run():
        states, h = torch.empty_like(update), torch.zeros_like(update[:, 0])
        for t in range(update.shape[1]):
            h = torch.addcmul(update[:, t], forget[:, t], h)
            states[:, t] = h
        return states

    return run


def cell_scan(inputs, weight):
    columns, width = weight.mT.contiguous(), weight.shape[-1]

    def run():
        states, h = inputs.new_empty(*inputs.shape[:2], width), inputs.new_zeros(len(inputs), width)
        for t in range(inputs.shape[1]):
            z = torch.addmm(inputs[:, t], h, columns)
            gates = torch.sigmoid(z[:, : 2 * width])
            h = gates[:, :width] * h + gates[:, width:] * torch.tanh(z[:, 2 * width :])
            states[:, t] = h
        return states

    return run


def memory_scan(values, keys, read_query, write_query, write):
    scale = keys.shape[-1] ** -0.5

    def run():
        gates = torch.sigmoid(scale * write_query @ keys.mT).unsqueeze(-1)  # [T, N, 1]
        weights = torch.softmax(scale * read_query @ keys.mT, -1)
        memory, reads = values.clone(), torch.empty_like(write)
        for t in range(len(write)):
            memory.lerp_(write[t], gates[t])
            torch.mv(memory.mT, weights[t], out=reads[t])
        return reads

    return run


def ngram_slots(tokens, sizes, multipliers, token_map, orders, heads):
    """NumPy on the numbers of one token at a time."""
    tokens, sizes, multipliers, token_map = (x.numpy() for x in (tokens, sizes, multipliers, token_map))
    longest = max(orders)
    by_table = np.repeat(np.array(orders) - 1, heads)
    offsets, factors = np.cumsum(sizes) - sizes, multipliers[:longest]

    def run():
        slots = np.empty((len(tokens), len(sizes)), np.int64)
        last = np.zeros(longest, np.int64)  # the last one first
        for t, token in enumerate(tokens):
            last[1:] = last[:-1]
            last[0] = token_map[token]
            mixes = np.bitwise_xor.accumulate(last * factors)
            slots[t] = offsets + mixes[by_table] % sizes
        return torch.from_numpy(slots)

    return run
