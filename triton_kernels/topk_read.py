"""topk_read on a GPU: a softmax read over the k best-scoring slots of every token.

    scores, indices = topk_search(query, keys, k),     p = softmax(scores)
    r_t = sum_j p[t, j] values[indices[t, j]]

The kernels of topk_search write weights in place of scores; the gather of sparse_read follows. Backward:
ds = p (dp - sum_j p dp) with dp[t, j] = <dr_t, v_{i[t, j]}> + d_weights[t, j]; one sort serves keys, values and mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Call, Gradient
from .segments import Segments, row_dots
from .sparse_read import check_indices, gather
from .topk_search import choice_gradients, search


def _call(op: str, query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, *more: tuple) -> Call:
    (T, K), (N, V) = query.shape[-2:], values.shape[-2:]
    memory = [("keys", keys, (N, K)), ("values", values, (N, V)), ("slot_mask", slot_mask, (N,))]
    call = Call(op, [("query", query, (T, K)), *more], memory)
    call.floats(query, keys, values)
    call.mask(slot_mask)
    return call


def topk_read(query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, k: int, scale: float):
    """read ``[..., T, V]``, indices ``[..., T, k]``, weights ``[..., T, k]`` in float32."""
    call = _call("topk_read", query, keys, values, slot_mask)
    call.require(k >= 1, "k must be at least 1")
    T, V = query.shape[-2], values.shape[-1]
    read, read_view = call.token_result(T, V, dtype=query.dtype)
    indices, index_view = call.token_result(T, k, dtype=torch.int64)
    weights, weight_view = call.token_result(T, k, dtype=torch.float32)
    search(call, query, keys, slot_mask, k, scale, None, index_view, weight_view)
    indices, weights = call.store(indices, index_view), call.store(weights, weight_view)
    gather(call, values, indices, call.rows(weights), (read_view, *read_view.stride()[:4]), T)
    return call.store(read, read_view), indices, weights


def topk_read_backward(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, indices: Tensor, weights: Tensor,
    d_read: Tensor | None, d_weights: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, values and a float mask."""
    T, (N, V) = query.shape[-2], values.shape[-2:]
    more = [("indices", indices, (T, k)), ("weights", weights, (T, k))]
    more += [("d_read", d_read, (T, V)), ("d_weights", d_weights, (T, k))]
    call = _call("topk_read_backward", query, keys, values, slot_mask, *more)
    call.require(len(wants) == 4, "wants must have 4 entries")
    call.floats(d_read)
    call.stats(weights, d_weights)
    check_indices(call, indices, N)
    shape = (call.B, call.F * T, k)
    p = call.token_view(weights, 1).reshape(shape)
    dp = torch.zeros(shape, device=call.device) if d_read is None else row_dots(call, d_read, values, indices)
    if d_weights is not None:
        dp = dp + call.token_view(d_weights, 1).reshape(shape)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
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
