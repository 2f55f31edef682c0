"""topk_read on a GPU: a softmax read over the k best-scoring slots of every token.

    scores, indices = topk_search(query, keys, k),     p = softmax(scores)
    r_t = sum_j p[t, j] values[indices[t, j]],         lse_t = log sum_j exp(scores[t, j])

The kernels of topk_search write weights and lse in place of scores; the gather of sparse_read follows. Backward:
ds = p (dp - sum_j p dp + d_lse_t) with dp[t, j] = <dr_t, v_{i[t, j]}> + d_weights[t, j]; one sort serves keys, values
and mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .declare import COMPRESSED, FEW, SCALE, Example, Inputs, operator
from .layout import Call, Gradient
from .segments import Segments, chosen_dots
from .sparse_read import check_indices, gather
from .topk_search import LARGEST, choice_gradients, search


def _call(
    op: str, query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    *more: tuple, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    (T, K), (N, V) = query.shape[-2:], values.shape[-2:]
    memory = [("keys", keys, (N, K)), ("values", values, (N, V)), ("slot_mask", slot_mask, (N,))]
    memory += [("key_scale", key_scale, (N,)), ("value_scale", value_scale, (N,))]
    call = Call(op, [("query", query, (T, K)), ("slot_range", slot_range, (T, 2)), *more], memory)
    call.floats(query)
    call.compressed("keys", keys, key_scale)
    call.compressed("values", values, value_scale)
    call.mask(slot_mask)
    call.ranges(slot_range)
    return call


@operator
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
):
    """read ``[..., T, V]``, indices ``[..., T, k]``, weights ``[..., T, k]`` and lse ``[..., T]`` in float32."""
    call = _call("topk_read", query, keys, values, slot_mask, slot_range)
    return _read(call, query, keys, values, slot_mask, slot_range, k, scale)


@operator
def topk_read_compressed(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, k: int, scale: float,
):  # fmt: skip
    """The same over slots of which keys, values or both have 8 bits and a scale."""
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    call = _call("topk_read_compressed", query, keys, values, slot_mask, slot_range, **scales)
    return _read(call, query, keys, values, slot_mask, slot_range, k, scale, **scales)


def _read(
    call: Call, query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    k: int, scale: float, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call.require(k >= 1, "k must be at least 1")
    T, V = query.shape[-2], values.shape[-1]
    read, read_view = call.token_result(T, V, dtype=query.dtype)
    indices, index_view = call.token_result(T, k, dtype=torch.int64)
    weights, weight_view = call.token_result(T, k, dtype=torch.float32)
    lse, lse_view = call.token_result(T, dtype=torch.float32)
    search(
        call, query, keys, slot_mask, k, scale, None, index_view, weight_view, key_scale, slot_range=slot_range,
        lse=lse_view,
    )  # fmt: skip
    indices, weights = call.store(indices, index_view), call.store(weights, weight_view)
    target = (read_view, *read_view.stride()[:4])
    gather(call, values, indices, call.rows(weights), target, T, scales=value_scale)
    return call.store(read, read_view), indices, weights, call.store(lse, lse_view)


@operator
def topk_read_backward(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, indices: Tensor,
    weights: Tensor, d_read: Tensor | None, d_weights: Tensor | None, d_lse: Tensor | None, k: int,
    scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, values and a float mask."""
    N, V = values.shape[-2:]
    more = kept_and_gradients(query, values, indices, weights, d_read, d_weights, d_lse)
    call = _call("topk_read_backward", query, keys, values, slot_mask, slot_range, *more)
    call.require(len(wants) == 4, "wants must have 4 entries")
    p, ds = score_gradient(call, values, None, indices, weights, d_read, d_weights, d_lse)
    d_values = Gradient(call, values, wants[2], "memory", N, V)
    segments = Segments(call, indices, N) if any(wants[1:]) else None
    if d_values.wanted and d_read is not None:
        segments.sum(d_values, p, d_read, 1.0)
    else:
        d_values.fill(0.0)
    choice = choice_gradients(
        call, query, keys, slot_mask, indices, ds, scale, [wants[0], wants[1], wants[3]], segments
    )
    return choice[0], choice[1], d_values.result(), choice[2]


@operator
def topk_read_compressed_backward(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, indices: Tensor, weights: Tensor, d_read: Tensor | None,
    d_weights: Tensor | None, d_lse: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query and a float mask."""
    more = kept_and_gradients(query, values, indices, weights, d_read, d_weights, d_lse)
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    call = _call("topk_read_compressed_backward", query, keys, values, slot_mask, slot_range, *more, **scales)
    call.require(len(wants) == 2, "wants must have 2 entries")
    _, ds = score_gradient(call, values, value_scale, indices, weights, d_read, d_weights, d_lse)
    wants = [wants[0], False, wants[1]]
    d_query, _, d_mask = choice_gradients(
        call, query, keys, slot_mask, indices, ds, scale, wants, key_scale=key_scale
    )  # fmt: skip
    return d_query, d_mask


def kept_and_gradients(
    query: Tensor, values: Tensor, indices: Tensor, weights: Tensor, d_read: Tensor | None, d_weights: Tensor | None,
    d_lse: Tensor | None,
) -> list[tuple]:  # fmt: skip
    """What the backward pass takes beside the arguments, as ``Call`` takes tokens."""
    T, V, k = query.shape[-2], values.shape[-1], indices.shape[-1]
    kept = [("indices", indices, (T, k)), ("weights", weights, (T, k))]
    return [*kept, ("d_read", d_read, (T, V)), ("d_weights", d_weights, (T, k)), ("d_lse", d_lse, (T,))]


def score_gradient(
    call: Call, values: Tensor, value_scale: Tensor | None, indices: Tensor, weights: Tensor, d_read: Tensor | None,
    d_weights: Tensor | None, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """p and ds, ``[B, F * T, k]``."""
    call.floats(d_read)
    call.stats(weights, d_weights, d_lse)
    check_indices(call, indices, values.shape[-2])
    T, k = indices.shape[-2:]
    shape = (call.B, call.F * T, k)
    p = call.token_view(weights, 1).reshape(shape)
    dp = torch.zeros(shape, device=call.device)
    if d_read is not None:
        dp = chosen_dots(call, d_read, values, indices, value_scale)
    if d_weights is not None:
        dp = dp + call.token_view(d_weights, 1).reshape(shape)
    mean = (p * dp).sum(-1, keepdim=True)
    if d_lse is not None:
        mean = mean - call.token_view(d_lse, 0).reshape(*shape[:2], 1)
    return p, p * (dp - mean)


def examples(x: Inputs) -> Iterator[Example]:
    mask = x(2, x.slots, dtype=torch.float32)

    def read(T: int, k: int, **which) -> Example:
        arguments = (x(2, T, x.width), *(x(2, x.slots, x.width) for _ in range(2)), mask, None, k, SCALE)
        return Example(topk_read, arguments, variant=f"k = {k}", **which)

    yield read(x.tokens, 32, main=True)
    yield read(FEW, 8)
    yield read(x.tokens, LARGEST[32], heavy=True)
    yield read(x.tokens, LARGEST[16], heavy=True)
    yield read(FEW, 1000)
    scales = x(2, x.slots, dtype=torch.float32)
    for kind, dtype in COMPRESSED.items():
        k, v = (x.compressed(2, x.slots, x.width, dtype=dtype) for _ in range(2))
        arguments = (x(2, x.tokens, x.width), k, v, mask, None, scales, scales, 32, SCALE)
        yield Example(topk_read_compressed, arguments, variant=kind)
