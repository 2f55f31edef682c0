"""cache_nll on a GPU.

    nll_t = -log((1 - mix) own + mix cached)
    own = q_y,  q = softmax(z_t),     cached = sum_{j: token_j = y_t} softmax(c_t)_j

with lse, the largest q and the entropy H = -sum_w q_w log q_w. One program per token. Forward: one pass over the
logits, two over the entries: bound by reading the logits. Backward, with g = -d nll / p and Q = the largest q:

    dz_w = g (1 - mix) own ([w = y] - q_w) + d lse q_w - d H q_w (log q_w + H) + d Q Q ([w is largest] / ties - q_w)
    dc_j = g mix softmax(c)_j ([token_j = y] - cached)
    d mix = g (cached - own)

in one pass that reads every logit and writes its gradient; a gradient of Q needs one before it, which finds the
largest logit and how many are tied. No distribution over words is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cache_mix import cache_total, entries, mix_call, mix_inputs, mix_plan, mixed, row_lse, row_stats
from .declare import Example, Inputs, operator
from .launch import launch
from .layout import Call, Gradient
from .sparse_read import check_indices
from .tiles import LOG2E, softmax_weights, tokens


@triton.jit
def target_mix(row, lse, lse_rest, target, scores, words, mix, W, N, BLOCK: tl.constexpr):
    """:func:`mixed` of the target, 0 of all where it is none; the entries' largest score, their sum of exponentials and
    that of those that name the target."""
    m, total = cache_total(scores, words, N, W, BLOCK)
    hit = tl.zeros([], tl.float32)
    for first in range(0, N, BLOCK):
        score, word = entries(scores, words, first + tl.arange(0, BLOCK), N, W)
        hit += tl.sum(tl.where(word == target, tl.exp2((score - m) * LOG2E), 0.0), 0)
    known = (target >= 0) & (target < W)
    z = tl.load(row + target, mask=known, other=0.0).to(tl.float32)
    empty = total == 0  # then the cache has no say
    cached = hit / tl.where(empty, 1.0, total)
    log_p, own, cache, d_mix = mixed((z - lse) - lse_rest, cached, tl.where(empty, 0.0, mix))
    log_p = tl.where(known, log_p, 0.0)
    own = tl.where(known, own, 0.0)
    cache = tl.where(known, cache, 0.0)
    return log_p, own, cache, tl.where(known & (total != 0), d_mix, 0.0), m, total, hit


@triton.jit
def cache_nll_kernel(
    z, targets, c, words, mix, nll, lse, lse_rest, largest, entropy, T, W, N, B1, STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t, b = pid % T, pid // T
    row = tokens(z, b, B1, t, None)
    if STATS:
        own_lse, own_rest, top, own_entropy = row_stats(row, W, BLOCK)
    else:
        own_lse, own_rest = row_lse(row, W, BLOCK)
        top, own_entropy = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    target = tl.load(tokens(targets, b, B1, t, None))
    share = tl.load(tokens(mix, b, B1, t, None))
    scores, named = tokens(c, b, B1, t, None), tokens(words, b, B1, t, None)
    log_p, _own, _cache, _d_mix, _m, _total, _hit = target_mix(
        row, own_lse, own_rest, target, scores, named, share, W, N, BLOCK
    )
    tl.store(tokens(nll, b, B1, t, None), -log_p)
    tl.store(tokens(lse, b, B1, t, None), own_lse)
    tl.store(tokens(lse_rest, b, B1, t, None), own_rest)
    tl.store(tokens(largest, b, B1, t, None), top)
    tl.store(tokens(entropy, b, B1, t, None), own_entropy)


@triton.jit
def optional(x, b, B1, t):
    """A number of token t of an argument that may be missing: 0 then."""
    if x is not None:  # one return: the compiler reads on behind one that stands in a branch
        number = tl.load(tokens(x, b, B1, t, None))
    else:
        number = tl.zeros([], tl.float32)
    return number


@triton.jit
def largest_of_row(row, W, BLOCK: tl.constexpr):
    """The largest number of a row, and how often it is there."""
    top = tl.full([], float("-inf"), tl.float32)
    ties = tl.zeros([], tl.float32)
    for first in range(0, W, BLOCK):
        w = first + tl.arange(0, BLOCK)
        x = tl.load(row + w, mask=w < W, other=float("-inf")).to(tl.float32)
        highest = tl.max(x, 0)
        ties = tl.where(highest > top, 0.0, ties)
        top = tl.maximum(top, highest)
        ties += tl.sum(tl.where((x == top) & (w < W), 1.0, 0.0), 0)
    return top, ties


@triton.jit
def cache_nll_backward_kernel(
    z, targets, c, words, mix, lse, lse_rest, entropy, d_nll, d_lse, d_largest, d_entropy, d_z, d_c, d_mix, T, W, N, B1,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t, b = pid % T, pid // T
    row = tokens(z, b, B1, t, None)
    own_lse = tl.load(tokens(lse, b, B1, t, None))
    own_rest = tl.load(tokens(lse_rest, b, B1, t, None))
    target = tl.load(tokens(targets, b, B1, t, None))
    share = tl.load(tokens(mix, b, B1, t, None))
    scores, named = tokens(c, b, B1, t, None), tokens(words, b, B1, t, None)
    _log_p, own, cache, slope, m, total, hit = target_mix(
        row, own_lse, own_rest, target, scores, named, share, W, N, BLOCK
    )
    d = -optional(d_nll, b, B1, t)
    if d_z is not None:
        g = d * own
        some = own_lse != float("-inf")  # otherwise no word has a probability
        d_h = tl.where(some, optional(d_entropy, b, B1, t), 0.0)
        flat = tl.where(some, optional(d_lse, b, B1, t), 0.0) - g
        flat -= tl.where(d_h == 0, 0.0, d_h * tl.load(tokens(entropy, b, B1, t, None)))
        top, peak = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
        if d_largest is not None:
            top, ties = largest_of_row(row, W, BLOCK)
            d_top = tl.where(some, optional(d_largest, b, B1, t), 0.0)
            all_of_it = tl.where(d_top == 0, 0.0, d_top * softmax_weights(top, own_lse, own_rest))
            flat -= all_of_it
            peak = all_of_it / tl.maximum(ties, 1.0)
        nothing = (g == 0) & (flat == 0) & (d_h == 0) & (peak == 0)
        out = tokens(d_z, b, B1, t, None)
        for first in range(0, W, BLOCK):
            w = first + tl.arange(0, BLOCK)
            x = tl.load(row + w, mask=w < W, other=float("-inf")).to(tl.float32)
            q = softmax_weights(x, own_lse, own_rest)
            dz = q * flat
            if d_entropy is not None:
                dz -= tl.where(q == 0, 0.0, d_h * q * ((x - own_lse) - own_rest))
            dz += tl.where(w == target, g, 0.0)
            if d_largest is not None:
                dz += tl.where(x == top, peak, 0.0)
            tl.store(out + w, tl.where(nothing, 0.0, dz).to(d_z[0].dtype.element_ty), mask=w < W)
    if d_c is not None:
        g = d * cache
        out = tokens(d_c, b, B1, t, None)
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            score, word = entries(scores, named, j, N, W)
            e = tl.exp2((score - m) * LOG2E)
            of_target = tl.where(word == target, 1.0 / tl.where(hit == 0, 1.0, hit), 0.0)
            dc = g * e * (of_target - 1.0 / tl.where(total == 0, 1.0, total))
            dc = tl.where(e == 0, 0.0, dc)
            tl.store(out + j, tl.where(g == 0, 0.0, dc).to(d_c[0].dtype.element_ty), mask=j < N)
    if d_mix is not None:
        tl.store(tokens(d_mix, b, B1, t, None), tl.where(d == 0, 0.0, d * slope).to(d_mix[0].dtype.element_ty))


def _call(
    op: str, logits: Tensor, targets: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor, *more: tuple
) -> tuple[Call, int, int, int]:
    T = logits.shape[-2]
    call, T, W, N = mix_call(op, logits, cache_scores, cache_tokens, mix, ("targets", targets, (T,)), *more)
    check_indices(call, targets, W)
    return call, T, W, N


@operator
def cache_nll(logits: Tensor, targets: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor, stats: bool):
    """nll, and lse, lse_rest, the largest probability and the entropy of the logits, ``[..., T]``; the last two are 0
    without ``stats``."""
    call, T, W, N = _call("cache_nll", logits, targets, cache_scores, cache_tokens, mix)
    results = [call.token_result(T, dtype=torch.float32) for _ in range(5)]
    views = [(view, *view.stride()) for _, view in results]
    p = mix_plan("cache_nll", call, logits)
    launch(
        cache_nll_kernel, call.B * T, call.rows(logits), call.numbers(targets), call.rows(cache_scores),
        call.rows(cache_tokens), call.numbers(mix), *views, T, W, N, call.batches[1],
        plan=p, STATS=stats, BLOCK=p.config.block_n,
    )  # fmt: skip
    return tuple(call.store(result, view) for result, view in results)


@operator
def cache_nll_backward(
    logits: Tensor, targets: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor, lse: Tensor,
    lse_rest: Tensor, entropy: Tensor, d_nll: Tensor | None, d_lse: Tensor | None, d_largest: Tensor | None,
    d_entropy: Tensor | None, stats: bool, wants: list[bool],
):  # fmt: skip
    """Gradients of logits, cache_scores and mix."""
    T = logits.shape[-2]
    saved = {"lse": lse, "lse_rest": lse_rest, "entropy": entropy}
    given = {"d_nll": d_nll, "d_lse": d_lse, "d_largest": d_largest, "d_entropy": d_entropy}
    more = [(name, x, (T,)) for name, x in (saved | given).items()]
    call, T, W, N = _call("cache_nll_backward", logits, targets, cache_scores, cache_tokens, mix, *more)
    call.require(len(wants) == 3, "wants must have 3 entries")
    call.stats(*saved.values(), *given.values())
    d_logits = Gradient(call, logits, wants[0], "tokens", T, W)
    d_scores = Gradient(call, cache_scores, wants[1], "tokens", T, N)
    d_mix = Gradient(call, mix, wants[2], "tokens", T)
    p = mix_plan("cache_nll", call, logits)
    launch(
        cache_nll_backward_kernel, call.B * T, call.rows(logits), call.numbers(targets), call.rows(cache_scores),
        call.rows(cache_tokens), call.numbers(mix), *map(call.numbers, saved.values()),
        *map(call.numbers, given.values()), d_logits.rows(), d_scores.rows(), d_mix.rows(), T, W, N, call.batches[1],
        plan=p, BLOCK=p.config.block_n,
    )  # fmt: skip
    return d_logits.result(), d_scores.result(), d_mix.result()


def examples(x: Inputs) -> Iterator[Example]:
    logits, scores, words, mix = mix_inputs(x)
    call = (logits, words[..., 0], scores, words, mix)
    yield Example(cache_nll, (*call, False), main=True, gradients=("nll",))
    yield Example(cache_nll, (*call, True), "stats")
