"""merge_reads on a GPU: reads of S disjoint memories become the read of their union.

    lse_t = log sum_s exp(lse[s, t]),     w[s, t] = softmax_s(lse[s, t]),     r_t = sum_s w[s, t] r[s, t]
    d_r[s, t] = w[s, t] dr_t,     d_lse[s, t] = w[s, t] (x[s, t] - sum_u w[u, t] x[u, t] + d_lse_t)

with x[s, t] = <dr_t, r[s, t]>.

A program takes a block of tokens and a block of columns and goes through the parts in their order. Every read is loaded
once and every result stored once: bound by bandwidth. A part of weight 0 is not looked at. The weights come from the
largest lse and the sum, never from the rounded lse_t. The parts of a read that was split bring what the rounding of
their own lse left out (rests), and so does the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import Example, Inputs, operator
from .launch import Plan, launch, plan, width
from .layout import Call, Gradient, unit_last
from .tiles import LOG2E, log_total, put, tile, tokens


@triton.jit
def part_share(lses, rests, offset, base, t_ok):
    """exp(lse - base) of the part ``offset`` numbers on; rests: None, or what the rounding of each lse left out."""
    x = tl.load(lses + offset, mask=t_ok, other=float("-inf")) - base
    if rests is not None:
        x += tl.load(rests + offset, mask=t_ok, other=0.0)
    return tl.exp2(x * LOG2E)


@triton.jit
def merged_lse(lses, rests, parts, part, t_ok):
    """The largest lse, the sum of the parts' shares against it; and what ``part_share`` takes, and its inverse sum."""
    m = tl.full(t_ok.shape, float("-inf"), tl.float32)
    zero = tl.full([], 0, tl.int64)  # offsets of parts are 64-bit
    for s in range(parts):
        m = tl.maximum(m, tl.load(lses + (zero + s) * part, mask=t_ok, other=0.0))
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros(t_ok.shape, tl.float32)
    for s in range(parts):
        total += part_share(lses, rests, (zero + s) * part, base, t_ok)
    return m, total, base, 1.0 / tl.where(total == 0, 1.0, total)


