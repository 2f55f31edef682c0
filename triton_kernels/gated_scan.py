"""gated_scan on a GPU: h_t = f_t h_{t-1} + u_t, channel by channel.

Steps compose, (f, u) then (f', u') is (f f', f' u + u'), so a tile of tokens is one scan of pairs, and many loads are
under way where a walk token by token would have two. A program keeps a block of channels and goes through the tokens
tile by tile. Where such programs are too few for the device, the tokens are cut into parts: a first launch takes what
each part makes of any state, (product of f, state from zero), and in a second each starts from the parts before it,
composed in their order. Bound by bandwidth: every number is read once, twice with parts.

Backward, with g_t = dh_t + f_{t+1} g_{t+1} from the last token to the first: du_t = g_t, df_t = g_t h_{t-1},
dh_0 = f_1 g_1. The same scan in reverse, of (f_{t+1}, dh_t), by the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .declare import FEW, Example, Inputs, operator
from .launch import launch, plan
from .layout import Call, Gradient
from .tiles import batch, put, tile, tokens


@triton.jit
def _compose(f, u, next_f, next_u):
    """Two steps of h -> f h + u as one."""
    return f * next_f, u * next_f + next_u


@triton.jit
def _row(x, i, BLOCK_T: tl.constexpr):
    """Row ``i`` of a tile [tokens, channels]."""
    return tl.sum(tl.where((tl.arange(0, BLOCK_T) == i)[:, None], x, 0.0), 0)


@triton.jit
def gated_scan_kernel(
    f, u, initial, totals, h, out, d_f, d_initial, T, D, B1, parts, span, total_part,
    REVERSE: tl.constexpr, MEASURE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens ``part * span ..`` of one batch and block of channels.

    totals [parts, 2, B, D]: what each part makes of a state; MEASURE writes it and nothing else. REVERSE: u is dh, out
    du, h the states.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK_D)
    column = (pid % blocks) * BLOCK_D
    pid = pid // blocks
    part = pid % parts
    b = pid // parts
    d = column + tl.arange(0, BLOCK_D)
    d_ok = d < D
    state = tl.zeros([BLOCK_D], tl.float32)
    kept = tl.full([BLOCK_D], 1.0, tl.float32)
    start = part * span
    stop = tl.minimum(T, start + span)
    if totals is not None:
        own = totals + b.to(tl.int64) * D + d
    if initial is not None:
        first = tl.load(batch(initial, b, B1) + d, mask=d_ok, other=0.0).to(tl.float32)
    if not MEASURE:
        if not REVERSE and initial is not None:
            state = first
        if totals is not None:
            for i in range((parts - 1 - part) if REVERSE else part):
                place = own + (tl.full([], 0, tl.int64) + ((parts - 1 - i) if REVERSE else i)) * total_part
                whole = tl.load(place, mask=d_ok, other=1.0)
                state = whole * state + tl.load(place + total_part // 2, mask=d_ok, other=0.0)
    tiles = tl.cdiv(stop - start, BLOCK_T)
    for c in range(tiles):
        t = start + ((tiles - 1 - c) if REVERSE else c) * BLOCK_T + tl.arange(0, BLOCK_T)
        ok = t < stop
        inside = ok[:, None] & d_ok[None, :]
        gate_t = (t + 1) if REVERSE else t
        gate_ok = ok & (gate_t < T)
        gate = tile(tokens(f, b, B1, gate_t, None), gate_ok, D, column, BLOCK_D).to(tl.float32)
        gate = tl.where(gate_ok[:, None], gate, 1.0)  # past the end a step changes nothing
        added = tile(tokens(u, b, B1, t, None), ok, D, column, BLOCK_D).to(tl.float32)
        product, local = tl.associative_scan((gate, added), 0, _compose, reverse=REVERSE)
        states = product * state[None, :] + local
        last = 0 if REVERSE else BLOCK_T - 1
        state = _row(states, last, BLOCK_T)
        if MEASURE:
            kept = kept * _row(product, last, BLOCK_T)
        else:
            if out is not None:
                put(tokens(out, b, B1, t, None), ok, D, column, states, BLOCK_D)
            if d_f is not None:
                before = tile(tokens(h, b, B1, t - 1, None), ok & (t > 0), D, column, BLOCK_D).to(tl.float32)
                if initial is not None:
                    before = tl.where((t == 0)[:, None], first[None, :], before)
                place = tokens(d_f, b, B1, t, None)[:, None] + d[None, :]
                tl.store(place, (states * before).to(d_f[0].dtype.element_ty), mask=inside)
    if MEASURE:
        place = own + part.to(tl.int64) * total_part
        tl.store(place, kept, mask=d_ok)
        tl.store(place + total_part // 2, state, mask=d_ok)
    elif d_initial is not None and part == 0:
        gate = tl.load(batch(f, b, B1) + d, mask=d_ok, other=0.0).to(tl.float32)
        tl.store(batch(d_initial, b, B1) + d, (gate * state).to(d_initial[0].dtype.element_ty), mask=d_ok)


def _call(op: str, forget: Tensor, update: Tensor, initial: Tensor | None, *more: tuple) -> Call:
    T, D = forget.shape[-2:]
    call = Call(op, [("forget", forget, (T, D)), ("update", update, (T, D)), ("initial", initial, (D,)), *more], [])
    call.floats(forget, update, initial)
    return call


def _scan(
    call: Call, f: Tensor, u: Tensor, initial: Tensor | None, out: tuple | None, reverse: bool,
    h: tuple | None = None, d_f: tuple | None = None, d_initial: tuple | None = None,
) -> None:  # fmt: skip
    T, D = f.shape[-2:]
    p = plan("gated_scan", D, f, u)
    c, B1 = p.config, call.batches[1]
    programs = call.B * triton.cdiv(D, c.block_n)
    parts, span = p.cut(programs, T, c.block_t, sums=False)
    totals = call.scratch(parts, 2, call.B, D) if parts > 1 else None
    between = 0 if totals is None else totals.stride(0)
    sources = (call.rows(f), call.rows(u), initial_row(call, initial), totals)
    sizes = (T, D, B1, parts, span, between)
    constants = {"plan": p, "REVERSE": reverse, "BLOCK_T": c.block_t, "BLOCK_D": c.block_n}
    if totals is not None:
        launch(gated_scan_kernel, programs * parts, *sources, *[None] * 4, *sizes, MEASURE=True, **constants)
    launch(gated_scan_kernel, programs * parts, *sources, h, out, d_f, d_initial, *sizes, MEASURE=False, **constants)


def initial_row(call: Call, initial: Tensor | None) -> tuple | None:
    """``initial [..., D]`` as rows of one token each."""
    return None if initial is None else call.rows(initial.unsqueeze(-2))


class InitialGradient(Gradient):
    """The gradient of ``initial [..., D]``, written as rows of one token each."""

    def __init__(self, call: Call, initial: Tensor | None, wanted: bool) -> None:
        rows = None if initial is None else initial.unsqueeze(-2)
        super().__init__(call, rows, wanted, "tokens", 1, 1 if initial is None else initial.shape[-1])

    def result(self) -> Tensor:
        return super().result().squeeze(-2) if self.wanted else super().result()


@operator
def gated_scan(forget: Tensor, update: Tensor, initial: Tensor | None) -> Tensor:
    """states ``[..., T, D]`` in the dtype of ``update``."""
    call = _call("gated_scan", forget, update, initial)
    states, view = call.token_result(*forget.shape[-2:], dtype=update.dtype)
    if states.numel():
        _scan(call, forget, update, initial, (view, *view.stride()[:4]), False)
    return call.store(states, view)


@operator
def gated_scan_backward(
    forget: Tensor, update: Tensor, initial: Tensor | None, states: Tensor, d_states: Tensor | None, wants: list[bool]
):
    """Gradients of forget, update and initial."""
    T, D = forget.shape[-2:]
    more = [("states", states, (T, D)), ("d_states", d_states, (T, D))]
    call = _call("gated_scan_backward", forget, update, initial, *more)
    call.require(len(wants) == 3, "wants must have 3 entries")
    call.require(d_states is not None, "d_states is missing")
    call.floats(states, d_states)
    d_forget = Gradient(call, forget, wants[0], "tokens", T, D)
    d_update = Gradient(call, update, wants[1], "tokens", T, D)
    d_initial = InitialGradient(call, initial, wants[2])
    if states.numel() and any(g.wanted for g in (d_forget, d_update, d_initial)):
        results = (d_update.rows(), True, call.rows(states), d_forget.rows(), d_initial.rows())
        _scan(call, forget, d_states, initial, *results)
    else:
        d_initial.fill(0.0)
    return d_forget.result(), d_update.result(), d_initial.result()


def examples(x: Inputs) -> Iterator[Example]:
    def scan(T: int, **which) -> Example:
        return Example(gated_scan, (x(2, T, x.width), x(2, T, x.width), x(2, x.width)), **which)

    yield scan(x.tokens, main=True)
    yield scan(FEW, variant="few tokens")
