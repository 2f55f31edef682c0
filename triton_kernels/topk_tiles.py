"""Ranks of scored slots as integers, lists of the best, and their merge.

A scored slot is one int64, its rank: the score in the upper half, mapped so that integers compare as floats do, and the
index in the lower, counted down. A larger rank is a better slot: higher score, then smaller index, and NaN above all.
So ranks are a total order; parts merge to the same list in any order, and ties cannot break differently. A slot that
may not be addressed, or scores -inf, has the lowest rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E

LOWEST = tl.constexpr(-(2**63))


@triton.jit
def ranks(s, n, ok):
    """The ranks of scores ``s`` of slots ``n``."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)  # the two zeros are one score
    bits = tl.where(s != s, 0x7FC00000, bits)
    order = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    rank = (order.to(tl.int64) << 32) | (n ^ 0x7FFFFFFF).to(tl.int64)
    return tl.where(ok & (s != float("-inf")), rank, LOWEST)


@triton.jit
def scored(rank):
    """Score and index (int64) of a rank; -inf and -1 of the lowest."""
    order = (rank >> 32).to(tl.int32)
    bits = tl.where(order >= 0, order, order ^ 0x7FFFFFFF)
    low = (rank & 0x7FFFFFFF).to(tl.int32)
    some = rank != LOWEST
    score = tl.where(some, bits.to(tl.float32, bitcast=True), float("-inf"))
    return score, tl.where(some, low ^ 0x7FFFFFFF, -1).to(tl.int64)


@triton.jit
def best_of(a, b):
    """The better half of two lists [rows, k] in descending order, in descending order: one step of a bitonic merge."""
    return tl.bitonic_merge(tl.maximum(a, tl.flip(b, 1)), descending=True)


@triton.jit
def with_block(best, worst, rank, t_ok, LIST: tl.constexpr, BLOCK_N: tl.constexpr):
    """The lists ``best [BLOCK_T, LIST]`` and their last ranks, after the ranks of a block of slots."""
    better = (rank > worst[:, None]) & t_ok[:, None]
    if tl.max(tl.max(better.to(tl.int32), 1), 0) > 0:
        if BLOCK_N == LIST:
            best = best_of(best, tl.sort(rank, 1, descending=True))
        else:
            best = best_of(best, tl.topk(rank, LIST))
        worst = tl.min(best, 1)
    return best, worst


@triton.jit
def store_lists(lists, best, part, parts, blocks, b, t, t_ok, T, LIST: tl.constexpr):
    """Write the lists of a block of tokens: lists [parts, B, T, LIST]."""
    total = tl.num_programs(0) // (blocks * parts)
    row = ((part.to(tl.int64) * total + b) * T + t) * LIST
    tl.store(lists + row[:, None] + tl.arange(0, LIST)[None, :], best, mask=t_ok[:, None])


@triton.jit
def shares(score, live):
    """Softmax weights of the scores [rows, k] that are ``live``; 0 for the rest, and where nothing is chosen. And the
    logarithm of the sum of their exponentials, -inf where nothing is chosen."""
    score = tl.where(live, score, float("-inf"))
    m = tl.max(score, 1)
    p = tl.exp2((score - tl.where(m == float("-inf"), 0.0, m)[:, None]) * LOG2E)
    total = tl.sum(p, 1)
    some = tl.where(total == 0, 1.0, total)
    lse = tl.where(m == float("inf"), m, m + tl.log(some))  # -inf where nothing is chosen
    return p / some[:, None], lse


def shares_tensor(score: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`shares` of all scores of a tensor."""
    nothing = torch.isneginf(score).all(-1, keepdim=True)
    shares = torch.softmax(score.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    return shares, torch.logsumexp(score, -1)


def scored_tensor(rank: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`scored` of a tensor."""
    order = (rank >> 32).to(torch.int32)
    bits = torch.where(order >= 0, order, order ^ 0x7FFFFFFF)
    some = rank != -(2**63)
    score = torch.where(some, bits.view(torch.float32), -torch.inf)
    return score, torch.where(some, 0x7FFFFFFF - (rank & 0x7FFFFFFF), -1)
