"""Dense writes on a GPU, forward, for an erase that is one number e: gated_write, softmax_write and slot_write.

    f = 1 - e a[t, i],     R[t, i] = prod_{u > t} f[u, i]
    v_i <- R[0] v_i + sum_t a[t, i] R[t, i] w_t,      retained_i = prod_t (1 - a[t, i])

No gate depends on what the memory holds, so each slot evolves alone, and T updates in a row are one matrix product
whose weights a R are made on the fly. A program keeps a block of slots and a block of value columns and goes through
chunks of tokens from the last to the first, with R per slot: nothing is divided, and no gate in [0, 1] gives a factor
above 1. Inside a chunk R is a scan of products along the tokens. Where slots are few, the tokens are cut into parts;
each gives its own sum and product, which `write_merge_kernel` joins from the last to the first.

Bound by the matrix unit: 2 T N (K + V) operations, 2 T N V where gates are given. An erase tensor goes to
write_scan.py, backward to write_backward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import write_backward, write_scan
from .declare import SCALE, Example, Inputs
from .launch import launch, plan, summed, width
from .layout import precision
from .tiles import open_slots, product, put, slot_block, slots, tile, tokens
from .write_tiles import Write, gates, multiply, open_tokens, suffix_products


class Cut(NamedTuple):
    """Of the tokens: the count and the length of parts, and the steps between those of results."""

    parts: int
    span: int
    out_part: int
    retained_part: int


@triton.jit
def write_kernel(
    v, source, out, retained, erase, sizes, cut, scale,
    GATE: tl.constexpr, ERASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of slots and value columns over the tokens ``part * span ..`` of one batch."""
    T, N, K, V, B1, inner = sizes
    parts, span, out_part, retained_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    pid = pid // tl.cdiv(V, BLOCK_V)
    part = pid % parts
    b = pid // parts
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    after = tl.full([BLOCK_N], 1.0, tl.float32)  # R behind the chunk
    kept = tl.full([BLOCK_N], 1.0, tl.float32)  # prod (1 - a)
    start = part * span
    stop = tl.minimum(T, start + span)
    chunks = tl.cdiv(stop - start, BLOCK_T)
    for c in range(chunks):
        t = start + (chunks - 1 - c) * BLOCK_T + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(source.token_mask, b, B1, t, inner, stop)
        a, keep, f = gates(
            k0, k_rows, ok, bias, source.q, source.norm, b, n, t, t_ok, sizes, scale, erase,
            GATE, ERASE, BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        weights = a
        if ERASE != "none":
            behind, total = suffix_products(f)
            weights = a * behind * after[:, None]
            after = after * total
        if ERASE != "full":
            kept = kept * tl.reduce(keep, 1, multiply)
        w0 = tile(tokens(source.w, b, B1, t, inner), t_ok, V, column, BLOCK_V)
        acc = product(weights.to(w0.dtype), w0, acc, PRECISION)
    if ERASE == "full":
        kept = after
    exists = n < N
    if v is not None:
        old = tile(slots(v, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
        acc += after[:, None] * old
    put(slots(out, b, B1, n) + part.to(tl.int64) * out_part, exists, V, column, acc, BLOCK_V)
    if retained is not None and column == 0:
        rows = slots(retained, b, B1, n) + part.to(tl.int64) * retained_part
        tl.store(rows, kept, mask=exists)
        if v is None:  # a part stores its R too, behind the products that it retains
            tl.store(rows + retained_part // 2, after, mask=exists)


@triton.jit
def write_merge_kernel(
    v, sums, products, out, retained, N, V, B1, parts, sum_part, product_part,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Join the parts of a write, the last first."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    exists = n < N
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    after = tl.full([BLOCK_N], 1.0, tl.float32)
    kept = tl.full([BLOCK_N], 1.0, tl.float32)
    sum_rows, product_rows = slots(sums, b, B1, n), slots(products, b, B1, n)
    for c in range(parts):
        offset = tl.full([], 0, tl.int64) + (parts - 1 - c)
        acc += after[:, None] * tile(sum_rows + offset * sum_part, exists, V, column, BLOCK_V)
        kept = kept * tl.load(product_rows + offset * product_part, mask=exists, other=1.0)
        after = after * tl.load(product_rows + offset * product_part + product_part // 2, mask=exists, other=1.0)
    acc += after[:, None] * tile(slots(v, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
    put(slots(out, b, B1, n), exists, V, column, acc, BLOCK_V)
    if retained is not None and column == 0:
        tl.store(slots(retained, b, B1, n), kept, mask=exists)


def _write(x: Write, values: Tensor, out: tuple, retained: tuple | None) -> None:
    """Fill ``out`` and ``retained`` (memory tensors of kernels); ``out`` may be ``values``."""
    call, N, K, V = x.call, x.N, x.K, x.V
    tensors = (x.query, values)
    wide_k, wide_v = summed(K, *tensors), width(V, *tensors)
    p = plan("write", max(K, V), *tensors)
    c, columns = p.config, triton.cdiv(V, wide_v.block)
    programs = call.B * triton.cdiv(N, c.block_n) * columns
    parts, span = p.cut(programs, x.count, c.block_t)
    v = call.slots(values)
    first, first_out, first_retained, between = v, out, retained, (0, 0)
    if parts > 1:
        sums, products = call.scratch(parts, call.B, N, V), call.scratch(parts, 2, call.B, N)
        first, between = None, (sums.stride(0), products.stride(0))
        first_out = (sums, call.batches[1] * N * V, N * V, V)
        first_retained = (products, call.batches[1] * N, N, 1)
    launch(
        write_kernel, programs * parts, first, x.source(), first_out, first_retained, x.erase_scale,
        x.sizes, Cut(parts, span, *between), x.scale,
        plan=p, GATE=x.gate, ERASE=x.erasing,
        BLOCK_T=c.block_t, BLOCK_N=c.block_n, BLOCK_K=wide_k.block, K_STEPS=wide_k.several,
        BLOCK_V=wide_v.block, PRECISION=precision(*tensors),
    )  # fmt: skip
    if parts > 1:
        p = plan("write_merge", V, *tensors)
        launch(
            write_merge_kernel, call.B * triton.cdiv(N, p.config.block_n) * columns,
            v, first_out, first_retained, out, retained, N, V, call.batches[1], parts, *between,
            plan=p, BLOCK_N=p.config.block_n, BLOCK_V=wide_v.block,
        )  # fmt: skip


def _numbers(x: Write, retains: bool) -> tuple[Tensor | None, tuple | None]:
    """``retained`` ``[..., N]`` and as kernels take it, where the op has such a result."""
    retained = x.call.memory_result(x.N, dtype=torch.float32) if retains else None
    return retained, None if retained is None else x.memory_numbers(retained)


def _run(x: Write, values: Tensor, out: tuple, retained: tuple | None) -> None:
    (_write if x.erase is None else write_scan.forward)(x, values, out, retained)


def forward(x: Write, values: Tensor, retains: bool = True) -> tuple[Tensor, Tensor | None]:
    """New values ``[..., N, V]``, and retained ``[..., N]`` (float32) where the op ``retains`` it."""
    out = x.call.memory_result(x.N, x.V, dtype=values.dtype)
    retained, numbers = _numbers(x, retains)
    _run(x, values, x.memory_rows(out), numbers)
    return out, retained


def in_place(x: Write, values: Tensor, retains: bool = True) -> Tensor | None:
    """The same into ``values``; returns retained. A program reads what it overwrites, and nothing else does."""
    retained, numbers = _numbers(x, retains)
    with x.call.target(values) as target:
        _run(x, target, x.call.slots(target), numbers)
    return retained


def backward(
    x: Write, values: Tensor, d_values: Tensor | None, d_retained: Tensor | None, wants: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of values, keys, query (or the gates that are given), write, erase and a float mask."""
    shape = (*x.call.memory, x.N)
    x.call.require(d_values is None or tuple(d_values.shape) == (*shape, x.V), "d_values must have the shape of values")
    x.call.require(d_retained is None or tuple(d_retained.shape) == shape, "d_retained must have the shape of retained")
    x.call.floats(d_values)
    x.call.stats(d_retained)
    if d_values is None:
        d_values = values.new_zeros(x.V).expand(*shape, x.V)
    return (write_backward if x.erase is None else write_scan).backward(x, values, d_values, d_retained, wants)


def example(
    launcher: Callable, x: Inputs, T: int, N: int, erase: float | Tensor = 1.0, retained: bool = False, **which
) -> Example:
    """A call of a write by scores; ``retained``: whether that has a gradient too."""
    vector, number = (erase, 1.0) if isinstance(erase, Tensor) else (None, erase)
    v, k, q, w = (x(2, n, x.width) for n in (N, N, T, T))
    arguments = (v, k, q, w, vector, None, None, SCALE, number)
    return Example(launcher, arguments, gradients=None if retained else ("values",), **which)
