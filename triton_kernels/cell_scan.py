"""cell_scan on a GPU: [zf, zi, zc] = x_t + W h_{t-1},  h_t = f h_{t-1} + i c,  f = sigmoid(zf), i = sigmoid(zi),
c = tanh(zc).

Every number of h_t needs all of h_{t-1}, so tokens go one after the other. A program keeps a block of streams and goes
through the columns of the state in blocks; the state passes from token to token through memory, float32, behind a
barrier of the program. Up to HELD columns that is one launch for all tokens: the weight stays in the caches, and
streams share each pass over it. Above, one SM would need longer for a pass over the weight than a launch takes,
so every token is a launch with a program per block of columns, and the launches are the barrier. Bound by latency along
T. Of a 16-bit call the state goes into the product in two 16-bit parts: its rounding would add up along T.

Backward, with g_t = dh_t + what comes from behind:

    dzf = g h_{t-1} f (1 - f),  dzi = g c i (1 - i),  dzc = g i (1 - c^2),     from behind:  g f + W^T dz
    dx_t = dz,  dW = sum dz h_{t-1}^T,  dh_0 = what is left

All states are known, so what multiplies g is made for all tokens at once (`cell_gates_kernel`), and dz takes its place,
token by token from the last (`cell_scan_backward_kernel`); f g takes the place of f. dW is one product at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import Example, Inputs, operator
from .gated_scan import InitialGradient, initial_row
from .launch import Plan, launch, plan
from .layout import Call, Gradient, precision
from .score_gradients import score_gradients
from .tiles import product, put, sigmoid, slots, tanh_slope, tile, tokens

HELD = 256


@triton.jit
def _split_product(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y of a float32 ``x``, which goes in two parts where ``y`` has 16 bits."""
    high = x.to(y.dtype)
    acc = product(high, y, acc, PRECISION)
    if y.dtype != tl.float32:
        acc = product((x - high.to(tl.float32)).to(y.dtype), y, acc, PRECISION)
    return acc


