"""slot_usage on a GPU: usage_i = sum_t exp(scale <q_t, k_i> + mask_i - lse_t).

A program keeps a block of slots and streams tokens, so the sum over tokens stays in registers; where slots are few the
tokens are split and the float32 parts added in their order. Bound by the matrix unit: 2 T N K operations.
Backward: ds = p du_i; see score_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import SCALE, Example, Inputs, operator
from .launch import launch_in_parts, plan, summed
from .layout import Call, Gradient, precision
from .ranges import load_ranges, meets, within
from .score_gradients import score_gradients, shifted_lse
from .tiles import LOG2E, add, dots, open_slots, scores, slot_block, slots, token_block


class Cut(NamedTuple):
    """Of the tokens: see ``launch_in_parts``."""

    parts: int
    span: int
    usage_part: int


@triton.jit
def slot_usage_kernel(
    q, k, mask, ranges, lse, usage, T, N, K, B1, inner, cut, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of slots over the tokens ``part * span ..`` of one batch."""
    parts, span, usage_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n0 = (pid % blocks) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    part = pid % parts
    b = pid // parts
    ok, bias = open_slots(mask, b, B1, n, N)
    k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
    total = tl.zeros([BLOCK_N], tl.float32)
    lost = tl.zeros([BLOCK_N], tl.float32)
    for t0 in range(part * span, tl.minimum(T, (part + 1) * span), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = t < T
        first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
        if ranges is None or meets(first, stop, n0, n0 + BLOCK_N):
            q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
            dot = dots(k0, k_rows, ok, q0, q_rows, t_ok, K, BLOCK_K, K_STEPS, PRECISION)
            s = scores(dot, scale, bias[:, None])
            p = tl.exp2((s - shifted_lse(lse, b, B1, t, inner, T)[None, :]) * LOG2E)
            live = within(ranges, ok[:, None] & t_ok[None, :], first[None, :], stop[None, :], n[:, None])
            total, lost = add(total, lost, tl.sum(tl.where(live, p, 0.0), 1))
    tl.store(slots(usage, b, B1, n) + part.to(tl.int64) * usage_part, total, mask=n < N)


def _call(
    op: str, query: Tensor, keys: Tensor, lse: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None
) -> Call:
    (T, K), N = query.shape[-2:], keys.shape[-2]
    tokens = [("query", query, (T, K)), ("lse", lse, (T,)), ("slot_range", slot_range, (T, 2))]
    call = Call(op, tokens, [("keys", keys, (N, K)), ("slot_mask", slot_mask, (N,))])
    call.floats(query, keys)
    call.stats(lse)
    call.mask(slot_mask)
    call.ranges(slot_range)
    return call


@operator
def slot_usage(
    query: Tensor, keys: Tensor, lse: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float
) -> Tensor:
    """usage ``[..., N]``, float32."""
    call = _call("slot_usage", query, keys, lse, slot_mask, slot_range)
    (T, K), N = query.shape[-2:], keys.shape[-2]
    usage = call.memory_result(N, dtype=torch.float32)
    p = plan("slot_usage", K, query)
    c, wide, count = p.config, summed(K, query), call.F * T
    launch_in_parts(
        call, slot_usage_kernel, call.B * triton.cdiv(N, c.block_n), count, c.block_t,
        (call.rows(query), call.slots(keys), call.slot_numbers(slot_mask), call.rows(slot_range), call.numbers(lse)),
        ((usage, call.batches[1] * N, N, 1),), (count, N, K, call.batches[1], T if call.F > 1 else None), Cut,
        scale,
        plan=p, BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=wide.block, K_STEPS=wide.several,
        PRECISION=precision(query),
    )  # fmt: skip
    return usage


@operator
def slot_usage_backward(
    query: Tensor, keys: Tensor, lse: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    d_usage: Tensor | None, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, lse and a float mask."""
    (T, K), N = query.shape[-2:], keys.shape[-2]
    call = _call("slot_usage_backward", query, keys, lse, slot_mask, slot_range)
    call.require(len(wants) == 4, "wants must have 4 entries")
    call.require(d_usage is not None, "d_usage is missing")
    call.require(tuple(d_usage.shape) == (*call.memory, N), "d_usage must have the shape of usage")
    call.stats(d_usage)
    d_query = Gradient(call, query, wants[0], "tokens", T, K)
    d_keys = Gradient(call, keys, wants[1], "memory", N, K)
    d_lse = Gradient(call, lse, wants[2], "tokens", T)
    d_mask = Gradient(call, slot_mask, wants[3], "memory", N)
    score_gradients(
        call, "usage", query, keys, slot_mask, scale, d_query, d_keys, d_mask, lse=lse, d_lse=d_lse, d_usage=d_usage,
        slot_range=slot_range,
    )  # fmt: skip
    return d_query.result(), d_keys.result(), d_lse.result(), d_mask.result()


def examples(x: Inputs) -> Iterator[Example]:
    q, k, lse = x(2, x.tokens, x.width), x(2, x.slots, x.width), x(2, x.tokens, dtype=torch.float32)
    yield Example(slot_usage, (q, k, lse, None, None, SCALE), main=True)
    yield Example(slot_usage, (q, k, lse, None, x.ranges(2, x.tokens), SCALE), variant="ranges", heavy=True)
