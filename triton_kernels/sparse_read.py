"""sparse_read on a GPU: r_t = sum_j weights[t, j] values[indices[t, j]].

A program takes a few tokens and a block of columns, and goes through their neighbours in order, several rows in flight
at a time: bound by the bandwidth of the gather. Backward: the gradient of a weight is a dot product with the row that
was read, the gradient of the values a sum over entries sorted by slot; both in segments.py.

An index outside [-1, N) fails an assertion on the device, without a synchronisation, and is never followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import COMPRESSED, Example, Inputs, operator
from .launch import launch, plan, width
from .layout import Call, Gradient
from .segments import Segments, chosen_dots
from .tiles import batch, decoded, put, tile, tokens


@triton.jit
def sparse_read_kernel(
    values, indices, weights, scales, read, T, N, V, k, B1, inner, scale,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    t_ok = t < T
    index_rows, weight_rows = tokens(indices, b, B1, t, inner), tokens(weights, b, B1, t, inner)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for j0 in range(0, k, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        inside = t_ok[:, None] & (j < k)[None, :]
        slot = tl.load(index_rows[:, None] + j[None, :], mask=inside, other=-1)
        ok = (slot >= 0) & (slot < N)
        w = tl.load(weight_rows[:, None] + j[None, :], mask=ok, other=0.0).to(tl.float32)
        if scales is not None:
            w *= tl.load(batch(scales, b, B1) + tl.where(ok, slot, 0) * scales[3], mask=ok, other=0.0)
        rows = tl.reshape(batch(values, b, B1) + tl.where(ok, slot, 0) * values[3], [BLOCK_T * BLOCK_J])
        picked = decoded(tile(rows, tl.reshape(ok, [BLOCK_T * BLOCK_J]), V, column, BLOCK_V), tl.float32)
        acc += tl.sum(tl.reshape(picked, [BLOCK_T, BLOCK_J, BLOCK_V]) * w[:, :, None], 1)
    put(tokens(read, b, B1, t, inner), t_ok, V, column, acc * scale, BLOCK_V)


def gather(
    call: Call, values: Tensor, indices: Tensor, weights: tuple, read: tuple, T: int, scale: float = 1.0,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """``read_t = scale * sum_j weights[t, j] values[indices[t, j]]`` for weights and read as kernels take them.

    scales: what multiplies the rows of compressed values.
    """
    k, (N, V), count = indices.shape[-1], values.shape[-2:], call.F * T
    p, wide = plan("sparse_read", V, values), width(V, values)
    launch(
        sparse_read_kernel, call.B * triton.cdiv(count, p.config.block_t) * wide.steps,
        call.slots(values), call.rows(indices), weights, call.slot_numbers(scales), read,
        count, N, V, k, call.batches[1], T if call.F > 1 else None, scale, plan=p, BLOCK_T=p.config.block_t,
        BLOCK_J=p.config.block_n, BLOCK_V=wide.block,
    )  # fmt: skip


def check_indices(call: Call, indices: Tensor, slots: int) -> None:
    """Fail on the device where an index is outside [-1, slots)."""
    call.require(indices.dtype == torch.int64, "indices must be int64")
    if indices.numel():
        known = ((indices >= -1) & (indices < slots)).all()
        call.require_on_device(known, f"an index is outside [-1, {slots})")


def _call(
    op: str, values: Tensor, indices: Tensor, weights: Tensor, *more: tuple, value_scale: Tensor | None = None
) -> Call:
    (T, k), (N, V) = indices.shape[-2:], values.shape[-2:]
    token_side = [("indices", indices, (T, k)), ("weights", weights, (T, k)), *more]
    call = Call(op, token_side, [("values", values, (N, V)), ("value_scale", value_scale, (N,))])
    call.floats(weights)
    call.compressed("values", values, value_scale)
    check_indices(call, indices, N)
    return call


@operator
def sparse_read(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """read ``[..., T, V]`` in the dtype of weights."""
    return _read(_call("sparse_read", values, indices, weights), values, indices, weights)


@operator
def sparse_read_compressed(
    values: Tensor, indices: Tensor, weights: Tensor, value_scale: Tensor | None
) -> Tensor:  # fmt: skip
    """The same of values in 8 bits."""
    call = _call("sparse_read_compressed", values, indices, weights, value_scale=value_scale)
    return _read(call, values, indices, weights, value_scale)


def _read(call: Call, values: Tensor, indices: Tensor, weights: Tensor, value_scale: Tensor | None = None) -> Tensor:
    T, V = indices.shape[-2], values.shape[-1]
    read, view = call.token_result(T, V, dtype=weights.dtype)
    gather(call, values, indices, call.rows(weights), (view, *view.stride()[:4]), T, scales=value_scale)
    return call.store(read, view)


@operator
def sparse_read_backward(
    values: Tensor, indices: Tensor, weights: Tensor, d_read: Tensor | None, wants: list[bool]
):  # fmt: skip
    """Gradients of values and weights."""
    (T, k), (N, V) = indices.shape[-2:], values.shape[-2:]
    call = _call("sparse_read_backward", values, indices, weights, ("d_read", d_read, (T, V)))
    call.require(len(wants) == 2, "wants must have 2 entries")
    call.require(d_read is not None, "d_read must be given")
    call.floats(d_read)
    d_values = Gradient(call, values, wants[0], "memory", N, V)
    d_weights = Gradient(call, weights, wants[1], "tokens", T, k)
    if d_values.wanted:
        Segments(call, indices, N).sum(d_values, call.token_view(weights, 1), d_read, 1.0)
    if d_weights.wanted:
        d_weights.view.copy_(chosen_dots(call, d_read, values, indices).view(d_weights.view.shape))
    return d_values.result(), d_weights.result()


@operator
def sparse_read_compressed_backward(
    values: Tensor, indices: Tensor, weights: Tensor, value_scale: Tensor | None, d_read: Tensor | None,
    wants: list[bool],
) -> Tensor:  # fmt: skip
    """The gradient of weights."""
    (T, k), V = indices.shape[-2:], values.shape[-1]
    more = ("d_read", d_read, (T, V))
    call = _call("sparse_read_compressed_backward", values, indices, weights, more, value_scale=value_scale)
    call.require(len(wants) == 1, "wants must have 1 entry")
    call.require(d_read is not None, "d_read must be given")
    call.floats(d_read)
    d_weights = Gradient(call, weights, wants[0], "tokens", T, k)
    if d_weights.wanted:
        d_weights.view.copy_(chosen_dots(call, d_read, values, indices, value_scale).view(d_weights.view.shape))
    return d_weights.result()


def examples(x: Inputs) -> Iterator[Example]:
    i, w = x.integers(2, x.tokens, 32, below=x.slots), x(2, x.tokens, 32)
    yield Example(sparse_read, (x(2, x.slots, x.width), i, w), main=True)
    for kind, dtype in COMPRESSED.items():
        arguments = (x.compressed(2, x.slots, x.width, dtype=dtype), i, w, x(2, x.slots, dtype=torch.float32))
        yield Example(sparse_read_compressed, arguments, variant=kind)