@triton.jit
def _scores(
    x_rows, h_rows, ok, w, b, B1, column, D, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """zf, zi, zc ``[rows, BLOCK_D]`` of the columns from ``column``."""
    d = column + tl.arange(0, BLOCK_D)
    d_ok = d < D
    wf = slots(w, b, B1, d)
    wi = slots(w, b, B1, D + d)
    wc = slots(w, b, B1, 2 * D + d)
    zf = tile(x_rows, ok, D, column, BLOCK_D).to(tl.float32)
    zi = tile(x_rows + D, ok, D, column, BLOCK_D).to(tl.float32)
    zc = tile(x_rows + 2 * D, ok, D, column, BLOCK_D).to(tl.float32)
    for k in range(0, D, BLOCK_K):
        h = tile(h_rows, ok, D, k, BLOCK_K).to(tl.float32)
        zf = _split_product(h, tl.trans(tile(wf, d_ok, D, k, BLOCK_K)), zf, PRECISION)
        zi = _split_product(h, tl.trans(tile(wi, d_ok, D, k, BLOCK_K)), zi, PRECISION)
        zc = _split_product(h, tl.trans(tile(wc, d_ok, D, k, BLOCK_K)), zc, PRECISION)
    return zf, zi, zc


@triton.jit(do_not_specialize=("first", "last"))  # one kernel for all launches along the tokens
def cell_scan_kernel(
    x, w, h, out, first, last, streams, T, D, B1, parts, span, h_part,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens ``first .. last`` of BLOCK_T streams, columns ``part * span ..``. h [2, B, streams, D]: h_{t-1} in half
    t % 2."""
    pid = tl.program_id(0)
    part = pid % parts
    pid = pid // parts
    blocks = tl.cdiv(streams, BLOCK_T)
    s = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // blocks
    ok = s < streams
    own = h + (b.to(tl.int64) * streams + s) * D
    for t in tl.range(first, last, num_stages=1):  # never a load of the next token before the stores of this one
        at = s * T + t
        odd = tl.full([], 0, tl.int64) + t % 2
        before = own + odd * h_part
        after = own + (1 - odd) * h_part
        for column in range(part * span, tl.minimum(D, (part + 1) * span), BLOCK_D):
            zf, zi, zc = _scores(
                tokens(x, b, B1, at, T), before, ok, w, b, B1, column, D, BLOCK_D, BLOCK_K, PRECISION
            )  # fmt: skip
            c, _ = tanh_slope(zc)
            state = sigmoid(zf) * tile(before, ok, D, column, BLOCK_D) + sigmoid(zi) * c
            put(after, ok, D, column, state, BLOCK_D)
            put(tokens(out, b, B1, at, T), ok, D, column, state, BLOCK_D)
        tl.debug_barrier()  # the next token reads what other threads stored


@triton.jit
def cell_gates_kernel(
    x, w, before, dz, keep, rows, T, D, B1,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What multiplies g of BLOCK_T tokens of any streams and BLOCK_D columns: dz [B, rows, 3D], keep [B, rows, D]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK_D)
    column = (pid % blocks) * BLOCK_D
    pid = pid // blocks
    t = (pid % tl.cdiv(rows, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // tl.cdiv(rows, BLOCK_T)
    ok = t < rows
    h_rows = tokens(before, b, B1, t, T)
    zf, zi, zc = _scores(tokens(x, b, B1, t, T), h_rows, ok, w, b, B1, column, D, BLOCK_D, BLOCK_K, PRECISION)
    f, i = sigmoid(zf), sigmoid(zi)
    c, slope = tanh_slope(zc)
    h = tile(h_rows, ok, D, column, BLOCK_D).to(tl.float32)
    at = b.to(tl.int64) * rows + t
    put(dz + at * 3 * D, ok, D, column, h * f * sigmoid(-zf), BLOCK_D)
    put(dz + at * 3 * D + D, ok, D, column, c * i * sigmoid(-zi), BLOCK_D)
    put(dz + at * 3 * D + 2 * D, ok, D, column, i * slope, BLOCK_D)
    put(keep + at * D, ok, D, column, f, BLOCK_D)


@triton.jit(do_not_specialize=("first", "last"))
def cell_scan_backward_kernel(
    w, d_out, dz, keep, d_initial, first, last, streams, T, D, B1, parts, span,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens ``T - 1 - first`` down to ``T - last`` of BLOCK_T streams, columns ``part * span ..``; -1 is dh_0."""
    pid = tl.program_id(0)
    part = pid % parts
    pid = pid // parts
    blocks = tl.cdiv(streams, BLOCK_T)
    s = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // blocks
    ok = s < streams
    for back in tl.range(first, last, num_stages=1):
        t = T - 1 - back
        at = (b.to(tl.int64) * streams + s) * T + t
        behind = ok & (t + 1 < T)
        for column in range(part * span, tl.minimum(D, (part + 1) * span), BLOCK_D):
            g = tile(keep + (at + 1) * D, behind, D, column, BLOCK_D)
            for k in range(0, 3 * D, BLOCK_K):
                n = k + tl.arange(0, BLOCK_K)
                left = tile(dz + (at + 1) * 3 * D, behind, 3 * D, k, BLOCK_K)
                g = _split_product(left, tile(slots(w, b, B1, n), n < 3 * D, D, column, BLOCK_D), g, PRECISION)
            if t >= 0:
                g += tile(tokens(d_out, b, B1, s * T + t, T), ok, D, column, BLOCK_D).to(tl.float32)
                for block in tl.static_range(3):
                    factor = tile(dz + at * 3 * D + block * D, ok, D, column, BLOCK_D)
                    put(dz + at * 3 * D + block * D, ok, D, column, g * factor, BLOCK_D)
                put(keep + at * D, ok, D, column, g * tile(keep + at * D, ok, D, column, BLOCK_D), BLOCK_D)
            elif d_initial is not None:
                put(tokens(d_initial, b, B1, s, 1), ok, D, column, g, BLOCK_D)
        tl.debug_barrier()  # the next token reads what other threads stored


def _call(op: str, inputs: Tensor, weight: Tensor, initial: Tensor | None, *more: tuple) -> Call:
    T, D = inputs.shape[-2], weight.shape[-1]
    given = [("inputs", inputs, (T, 3 * D)), ("initial", initial, (D,)), *more]
    call = Call(op, given, [("weight", weight, (3 * D, D))])
    call.floats(inputs, weight, initial)
    return call


def _plan(call: Call, kernel: str, inputs: Tensor, weight: Tensor) -> tuple[Plan, dict]:
    D = weight.shape[-1]
    p = plan(kernel, D, inputs)
    constants = {
        "plan": p, "BLOCK_T": p.config.block_t, "BLOCK_D": p.config.block_n, "BLOCK_K": 2 * p.config.block_n,
        "PRECISION": precision(inputs),
    }  # fmt: skip
    return p, constants


def _steps(call: Call, p: Plan, D: int, steps: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The launches along the tokens: programs, tokens from and to, parts of the columns and their length."""
    blocks = call.B * triton.cdiv(call.F, p.config.block_t)
    if D <= HELD:
        yield blocks, 0, steps, 1, D
        return
    parts = triton.cdiv(D, p.config.block_n)
    for step in range(steps):
        yield blocks * parts, step, step + 1, parts, p.config.block_n


@operator
def cell_scan(inputs: Tensor, weight: Tensor, initial: Tensor | None) -> Tensor:
    """states ``[..., T, D]``."""
    call = _call("cell_scan", inputs, weight, initial)
    T, D = inputs.shape[-2], weight.shape[-1]
    states, view = call.token_result(T, D, dtype=inputs.dtype)
    if states.numel():
        h = call.scratch(2, *call.batches, call.F, 1, D)
        row = initial_row(call, initial)
        if row is None:
            h[0].zero_()
        else:
            h[0].copy_(row[0])
        p, constants = _plan(call, "cell_scan", inputs, weight)
        sources = (call.rows(inputs), call.slots(weight), h, (view, *view.stride()[:4]))
        for programs, first, last, *columns in _steps(call, p, D, T):
            launch(
                cell_scan_kernel, programs, *sources, first, last, call.F, T, D, call.batches[1], *columns,
                h.stride(0), **constants,
            )  # fmt: skip
    return call.store(states, view)


@operator
def cell_scan_backward(
    inputs: Tensor, weight: Tensor, initial: Tensor | None, states: Tensor, d_states: Tensor | None, wants: list[bool]
):
    """Gradients of inputs, weight and initial."""
    T, D = inputs.shape[-2], weight.shape[-1]
    more = [("states", states, (T, D)), ("d_states", d_states, (T, D))]
    call = _call("cell_scan_backward", inputs, weight, initial, *more)
    call.require(len(wants) == 3, "wants must have 3 entries")
    call.require(d_states is not None, "d_states is missing")
    call.floats(states, d_states)
    d_inputs = Gradient(call, inputs, wants[0], "tokens", T, 3 * D)
    d_weight = Gradient(call, weight, wants[1], "memory", 3 * D, D)
    d_initial = InitialGradient(call, initial, wants[2])
    if not states.numel():
        for gradient in (d_weight, d_initial):
            gradient.fill(0.0)
        return d_inputs.result(), d_weight.result(), d_initial.result()
    lead, rows, B1 = call.whole, call.F * T, call.batches[1]
    start = states.new_zeros(D) if initial is None else initial
    before = torch.cat([start.unsqueeze(-2).expand(*lead, 1, D), states.expand(*lead, T, D)[..., :-1, :]], -2)
    dz, keep = call.scratch(*call.batches, call.F, T, 3 * D), call.scratch(call.B, rows, D)
    p, constants = _plan(call, "cell_gates", inputs, weight)
    launch(
        cell_gates_kernel, call.B * triton.cdiv(rows, p.config.block_t) * triton.cdiv(D, p.config.block_n),
        call.rows(inputs), call.slots(weight), call.rows(before), dz, keep, rows, T, D, B1, **constants,
    )  # fmt: skip
    p, constants = _plan(call, "cell_scan", inputs, weight)
    results = (call.rows(d_states), dz, keep, d_initial.rows())
    for programs, first, last, *columns in _steps(call, p, D, T + d_initial.wanted):
        launch(
            cell_scan_backward_kernel, programs, call.slots(weight), *results, first, last, call.F, T, D, B1, *columns,
            **constants,
        )  # fmt: skip
    if d_inputs.wanted:
        d_inputs.view.copy_(dz)
    if d_weight.wanted:  # dW_i = sum_t dz[t, i] h_{t-1}: of scores h_{t-1} W^T, the gradient of their keys
        d_scores = (dz, *dz.stride()[:4])
        score_gradients(call, "given", before, weight, None, 1.0, None, d_weight, None, d_weights=d_scores)
    return d_inputs.result(), d_weight.result(), d_initial.result()


def examples(x: Inputs) -> Iterator[Example]:
    streams, tokens, D = 32, 64, x.width
    yield Example(cell_scan, (x(streams, tokens, 3 * D), x(3 * D, D), x(streams, D)), main=True)
