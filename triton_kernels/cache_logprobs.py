"""cache_logprobs on a GPU:  log p[t, w],  p = (1 - mix) own + mix cached  (cache_mix.py).

First each entry learns the share that its word has of the cache, from all entries of the token: N^2 comparisons on the
chip, in a fixed order, where adding up by word in memory would need atomics. Then one program per token writes all
words as if no entry named them, log own + log(1 - mix), and writes those again that entries name; entries of one word
write the same number. Bound by reading the logits twice (the second time from cache) and writing the result, up to some
thousand entries; beyond by the comparisons. Beside the result only N numbers per token are in memory.

Backward: with g_w = d_w * (share of the model in p_w) and h_w = d_w * (share of the cache),

    dz = g - own sum(g),     dc_j = softmax(c)_j ((h / cached)_{token_j} - sum(h))
    d mix = sum_w d_w (cached - own) / p

g is d but for the words of the entries, each of which counts once: by the first entry that names it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cache_mix import cache_total, entries, log_rest, mix_call, mix_inputs, mix_plan, mixed, row_lse
from .declare import Example, Inputs, operator
from .launch import launch
from .layout import Call, Gradient
from .tiles import LOG2E, softmax_weights, tokens


@triton.jit
def word_share_kernel(c, words, shares, T, W, N, B1, BLOCK_I: tl.constexpr, BLOCK: tl.constexpr):
    """cached(token_i) of a block of entries of one token, 0 for those without weight: shares [B, T, N].

    Negative where an entry in front names the same word.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_I)
    i = (pid % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    token = pid // blocks
    t, b = token % T, token // T
    scores, named = tokens(c, b, B1, t, None), tokens(words, b, B1, t, None)
    m, total = cache_total(scores, named, N, W, BLOCK)
    score, word = entries(scores, named, i, N, W)
    share = tl.zeros([BLOCK_I], tl.float32)
    front = tl.full([BLOCK_I], 0, tl.int32) + N
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        score_j, word_j = entries(scores, named, j, N, W)
        e = tl.exp2((score_j - m) * LOG2E)
        same = (word[:, None] == word_j[None, :]) & (e != 0)[None, :]
        share += tl.sum(tl.where(same, e[None, :], 0.0), 1)
        front = tl.minimum(front, tl.min(tl.where(same, j[None, :], N), 1))
    share = tl.where(tl.exp2((score - m) * LOG2E) == 0, 0.0, share / tl.where(total == 0, 1.0, total))
    tl.store(shares + token.to(tl.int64) * N + i, tl.where(front == i, share, -share), mask=i < N)


@triton.jit
def mixed_entries(row, lse, lse_rest, scores, words, shares, j, W, N, mix):
    """Of entries ``j``: their score and word, the logit and share of that word, and :func:`mixed`."""
    score, word = entries(scores, words, j, N, W)
    share = tl.load(shares + j, mask=j < N, other=0.0)
    z = tl.load(row + word, mask=share != 0, other=0.0).to(tl.float32)
    log_p, own, cache, d_mix = mixed((z - lse) - lse_rest, tl.abs(share), mix)
    return score, word, z, share, log_p, own, cache, d_mix


@triton.jit
def cache_logprobs_kernel(z, c, words, mix, shares, logprobs, lse, lse_rest, T, W, N, B1, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    t, b = pid % T, pid // T
    row, out = tokens(z, b, B1, t, None), tokens(logprobs, b, B1, t, None)
    scores, named = tokens(c, b, B1, t, None), tokens(words, b, B1, t, None)
    own_lse, own_rest = row_lse(row, W, BLOCK)
    _m, total = cache_total(scores, named, N, W, BLOCK)
    share = tl.where(total == 0, 0.0, tl.load(tokens(mix, b, B1, t, None)))
    tl.store(tokens(lse, b, B1, t, None), own_lse)
    tl.store(tokens(lse_rest, b, B1, t, None), own_rest)
    left = log_rest(share)
    for first in range(0, W, BLOCK):
        w = first + tl.arange(0, BLOCK)
        x = tl.load(row + w, mask=w < W, other=0.0).to(tl.float32)
        tl.store(out + w, ((x - own_lse) - own_rest) + left, mask=w < W)
    tl.debug_barrier()  # what one thread stored, another replaces
    own_shares = shares + pid.to(tl.int64) * N
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        _score, word, _z, cached, log_p, _own, _cache, _d_mix = mixed_entries(
            row, own_lse, own_rest, scores, named, own_shares, j, W, N, share
        )
        tl.store(out + word, log_p, mask=cached != 0)


@triton.jit
def cache_logprobs_backward_kernel(
    z, c, words, mix, shares, lse, lse_rest, d, d_z, d_c, d_mix, T, W, N, B1, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    t, b = pid % T, pid // T
    row, d_row = tokens(z, b, B1, t, None), tokens(d, b, B1, t, None)
    scores, named = tokens(c, b, B1, t, None), tokens(words, b, B1, t, None)
    own_shares = shares + pid.to(tl.int64) * N
    own_lse = tl.load(tokens(lse, b, B1, t, None))
    own_rest = tl.load(tokens(lse_rest, b, B1, t, None))
    m, total = cache_total(scores, named, N, W, BLOCK)
    share = tl.where(total == 0, 0.0, tl.load(tokens(mix, b, B1, t, None)))
    alone = tl.where(share == 1.0, 0.0, 1.0)  # share of the model in words that no entry names

    others = tl.zeros([], tl.float32)  # sum of d over words that have a probability without the cache
    for first in range(0, W, BLOCK):
        w = first + tl.arange(0, BLOCK)
        x = tl.load(row + w, mask=w < W, other=float("-inf")).to(tl.float32)
        d_w = tl.load(d_row + w, mask=w < W, other=0.0)
        others += tl.sum(tl.where(x == float("-inf"), 0.0, d_w), 0)
    model = alone * others
    cached = tl.zeros([], tl.float32)
    slope = tl.zeros([], tl.float32)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        _score, word, x, part, _log_p, own, cache, by_mix = mixed_entries(
            row, own_lse, own_rest, scores, named, own_shares, j, W, N, share
        )
        once = part > 0
        d_w = tl.load(d_row + word, mask=once, other=0.0)
        before = tl.where(x == float("-inf"), 0.0, d_w)
        model += tl.sum(tl.where(once, d_w * own - alone * before, 0.0), 0)
        cached += tl.sum(tl.where(once, d_w * cache, 0.0), 0)
        slope += tl.sum(tl.where(once, d_w * by_mix, 0.0), 0)
        others -= tl.sum(before, 0)

    if d_mix is not None:
        slope -= alone * others / tl.where(share == 1.0, 1.0, 1.0 - share)
        slope = tl.where(total == 0, 0.0, slope)
        tl.store(tokens(d_mix, b, B1, t, None), slope.to(d_mix[0].dtype.element_ty))
    if d_z is not None:
        out = tokens(d_z, b, B1, t, None)
        for first in range(0, W, BLOCK):
            w = first + tl.arange(0, BLOCK)
            x = tl.load(row + w, mask=w < W, other=float("-inf")).to(tl.float32)
            g = tl.where(x == float("-inf"), 0.0, alone * tl.load(d_row + w, mask=w < W, other=0.0))
            dz = g - model * softmax_weights(x, own_lse, own_rest)
            tl.store(out + w, dz.to(d_z[0].dtype.element_ty), mask=w < W)
        tl.debug_barrier()  # what one thread stored, another replaces
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        score, word, x, part, _log_p, own, cache, _by_mix = mixed_entries(
            row, own_lse, own_rest, scores, named, own_shares, j, W, N, share
        )
        d_w = tl.load(d_row + word, mask=part != 0, other=0.0)
        if d_z is not None:
            dz = d_w * own - model * softmax_weights(x, own_lse, own_rest)
            tl.store(tokens(d_z, b, B1, t, None) + word, dz.to(d_z[0].dtype.element_ty), mask=part != 0)
        if d_c is not None:
            worth = tl.where(cache == 0, 0.0, d_w * cache / tl.where(part == 0, 1.0, tl.abs(part)))
            e = tl.exp2((score - m) * LOG2E) / tl.where(total == 0, 1.0, total)
            dc = tl.where(e == 0, 0.0, e * (worth - cached))
            tl.store(tokens(d_c, b, B1, t, None) + j, dc.to(d_c[0].dtype.element_ty), mask=j < N)


def _word_shares(call: Call, cache_scores: Tensor, cache_tokens: Tensor, logits: Tensor, T: int, W: int, N: int):
    shares = call.scratch(call.B, T, N)
    p = mix_plan("word_shares", call, logits)
    launch(
        word_share_kernel, call.B * T * triton.cdiv(N, p.config.block_t), call.rows(cache_scores),
        call.rows(cache_tokens), shares, T, W, N, call.batches[1],
        plan=p, BLOCK_I=p.config.block_t, BLOCK=p.config.block_n,
    )  # fmt: skip
    return shares


@operator
def cache_logprobs(logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor):
    """log-probabilities ``[..., T, W]``, lse and lse_rest of the logits ``[..., T]``."""
    call, T, W, N = mix_call("cache_logprobs", logits, cache_scores, cache_tokens, mix)
    logprobs, view = call.token_result(T, W, dtype=torch.float32)
    (lse, lse_view), (rest, rest_view) = (call.token_result(T, dtype=torch.float32) for _ in range(2))
    shares = _word_shares(call, cache_scores, cache_tokens, logits, T, W, N)
    p = mix_plan("cache_logprobs", call, logits)
    launch(
        cache_logprobs_kernel, call.B * T, call.rows(logits), call.rows(cache_scores), call.rows(cache_tokens),
        call.numbers(mix), shares, (view, *view.stride()[:4]), (lse_view, *lse_view.stride()),
        (rest_view, *rest_view.stride()), T, W, N, call.batches[1],
        plan=p, BLOCK=p.config.block_n,
    )  # fmt: skip
    return call.store(logprobs, view), call.store(lse, lse_view), call.store(rest, rest_view)


@operator
def cache_logprobs_backward(
    logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor, lse: Tensor, lse_rest: Tensor,
    d_logprobs: Tensor | None, wants: list[bool],
):  # fmt: skip
    """Gradients of logits, cache_scores and mix."""
    T, W = logits.shape[-2:]
    more = [("lse", lse, (T,)), ("lse_rest", lse_rest, (T,)), ("d_logprobs", d_logprobs, (T, W))]
    call, T, W, N = mix_call("cache_logprobs_backward", logits, cache_scores, cache_tokens, mix, *more)
    call.require(len(wants) == 3, "wants must have 3 entries")
    call.require(d_logprobs is not None, "d_logprobs must be given")
    call.stats(lse, lse_rest, d_logprobs)
    d_logits = Gradient(call, logits, wants[0], "tokens", T, W)
    d_scores = Gradient(call, cache_scores, wants[1], "tokens", T, N)
    d_mix = Gradient(call, mix, wants[2], "tokens", T)
    shares = _word_shares(call, cache_scores, cache_tokens, logits, T, W, N)
    p = mix_plan("cache_logprobs", call, logits)
    launch(
        cache_logprobs_backward_kernel, call.B * T, call.rows(logits), call.rows(cache_scores),
        call.rows(cache_tokens), call.numbers(mix), shares, call.numbers(lse), call.numbers(lse_rest),
        call.rows(d_logprobs), d_logits.rows(), d_scores.rows(), d_mix.rows(), T, W, N, call.batches[1],
        plan=p, BLOCK=p.config.block_n,
    )  # fmt: skip
    return d_logits.result(), d_scores.result(), d_mix.result()


def examples(x: Inputs) -> Iterator[Example]:
    logits, scores, words, mix = mix_inputs(x)
    yield Example(cache_logprobs, (logits, scores, words, mix), main=True)