@triton.jit
def merge_kernel(
    reads, lses, rests, read, lse, rest, T, V, B1, inner, parts, read_part, lse_part,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    t_ok = t < T
    lse_rows = tokens(lses, b, B1, t, inner)
    read_rows = tokens(reads, b, B1, t, inner)
    rest_rows = rests
    if rests is not None:
        rest_rows = tokens(rests, b, B1, t, inner)
    m, total, base, inverse = merged_lse(lse_rows, rest_rows, parts, lse_part, t_ok)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for s in range(parts):
        offset = tl.full([], 0, tl.int64) + s
        w = part_share(lse_rows, rest_rows, offset * lse_part, base, t_ok) * inverse
        acc += w[:, None] * tile(read_rows + offset * read_part, t_ok & (w != 0), V, column, BLOCK_V).to(tl.float32)
    put(tokens(read, b, B1, t, inner), t_ok, V, column, acc, BLOCK_V)
    if column == 0:
        merged, merged_rest = log_total(m, total)
        tl.store(tokens(lse, b, B1, t, inner), merged, mask=t_ok)
        if rest is not None:
            tl.store(tokens(rest, b, B1, t, inner), merged_rest, mask=t_ok)


@triton.jit
def merge_backward_kernel(
    reads, lses, d_read, d_lse, d_reads, d_lses, T, V, B1, parts, read_part, lse_part, d_read_part, d_lse_part,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, V_STEPS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // blocks
    t_ok = t < T
    lse_rows = tokens(lses, b, B1, t, None)
    read_rows = tokens(reads, b, B1, t, None)
    _m, _total, base, inverse = merged_lse(lse_rows, None, parts, lse_part, t_ok)
    mean = tl.zeros([BLOCK_T], tl.float32)
    more = tl.zeros([BLOCK_T], tl.float32)
    if d_lse is not None:
        more += tl.load(tokens(d_lse, b, B1, t, None), mask=t_ok, other=0.0)
    # Twice over the parts where d_lses is wanted: its mean over the parts comes first.
    for sweep in tl.static_range(2):
        for s in range(parts):
            offset = tl.full([], 0, tl.int64) + s
            w = part_share(lse_rows, None, offset * lse_part, base, t_ok) * inverse
            live = t_ok & (w != 0)
            x = tl.zeros([BLOCK_T], tl.float32)
            for step in range(V_STEPS):
                column = step * BLOCK_V
                if d_read is not None:
                    dr = tile(tokens(d_read, b, B1, t, None), t_ok, V, column, BLOCK_V).to(tl.float32)
                    if d_lses is not None:
                        r = tile(read_rows + offset * read_part, live, V, column, BLOCK_V).to(tl.float32)
                        x += tl.sum(tl.where(live[:, None], dr * r, 0.0), 1)
                else:
                    dr = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
                if sweep == 1 and d_reads is not None:
                    out = tokens(d_reads, b, B1, t, None) + offset * d_read_part
                    put(out, t_ok, V, column, tl.where(live[:, None], w[:, None] * dr, 0.0), BLOCK_V)
            if sweep == 0:
                mean += tl.where(live, w * x, 0.0)
            elif d_lses is not None:
                d = tl.where(live, w * (x - mean + more), 0.0)
                tl.store(tokens(d_lses, b, B1, t, None) + offset * d_lse_part, d, mask=t_ok)


def _blocks(V: int, *tensors: Tensor) -> tuple[Plan, int, int]:
    """Plan, and tokens and columns of a block."""
    p = plan("merge_reads", V, *tensors)
    return p, p.config.block_t, width(V, *tensors).block


def merge_parts(
    call: Call, reads: Tensor, lses: Tensor, rests: Tensor, read: Tensor, lse: Tensor, rest: Tensor, T: int, V: int
) -> None:
    """Merge float32 parts ``[S, B0, B1, F, T, V]`` and ``[S, B0, B1, F, T]`` of a split read into its results."""
    p, block_t, block_v = _blocks(V, reads)
    count = call.F * T
    launch(
        merge_kernel, call.B * triton.cdiv(count, block_t) * max(1, triton.cdiv(V, block_v)),
        (reads, *reads.stride()[1:5]), (lses, *lses.stride()[1:]), (rests, *rests.stride()[1:]),
        (read, *read.stride()[:4]), (lse, *lse.stride()), (rest, *rest.stride()),
        count, V, call.batches[1], T if call.F > 1 else None, reads.shape[0], reads.stride(0), lses.stride(0),
        plan=p, BLOCK_T=block_t, BLOCK_V=block_v,
    )  # fmt: skip


def _parts(call: Call, x: Tensor, tail: int) -> tuple[tuple, int]:
    """Part tensors ``[..., S, T, (V)]`` as the token tensor of part 0, and the stride of a part."""
    view = call.token_view(unit_last(x) if tail == 2 else x, tail)
    strides = view.stride()
    return (view, *strides[:3], strides[4]), strides[3]


def _call(op: str, reads: Tensor, lses: Tensor, *more: tuple) -> tuple[Call, int, int, int]:
    S, T, V = reads.shape[-3:]
    call = Call(op, [("reads", reads, (S, T, V)), ("lses", lses, (S, T)), *more], [])
    call.floats(reads)
    call.stats(lses)
    return call, S, T, V


@operator
def merge_reads(reads: Tensor, lses: Tensor):
    """read ``[..., T, V]``, lse ``[..., T]`` of reads ``[..., S, T, V]`` and lses ``[..., S, T]``."""
    call, S, T, V = _call("merge_reads", reads, lses)
    read, read_view = call.token_result(T, V, dtype=reads.dtype)
    lse, lse_view = call.token_result(T, dtype=torch.float32)
    p, block_t, block_v = _blocks(V, reads)
    (all_reads, read_part), (all_lses, lse_part) = _parts(call, reads, 2), _parts(call, lses, 1)
    launch(
        merge_kernel, call.B * triton.cdiv(T, block_t) * max(1, triton.cdiv(V, block_v)),
        all_reads, all_lses, None, (read_view, *read_view.stride()[:4]), (lse_view, *lse_view.stride()), None,
        T, V, call.batches[1], None, S, read_part, lse_part, plan=p, BLOCK_T=block_t, BLOCK_V=block_v,
    )  # fmt: skip
    return call.store(read, read_view), call.store(lse, lse_view)


@operator
def merge_reads_backward(
    reads: Tensor, lses: Tensor, d_read: Tensor | None, d_lse: Tensor | None, wants: list[bool]
):  # fmt: skip
    """Gradients of reads and lses."""
    T, V = reads.shape[-2:]
    more = [("d_read", d_read, (T, V)), ("d_lse", d_lse, (T,))]
    call, S, T, V = _call("merge_reads_backward", reads, lses, *more)
    call.require(len(wants) == 2, "wants must have 2 entries")
    call.floats(d_read)
    call.stats(d_lse)
    d_reads = Gradient(call, reads, wants[0], "tokens", S, T, V)
    d_lses = Gradient(call, lses, wants[1], "tokens", S, T)
    p, block_t, block_v = _blocks(V, reads)
    (all_reads, read_part), (all_lses, lse_part) = _parts(call, reads, 2), _parts(call, lses, 1)
    outs, out_parts = [], []
    for gradient in (d_reads, d_lses):
        strides = gradient.view.stride() if gradient.wanted else (0,) * 5
        outs.append((gradient.view, *strides[:3], strides[4]) if gradient.wanted else None)
        out_parts.append(strides[3])
    if any(wants):
        launch(
            merge_backward_kernel, call.B * triton.cdiv(T, block_t),
            all_reads, all_lses, call.rows(d_read), call.numbers(d_lse), *outs,
            T, V, call.batches[1], S, read_part, lse_part, *out_parts,
            plan=p, BLOCK_T=block_t, BLOCK_V=block_v, V_STEPS=triton.cdiv(V, block_v),
        )  # fmt: skip
    return d_reads.result(), d_lses.result()


def examples(x: Inputs) -> Iterator[Example]:
    yield Example(merge_reads, (x(2, 3, x.tokens, x.width), x(2, 3, x.tokens, dtype=torch.float32)), main=True)
