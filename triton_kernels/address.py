"""address on a GPU: the explicit weights of every token on every slot.

    w[t, i] = gate(scale <q_t, k_i> + mask_i),  gate = softmax over the slots, or sigmoid

The softmax takes the lse, and what its rounding left out, first (the kernel of softmax_read); then every tile of
weights is independent: scores, one exponential, one store. Bound by writing [T, N]. Backward from the weights
themselves: see score_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .declare import SCALE, Example, Inputs, operator
from .launch import launch, plan, summed
from .layout import Call, Gradient, precision
from .ranges import load_ranges, within
from .score_gradients import score_gradients, shifted_lse
from .softmax_read import softmax_lse
from .tiles import dots, open_slots, scores, sigmoid, slot_block, softmax_weights, token_block, tokens


@triton.jit
def address_kernel(
    q, k, mask, ranges, lse, rest, w, T, N, K, B1, inner, scale, SIGMOID: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of weights."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    n = (pid % tl.cdiv(N, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = pid // tl.cdiv(N, BLOCK_N)
    t_ok = t < T
    ok, bias = open_slots(mask, b, B1, n, N)
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
    k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
    dot = dots(q0, q_rows, t_ok, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION)
    s = scores(dot, scale, bias[None, :])
    if SIGMOID:
        weights = sigmoid(s)
    else:
        rest_t = tl.load(tokens(rest, b, B1, t, inner), mask=t_ok, other=0.0)
        weights = softmax_weights(s, shifted_lse(lse, b, B1, t, inner, T)[:, None], rest_t[:, None])
    live = within(ranges, ok[None, :], first[:, None], stop[:, None], n[None, :])
    weights = tl.where(live, weights, 0.0)
    rows = tokens(w, b, B1, t, inner)
    tl.store(rows[:, None] + n[None, :], weights.to(w[0].dtype.element_ty), mask=t_ok[:, None] & (n < N)[None, :])


def _call(
    op: str, query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, *more: tuple
) -> Call:
    (T, K), N = query.shape[-2:], keys.shape[-2]
    tokens = [("query", query, (T, K)), ("slot_range", slot_range, (T, 2)), *more]
    call = Call(op, tokens, [("keys", keys, (N, K)), ("slot_mask", slot_mask, (N,))])
    call.floats(query, keys)
    call.mask(slot_mask)
    call.ranges(slot_range)
    return call


@operator
def address(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float, sigmoid: bool
) -> Tensor:
    """weights ``[..., T, N]``."""
    call = _call("address", query, keys, slot_mask, slot_range)
    (T, K), N = query.shape[-2:], keys.shape[-2]
    out, view = call.token_result(T, N, dtype=query.dtype)
    lse, rest = (None, None) if sigmoid else softmax_lse(call, query, keys, slot_mask, scale, slot_range)
    p = plan("address", K, query)
    c, wide, count = p.config, summed(K, query), call.F * T
    launch(
        address_kernel, call.B * triton.cdiv(count, c.block_t) * triton.cdiv(N, c.block_n),
        call.rows(query), call.slots(keys), call.slot_numbers(slot_mask), call.rows(slot_range), call.numbers(lse),
        call.numbers(rest), (view, *view.stride()[:4]), count, N, K, call.batches[1], T if call.F > 1 else None, scale,
        sigmoid,
        plan=p, BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=wide.block, K_STEPS=wide.several,
        PRECISION=precision(query),
    )  # fmt: skip
    return call.store(out, view)


@operator
def address_backward(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, weights: Tensor,
    d_weights: Tensor | None, scale: float, sigmoid: bool, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys and a float mask."""
    (T, K), N = query.shape[-2:], keys.shape[-2]
    more = [("weights", weights, (T, N)), ("d_weights", d_weights, (T, N))]
    call = _call("address_backward", query, keys, slot_mask, slot_range, *more)
    call.require(len(wants) == 3, "wants must have 3 entries")
    call.require(d_weights is not None, "d_weights is missing")
    call.floats(weights, d_weights)
    d_query = Gradient(call, query, wants[0], "tokens", T, K)
    d_keys = Gradient(call, keys, wants[1], "memory", N, K)
    d_mask = Gradient(call, slot_mask, wants[2], "memory", N)
    score_gradients(
        call, "sigmoid" if sigmoid else "softmax", query, keys, slot_mask, scale, d_query, d_keys, d_mask,
        weights=weights, d_weights=d_weights, slot_range=slot_range,
    )  # fmt: skip
    return d_query.result(), d_keys.result(), d_mask.result()


def examples(x: Inputs) -> Iterator[Example]:
    q, k = x(2, x.tokens, x.width), x(2, x.slots, x.width)
    yield Example(address, (q, k, None, None, SCALE, False), variant="softmax", main=True)
    yield Example(address, (q, k, None, None, SCALE, True), variant="sigmoid")
    ranges = x.ranges(2, x.tokens)
    yield Example(address, (q, k, None, ranges, SCALE, False), variant="softmax, ranges")
    yield Example(address, (q, k, None, ranges, SCALE, True), variant="sigmoid, ranges")
