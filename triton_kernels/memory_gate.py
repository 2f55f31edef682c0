"""memory_gate on a GPU: out_b = a_b v, a = sigmoid(s), s = sign(g) sqrt(max(|g|, 1e-6)) or g itself,

    g = r_h r_k <h w, k> / sqrt(D),     w = w_h w_k,     r_x = 1 / sqrt(mean(x^2) + eps)

A program takes one branch of several tokens, so that the weights, which all tokens share, are loaded once for them.
Rows are summed block by block, each within a warp: no barriers, and registers for many loads at once. Hidden states,
keys and values are read once, the result is written once: bound by bandwidth. Where tokens are few, a program has one.

Backward, with da = <d_b, v>, ds = da a (1 - a), dg = ds / (2 sqrt(|g|)) or ds, c = dg r_h r_k / sqrt(D):

    dv = sum_b a_b d_b,     dh = c k w - dg g r_h^2 h / D,     dk = c h w - dg g r_k^2 k / D,
    dw_h = w_k G,     dw_k = w_h G,     G = sum_t c h k

A first kernel makes the numbers of each row: it needs whole rows of d and v. After that every column stands alone, so
that a second kernel takes blocks of columns and of tokens, with all branches one after the other: dv stays in
registers, and G is a partial sum per block of tokens. These are added in order. d is read twice, all else once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import FEW, Example, Inputs, operator
from .launch import launch, plan
from .layout import INDEX_LIMIT, Call, Gradient
from .tiles import batch, put, sigmoid, tile, tokens

LEAST = tl.constexpr(1e-6)  # under the square root
NUMBERS = tl.constexpr(4)  # of a row: the gate a, c, and what multiplies h and k
WHOLE = 4096  # columns of a block where a program has one token


@triton.jit
def _gate(score, SIGNED: tl.constexpr):
    """The weight of a value. sign(0) = 0; NaN stays NaN."""
    s = score
    if SIGNED:
        root = tl.sqrt_rn(tl.maximum(tl.abs(score), LEAST))
        s = tl.where(score > 0, root, tl.where(score < 0, -root, score))
    return sigmoid(s)


@triton.jit
def _weights(x, branch, D, start, BLOCK: tl.constexpr):
    """Columns of the weights of a branch, float32."""
    d = start + tl.arange(0, BLOCK)
    return tl.load(x[0] + branch.to(tl.int64) * x[1] + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def memory_gate_kernel(
    hidden, key, value, hidden_weight, key_weight, gated, hidden_rstd, key_rstd, score,
    total, B, D, B1, mean, root, eps, SIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean = 1 / D, root = 1 / sqrt(D). The results are contiguous [total, B, ...]."""
    branch = tl.program_id(0) % B
    t = (tl.program_id(0) // B) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = t < total
    h_rows, k_rows = tokens(hidden, t, B1, branch, None), tokens(key, t, B1, branch, None)
    v_rows = batch(value, t, B1)
    first = tile(v_rows, ok, D, 0, BLOCK_D)
    hh = tl.zeros([BLOCK_T], tl.float32)
    kk, hk = hh, hh
    for start in range(0, D, BLOCK_D):
        h = tile(h_rows, ok, D, start, BLOCK_D).to(tl.float32)
        k = tile(k_rows, ok, D, start, BLOCK_D).to(tl.float32)
        w = _weights(hidden_weight, branch, D, start, BLOCK_D) * _weights(key_weight, branch, D, start, BLOCK_D)
        hh += tl.sum(h * h, 1)
        kk += tl.sum(k * k, 1)
        hk += tl.sum(h * w[None, :] * k, 1)
    h_rstd, k_rstd = 1.0 / tl.sqrt_rn(hh * mean + eps), 1.0 / tl.sqrt_rn(kk * mean + eps)
    g = hk * h_rstd * k_rstd * root
    row = t.to(tl.int64) * B + branch
    tl.store(hidden_rstd + row, h_rstd, mask=ok)
    tl.store(key_rstd + row, k_rstd, mask=ok)
    tl.store(score + row, g, mask=ok)
    a = _gate(g, SIGNED)[:, None]
    out = gated[0] + row * gated[1]
    put(out, ok, D, 0, a * first.to(tl.float32), BLOCK_D)
    for start in range(BLOCK_D, D, BLOCK_D):
        put(out, ok, D, start, a * tile(v_rows, ok, D, start, BLOCK_D).to(tl.float32), BLOCK_D)


@triton.jit
def memory_gate_numbers_kernel(
    value, d_gated, hidden_rstd, key_rstd, score, numbers, total, B, D, B1, mean, root,
    SIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """numbers [NUMBERS, total, B] of rows, which are tokens and branches. d_gated: None where the gate is enough."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = row < total * B
    t, branch = row // B, row % B
    da = tl.zeros([BLOCK_T], tl.float32)
    if d_gated is not None:
        for start in range(0, D, BLOCK_D):
            d = tile(tokens(d_gated, t, B1, branch, None), ok, D, start, BLOCK_D).to(tl.float32)
            da += tl.sum(d * tile(batch(value, t, B1), ok, D, start, BLOCK_D).to(tl.float32), 1)
    g = tl.load(tokens(score, t, B1, branch, None), mask=ok, other=0.0)
    h_rstd = tl.load(tokens(hidden_rstd, t, B1, branch, None), mask=ok, other=0.0)
    k_rstd = tl.load(tokens(key_rstd, t, B1, branch, None), mask=ok, other=0.0)
    a = _gate(g, SIGNED)
    dg = da * a * (1.0 - a)
    if SIGNED:  # constant below LEAST, but NaN stays NaN
        slope = 0.5 / tl.sqrt_rn(tl.maximum(tl.abs(g), LEAST))
        dg = tl.where(tl.abs(g) < LEAST, dg * 0.0, dg * slope)
    plane = (tl.full([], 0, tl.int64) + total) * B
    tl.store(numbers + row, a, mask=ok)
    tl.store(numbers + plane + row, dg * h_rstd * k_rstd * root, mask=ok)
    tl.store(numbers + 2 * plane + row, dg * g * h_rstd * h_rstd * mean, mask=ok)
    tl.store(numbers + 3 * plane + row, dg * g * k_rstd * k_rstd * mean, mask=ok)


@triton.jit
def memory_gate_gradient_kernel(
    hidden, key, hidden_weight, key_weight, d_gated, numbers, d_hidden, d_key, d_value, sums, total, B, D, B1,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of columns of one block of tokens. sums [blocks of tokens, B, D]: its share of G."""
    steps = tl.cdiv(D, BLOCK_D)
    column = (tl.program_id(0) % steps) * BLOCK_D
    part = tl.program_id(0) // steps
    t = part * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = t < total
    plane = (tl.full([], 0, tl.int64) + total) * B
    dv = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in range(B):
        branch = tl.full([], 0, tl.int32) + i
        of = numbers + t.to(tl.int64) * B + branch
        if d_value is not None:
            a = tl.load(of, mask=ok, other=0.0)
            d = tile(tokens(d_gated, t, B1, branch, None), ok, D, column, BLOCK_D).to(tl.float32)
            dv += a[:, None] * d
        if hidden is not None:
            c = tl.load(of + plane, mask=ok, other=0.0)[:, None]
            h = tile(tokens(hidden, t, B1, branch, None), ok, D, column, BLOCK_D).to(tl.float32)
            k = tile(tokens(key, t, B1, branch, None), ok, D, column, BLOCK_D).to(tl.float32)
            w = _weights(hidden_weight, branch, D, column, BLOCK_D) * _weights(key_weight, branch, D, column, BLOCK_D)
            cw = c * w[None, :]
            if d_hidden is not None:
                less = tl.load(of + 2 * plane, mask=ok, other=0.0)[:, None]
                put(tokens(d_hidden, t, B1, branch, None), ok, D, column, cw * k - less * h, BLOCK_D)
            if d_key is not None:
                less = tl.load(of + 3 * plane, mask=ok, other=0.0)[:, None]
                put(tokens(d_key, t, B1, branch, None), ok, D, column, cw * h - less * k, BLOCK_D)
            if sums is not None:
                columns = column + tl.arange(0, BLOCK_D)
                share = sums + (part.to(tl.int64) * B + branch) * D + columns
                tl.store(share, tl.sum(c * h * k, 0), mask=columns < D)
    if d_value is not None:
        put(batch(d_value, t, B1), ok, D, column, dv, BLOCK_D)


class _Gate:
    """The arguments of one call as kernels see them: a branch is a token of its stream, which is a token."""

    def __init__(
        self, op: str, hidden: Tensor, key: Tensor, value: Tensor, hidden_weight: Tensor, key_weight: Tensor,
        *more: tuple,
    ) -> None:  # fmt: skip
        self.B, self.D = B, D = hidden.shape[-2:]
        items = [("hidden", hidden, (B, D)), ("key", key, (B, D)), ("value", value, (D,))]
        self.call = call = Call(op, [*items, *more], [])
        call.floats(hidden, hidden_weight, key_weight)
        call.require(key.dtype == value.dtype == hidden.dtype, "key and value must have the dtype of hidden")
        call.require(call.B * B <= INDEX_LIMIT, "tokens times branches must be counted in 31 bits")
        self.hidden, self.key = hidden, key
        self.value = value.unsqueeze(-2)
        self.weights = [
            (w := call.flat(name, x, B, D), w.stride(0))
            for name, x in (("hidden_weight", hidden_weight), ("key_weight", key_weight))
        ]
        self.counts = (call.B, B, D, call.batches[1])
        self.scales = (1.0 / max(D, 1), max(D, 1) ** -0.5)

    def blocks(self, rows: int):
        """The plan of a kernel that sums over whole rows, and tokens and columns of its blocks."""
        p = plan("memory_gate", self.D, self.hidden)
        t, d = p.config.block_t, min(p.config.block_n, max(16, triton.next_power_of_2(self.D)))
        if d < self.D and triton.cdiv(rows, t) < p.processors:
            t, d = 1, min(WHOLE, triton.next_power_of_2(self.D))
        return p, t, d


@operator
def memory_gate(
    hidden: Tensor, key: Tensor, value: Tensor, hidden_weight: Tensor, key_weight: Tensor, eps: float,
    signed_sqrt: bool,
):  # fmt: skip
    """gated ``[..., B, D]``; hidden_rstd, key_rstd and score ``[..., B]``."""
    gate = _Gate("memory_gate", hidden, key, value, hidden_weight, key_weight)
    call, (total, B, D, _) = gate.call, gate.counts
    gated = torch.empty((*call.whole, B, D), dtype=hidden.dtype, device=call.device)
    stats = [call.scratch(*call.whole, B) for _ in range(3)]
    p, block_t, block_d = gate.blocks(total * B)
    launch(
        memory_gate_kernel, triton.cdiv(total, block_t) * B, call.rows(hidden), call.rows(key), call.rows(gate.value),
        *gate.weights, (gated, D, 1), *stats, *gate.counts, *gate.scales, eps,
        plan=p, SIGNED=signed_sqrt, BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return gated, *stats


@operator
def memory_gate_backward(
    hidden: Tensor, key: Tensor, value: Tensor, hidden_weight: Tensor, key_weight: Tensor, hidden_rstd: Tensor,
    key_rstd: Tensor, score: Tensor, d_gated: Tensor | None, eps: float, signed_sqrt: bool, wants: list[bool],
):  # fmt: skip
    """Gradients of hidden, key, value and both weights."""
    B, D = hidden.shape[-2:]
    stats = [("hidden_rstd", hidden_rstd, (B,)), ("key_rstd", key_rstd, (B,)), ("score", score, (B,))]
    given = (hidden, key, value, hidden_weight, key_weight)
    gate = _Gate("memory_gate_backward", *given, *stats, ("d_gated", d_gated, (B, D)))
    call = gate.call
    call.require(len(wants) == 5, "wants must have 5 entries")
    call.require(d_gated is not None, "d_gated must be given")
    call.require(d_gated.dtype == hidden.dtype, "d_gated must have the dtype of hidden")
    call.stats(hidden_rstd, key_rstd, score)
    d_hidden = Gradient(call, hidden, wants[0], "tokens", B, D)
    d_key = Gradient(call, key, wants[1], "tokens", B, D)
    d_value = Gradient(call, gate.value, wants[2], "tokens", 1, D)
    weights = wants[3] or wants[4]
    through_score = weights or d_hidden.wanted or d_key.wanted
    numbers = _numbers(gate, (hidden_rstd, key_rstd, score), d_gated, signed_sqrt, through_score)
    shares = _gradients(gate, numbers, d_gated, (d_hidden, d_key, d_value), weights)
    d_weights = []
    for want, own, other in ((wants[3], hidden_weight, key_weight), (wants[4], key_weight, hidden_weight)):
        result = (shares * other).to(own.dtype) if want else torch.empty(0, dtype=own.dtype, device=call.device)
        d_weights.append(result)
    of_value = d_value.result()
    return d_hidden.result(), d_key.result(), of_value.squeeze(-2) if d_value.wanted else of_value, *d_weights


def _numbers(gate: _Gate, stats: tuple, d_gated: Tensor, signed: bool, through_score: bool) -> Tensor:
    """What the gradients take of each row, ``[NUMBERS, total, B]``."""
    call, (total, B, *_) = gate.call, gate.counts
    numbers = call.scratch(NUMBERS.value, total, B)
    p, block_t, block_d = gate.blocks(total * B)
    launch(
        memory_gate_numbers_kernel, triton.cdiv(total * B, block_t), call.rows(gate.value),
        call.rows(d_gated) if through_score else None, *map(call.numbers, stats), numbers,
        *gate.counts, *gate.scales, plan=p, SIGNED=signed, BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return numbers


def _gradients(
    gate: _Gate, numbers: Tensor, d_gated: Tensor, wanted: tuple[Gradient, Gradient, Gradient], weights: bool
) -> Tensor | None:
    """Fill the gradients of hidden, key and value; returns G ``[B, D]`` where ``weights`` have a gradient."""
    call, (total, B, D, _) = gate.call, gate.counts
    d_hidden, d_key, d_value = (g.rows() for g in wanted)
    p = plan("memory_gate_gradient", D, gate.hidden)
    block_t, block_d = p.config.block_t, min(p.config.block_n, max(16, triton.next_power_of_2(D)))
    parts = triton.cdiv(total, block_t)
    sums = call.scratch(parts, B, D) if weights else None
    through_score = weights or d_hidden is not None or d_key is not None
    if through_score or d_value is not None:
        launch(
            memory_gate_gradient_kernel, parts * triton.cdiv(D, block_d),
            *((call.rows(gate.hidden), call.rows(gate.key), *gate.weights) if through_score else [None] * 4),
            call.rows(d_gated) if d_value is not None else None, numbers, d_hidden, d_key, d_value, sums,
            *gate.counts, plan=p, BLOCK_T=block_t, BLOCK_D=block_d,
        )  # fmt: skip
    return None if sums is None else sums.sum(0)


def examples(x: Inputs) -> Iterator[Example]:
    def call(T: int, signed: bool = True, dtype: torch.dtype | None = None, D: int = x.width, **which) -> Example:
        weights = (x(4, D, dtype=dtype), x(4, D, dtype=dtype))
        return Example(memory_gate, (x(2, T, 4, D), x(2, T, 4, D), x(2, T, D), *weights, 1e-6, signed), **which)

    yield call(8 * x.tokens, main=True)
    yield call(8 * x.tokens, False, torch.float32, variant="plain gate, float32 weights")
    yield call(FEW, variant="few tokens")
