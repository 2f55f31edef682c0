"""What the mixture of a language model and a cache is made of:  p(w) = (1 - mix) own(w) + mix cached(w).

    own = softmax(z_t),     cached(w) = sum_{j: token_j = w} softmax(c_t)_j

Pieces for cache_nll.py and cache_logprobs.py. A program takes one token and streams its words and its entries, a block
at a time; the row of words is read at the bandwidth of memory, and no second one exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import Inputs
from .launch import Plan, plan
from .layout import Call
from .sparse_read import check_indices
from .tiles import LOG2E, log_total

ROW = 64  # the width class of kernels that have no rows of columns
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # of the normal float32 numbers


@triton.jit
def join(s, m, total):
    """Move a running maximum and the sum of exponentials against it over a block of numbers."""
    highest = tl.maximum(m, tl.max(s, 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, total * tl.exp2((m - base) * LOG2E) + tl.sum(tl.exp2((s - base) * LOG2E), 0)


@triton.jit
def row_lse(row, W, BLOCK: tl.constexpr):
    """Log-sum-exp of the numbers of a row and what its rounding left out; -inf and 0 where every one is -inf."""
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in range(0, W, BLOCK):
        w = first + tl.arange(0, BLOCK)
        m, total = join(tl.load(row + w, mask=w < W, other=float("-inf")).to(tl.float32), m, total)
    return log_total(m, total)


@triton.jit
def join_moment(s, m, total, moment):
    """:func:`join`, and the sum of (s - m) exp(s - m), in which words without weight do not count."""
    highest = tl.maximum(m, tl.max(s, 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    x, shift = s - base, tl.where(m == float("-inf"), 0.0, m - base)
    e, factor = tl.exp2(x * LOG2E), tl.exp2((m - base) * LOG2E)
    moment = factor * (moment + total * shift) + tl.sum(tl.where(e == 0, 0.0, e * x), 0)
    return highest, total * factor + tl.sum(e, 0), moment


@triton.jit
def row_stats(row, W, BLOCK: tl.constexpr):
    """Of q, the softmax of a row: log-sum-exp and what its rounding left out, the largest q, -sum q log q; -inf and 0
    where every number is -inf."""
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    moment = tl.zeros([], tl.float32)
    for first in range(0, W, BLOCK):
        w = first + tl.arange(0, BLOCK)
        z = tl.load(row + w, mask=w < W, other=float("-inf")).to(tl.float32)
        m, total, moment = join_moment(z, m, total, moment)
    lse, rest = log_total(m, total)
    divisor = tl.where(total == 0, 1.0, total)
    entropy = tl.log(divisor) - moment / divisor
    largest = tl.where(total == 0, 0.0, 1.0 / divisor)
    return lse, rest, largest, tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def entries(scores, words, j, N, W):
    """Scores of entries ``j``, and their words; -inf and -1 for those that are empty."""
    word = tl.load(words + j, mask=j < N, other=-1)
    word = tl.where(word < W, word, -1)
    score = tl.load(scores + j, mask=word >= 0, other=float("-inf")).to(tl.float32)
    return score, word


@triton.jit
def cache_total(scores, words, N, W, BLOCK: tl.constexpr):
    """The largest score of the entries (0 where all are empty) and the sum of exponentials against it, 0 likewise."""
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for first in range(0, N, BLOCK):
        score, _ = entries(scores, words, first + tl.arange(0, BLOCK), N, W)
        m, total = join(score, m, total)
    return tl.where(m == float("-inf"), 0.0, m), total


@triton.jit
def log_rest(mix):
    """log(1 - mix), what the model's words keep."""
    return tl.log(1.0 - mix)


@triton.jit
def mixed(log_own, cached, mix):
    """Of words: log p, the shares of the model and of the cache in p, and d log p / d mix. All but log p are 0 where p
    is. A word that no entry names, or nothing is left of, belongs to the model alone: its logarithm keeps its digits.
    """
    own = tl.exp(log_own)
    p = (1.0 - mix) * own + mix * cached
    alone = (cached == 0) | (p < SMALLEST)
    log_alone = log_own + log_rest(mix)
    nothing = alone & (log_alone == float("-inf"))
    log_p = tl.where(alone, log_alone, tl.log(p))
    divisor = tl.where(alone, 1.0, p)
    own_share = tl.where(alone, 1.0, (1.0 - mix) * own / divisor)
    cache_share = tl.where(alone, 0.0, mix * cached / divisor)
    d_mix = tl.where(alone, -1.0 / tl.where(mix == 1.0, 1.0, 1.0 - mix), (cached - own) / divisor)
    return log_p, tl.where(nothing, 0.0, own_share), cache_share, tl.where(nothing, 0.0, d_mix)


def mix_call(
    op: str, logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor, *more: tuple
) -> tuple[Call, int, int, int]:
    """The leading dimensions of a call, and T, W, N."""
    (T, W), N = logits.shape[-2:], cache_scores.shape[-1]
    tokens = [("logits", logits, (T, W)), ("cache_scores", cache_scores, (T, N)), ("mix", mix, (T,))]
    call = Call(op, [*tokens, ("cache_tokens", cache_tokens, (T, N)), *more], [])
    call.floats(logits, cache_scores)
    call.stats(mix)
    check_indices(call, cache_tokens, W)
    return call, T, W, N


def mix_plan(kernel: str, call: Call, logits: Tensor) -> Plan:
    """The configuration of a kernel whose blocks lie along a row, however wide that is."""
    return plan(kernel, ROW, logits)


def mix_inputs(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, cache_scores, cache_tokens and mix of an example."""
    words, entries = 50257, 1024
    scores, mix = x(2, x.tokens, entries), x(2, x.tokens, dtype=torch.float32)
    return x(2, x.tokens, words), scores, x.integers(2, x.tokens, entries, below=words), mix
