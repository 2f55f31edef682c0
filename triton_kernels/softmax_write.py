"""softmax_write on a GPU: a = softmax_i(scale <q_t, k_i> + mask_i). Its kernels are those of dense writes: write.py.

A first pass takes from the scores what normalises each token,

    top_t = max_i s[t, i],     rest_t = sum of exp(s[t, i] - top_t) over all slots but the first at top

after which a = exp(s - top) / (1 + rest), and 1 - a of the highest slot is rest / (1 + rest): no difference of numbers
near 1. A program keeps a block of tokens and streams slots; where tokens are few N is split, and a second kernel merges
the parts in their order. Bound by the matrix unit, 2 T N K operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import write as dense
from .declare import FEW, Example, Inputs, operator
from .launch import launch, plan, summed
from .layout import precision
from .tiles import LOG2E, dots, open_slots, scores, slot_block, token_block
from .write_tiles import Write


@triton.jit
def merge_norms(top, rest, best, own_top, own_rest, own_best):
    """Join what two sets of slots gave, the first of them first in order. A top of -inf is a set without a slot."""
    higher = own_top > top
    low, high = tl.where(higher, top, own_top), tl.where(higher, own_top, top)
    lower_rest, higher_rest = tl.where(higher, rest, own_rest), tl.where(higher, own_rest, rest)
    shrunk = (lower_rest + 1.0) * tl.exp2((low - high) * LOG2E)
    joined = higher_rest + tl.where(low == float("-inf"), lower_rest, shrunk)  # a rest without a slot is 0 or NaN
    return high, joined, tl.where(higher, own_best, best)


@triton.jit
def softmax_norm_kernel(
    q, k, mask, top, rest, best, T, N, K, B, B1, inner, parts, span, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """top, rest and best [parts, B, T] of one block of tokens over the slots ``part * span ..``."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    part = pid % parts
    b = pid // parts
    t_ok = t < T
    q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
    highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    others = tl.zeros([BLOCK_T], tl.float32)
    slot = tl.full([BLOCK_T], -1, tl.int32)
    for n0 in range(part * span, tl.minimum(N, (part + 1) * span), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        ok, bias = open_slots(mask, b, B1, n, N)
        k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
        s = scores(dots(q0, q_rows, t_ok, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION), scale, bias[None, :])
        s = tl.where(ok[None, :], s, float("-inf"))
        number = tl.where(s == s, s, float("-inf"))  # NaN reaches the sum alone
        here = tl.max(number, 1)
        first = tl.min(tl.where(number == here[:, None], n[None, :], N), 1)
        base = tl.where(here == float("-inf"), 0.0, here)
        p = tl.where(n[None, :] == first[:, None], 0.0, tl.exp2((s - base[:, None]) * LOG2E))
        p = tl.where(s != s, s, p)
        highest, others, slot = merge_norms(highest, others, slot, here, tl.sum(p, 1), first)
    at = (part.to(tl.int64) * B + b) * T + t
    tl.store(top + at, highest, mask=t_ok)
    tl.store(rest + at, others, mask=t_ok)
    tl.store(best + at, slot, mask=t_ok)


@triton.jit
def norm_merge_kernel(tops, rests, bests, top, rest, best, count, parts, BLOCK_T: tl.constexpr):
    """Merge the parts [parts, count] in their order."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = t < count
    highest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    others = tl.zeros([BLOCK_T], tl.float32)
    slot = tl.full([BLOCK_T], -1, tl.int32)
    for part in range(parts):
        at = t + tl.full([], 1, tl.int64) * part * count
        here = tl.load(tops + at, mask=ok, other=float("-inf"))
        more = tl.load(rests + at, mask=ok, other=0.0)
        first = tl.load(bests + at, mask=ok, other=-1)
        highest, others, slot = merge_norms(highest, others, slot, here, more, first)
    # As in PyTorch: a score of +inf leaves NaN there and 0 elsewhere. With no score above -inf nothing is written.
    infinite = highest == float("inf")
    tl.store(top + t, tl.where(highest == float("-inf"), 0.0, highest), mask=ok)
    tl.store(rest + t, tl.where(infinite, 0.0, others), mask=ok)
    tl.store(best + t, tl.where(infinite, -1, slot), mask=ok)


def _write(op: str, *args) -> Write:
    """The arguments of a write, with what its first pass takes."""
    x = Write(op, "softmax", *args)
    call, N, K, count = x.call, x.N, x.K, x.count
    p, wide = plan("softmax_norm", K, x.query), summed(K, x.query)
    c = p.config
    programs = call.B * triton.cdiv(count, c.block_t)
    parts, span = p.cut(programs, N, c.block_n)

    def numbers(*shape: int):
        floats = [call.scratch(*shape, call.B, count) for _ in range(2)]
        return (*floats, call.scratch(*shape, call.B, count, dtype=torch.int32))

    partial, x.norm = numbers(parts), numbers()
    launch(
        softmax_norm_kernel, programs * parts, call.rows(x.query), call.slots(x.keys), call.slot_numbers(x.slot_mask),
        *partial, count, N, K, call.B, call.batches[1], x.sizes.inner, parts, span, x.scale, plan=p, BLOCK_T=c.block_t,
        BLOCK_N=c.block_n, BLOCK_K=wide.block, K_STEPS=wide.several, PRECISION=precision(x.query),
    )  # fmt: skip
    launch(
        norm_merge_kernel, triton.cdiv(call.B * count, c.block_t), *partial, *x.norm, call.B * count, parts,
        plan=p, BLOCK_T=c.block_t,
    )  # fmt: skip
    return x


@operator
def softmax_write(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, erase_scale: float,
):  # fmt: skip
    """New values ``[..., N, V]``, retained ``[..., N]``."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    return dense.forward(_write("softmax_write", *args), values)


@operator
def softmax_write_(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, erase_scale: float,
) -> Tensor:  # fmt: skip
    """The same into ``values``; returns retained."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    return dense.in_place(_write("softmax_write_", *args), values)


@operator
def softmax_write_backward(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, retained: Tensor, d_values: Tensor | None, d_retained: Tensor | None,
    scale: float, erase_scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of values, keys, query, write, erase and a float mask; ``retained`` is not looked at."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    x = _write("softmax_write_backward", *args)
    x.call.require(len(wants) == 6, "wants must have 6 entries")
    return dense.backward(x, values, d_values, d_retained, wants)


def examples(x: Inputs) -> Iterator[Example]:
    T, N, write = x.tokens, x.slots, functools.partial(dense.example, softmax_write, x)
    yield write(T, N, main=True)
    yield write(FEW, N, 0.0, variant="erase 0, few tokens")
    yield write(T, N, 0.5, True, variant="erase 0.5, retained", heavy=True)
    yield write(T, N // 16, x(2, T, x.width), True, variant="erase tensor, retained")
