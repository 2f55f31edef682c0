"""product_key_read on a GPU: a softmax read over the k best of n * n slots, whose keys are pairs of two lists.

    scores, indices = product_key_search(query, subkeys, k),     p = softmax(scores)
    r_t = sum_j p[t, j] values[indices[t, j]],               lse_t = log sum_j exp(scores[t, j])

The kernels of product_key_search write weights and lse in place of scores; the gather of sparse_read follows.
Backward: the gradients of the scores are those of topk_read, and go to one row of each half; one sort by slot serves
the values, one by rows of the halves the subkeys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .declare import COMPRESSED, SCALE, Example, Inputs, operator
from .layout import Call, Gradient
from .product_key_search import KEPT, calls, pair_gradients, search_pairs
from .segments import Segments
from .sparse_read import gather
from .topk_read import kept_and_gradients, score_gradient


def _calls(
    op: str, query: Tensor, subkeys: Tensor, values: Tensor, value_scale: Tensor | None, *more: tuple
) -> tuple[Call, Call]:
    call, inner = calls(op, query, subkeys, *more, values=values, value_scale=value_scale)
    call.compressed("values", values, value_scale)
    return call, inner


@operator
def product_key_read(query: Tensor, subkeys: Tensor, values: Tensor, k: int, scale: float):
    """read ``[..., T, V]``, indices ``[..., T, k]``, weights ``[..., T, k]`` and lse ``[..., T]`` in float32."""
    return _read("product_key_read", query, subkeys, values, None, k, scale)


@operator
def product_key_read_compressed(
    query: Tensor, subkeys: Tensor, values: Tensor, value_scale: Tensor | None, k: int, scale: float
):
    """The same over values in 8 bits."""
    return _read("product_key_read_compressed", query, subkeys, values, value_scale, k, scale)


def _read(
    op: str, query: Tensor, subkeys: Tensor, values: Tensor, value_scale: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, inner = _calls(op, query, subkeys, values, value_scale)
    call.require(k >= 1, "k must be at least 1")
    T, V = query.shape[-2], values.shape[-1]
    indices = torch.empty((*call.whole, T, k), dtype=torch.int64, device=call.device)
    weights = torch.empty((*call.whole, T, k), dtype=torch.float32, device=call.device)
    lse = torch.empty((*call.whole, T), dtype=torch.float32, device=call.device)
    search_pairs(inner, query, subkeys, k, scale, None, indices, weights, lse)
    read, view = call.token_result(T, V, dtype=query.dtype)
    gather(call, values, indices, call.rows(weights), (view, *view.stride()[:4]), T, scales=value_scale)
    return call.store(read, view), indices, weights, lse


@operator
def product_key_read_backward(
    query: Tensor, subkeys: Tensor, values: Tensor, indices: Tensor, weights: Tensor, d_read: Tensor | None,
    d_weights: Tensor | None, d_lse: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, subkeys and values."""
    more = kept_and_gradients(query, values, indices, weights, d_read, d_weights, d_lse)
    call, inner = _calls("product_key_read_backward", query, subkeys, values, None, *more)
    call.require(len(wants) == 3, "wants must have 3 entries")
    p, ds = score_gradient(call, values, None, indices, weights, d_read, d_weights, d_lse)
    N, V = values.shape[-2:]
    d_values = Gradient(call, values, wants[2], "memory", N, V)
    if d_values.wanted and d_read is not None:
        Segments(call, indices, N).sum(d_values, p, d_read, 1.0)
    else:
        d_values.fill(0.0)
    return *pair_gradients(inner, query, subkeys, indices, ds, scale, wants[:2]), d_values.result()


@operator
def product_key_read_compressed_backward(
    query: Tensor, subkeys: Tensor, values: Tensor, value_scale: Tensor | None, indices: Tensor, weights: Tensor,
    d_read: Tensor | None, d_weights: Tensor | None, d_lse: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query and subkeys."""
    more = kept_and_gradients(query, values, indices, weights, d_read, d_weights, d_lse)
    call, inner = _calls("product_key_read_compressed_backward", query, subkeys, values, value_scale, *more)
    call.require(len(wants) == 2, "wants must have 2 entries")
    _, ds = score_gradient(call, values, value_scale, indices, weights, d_read, d_weights, d_lse)
    return pair_gradients(inner, query, subkeys, indices, ds, scale, wants)


def examples(x: Inputs) -> Iterator[Example]:
    q, subkeys, v = x(2, x.tokens, 2 * x.width), x(2, 512, x.width), x(512 * 512, x.width)
    yield Example(product_key_read, (q, subkeys, v, 32, SCALE), variant="k = 32", main=True)
    for k in (KEPT, 300):  # the most that a list on the chip holds, and more
        yield Example(product_key_read, (q, subkeys, v, k, SCALE), variant=f"k = {k}")
    scales = x(512 * 512, dtype=torch.float32)
    for kind, dtype in COMPRESSED.items():
        arguments = (q, subkeys, x.compressed(512 * 512, x.width, dtype=dtype), scales, 32, SCALE)
        yield Example(product_key_read_compressed, arguments, variant=kind)
