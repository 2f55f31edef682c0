"""product_key_read on a GPU: a softmax read over the k best of n * n slots, whose keys are pairs of two lists.

    scores, indices = product_key_search(query, subkeys, k),     p = softmax(scores)
    r_t = sum_j p[t, j] values[indices[t, j]]

The kernels of product_key_search write weights in place of scores; the gather of sparse_read follows. Backward: the
gradients of the scores are those of topk_read, and go to one row of each half; one sort by slot serves the values, one
by rows of the halves the subkeys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .declare import SCALE, Example, Inputs, operator
from .layout import Gradient
from .product_key_search import KEPT, calls, pair_gradients, search_pairs
from .segments import Segments
from .sparse_read import gather
from .topk_read import score_gradient


@operator
def product_key_read(query: Tensor, subkeys: Tensor, values: Tensor, k: int, scale: float):
    """read ``[..., T, V]``, indices ``[..., T, k]``, weights ``[..., T, k]`` in float32."""
    call, inner = calls("product_key_read", query, subkeys, values=values)
    call.require(k >= 1, "k must be at least 1")
    T, V = query.shape[-2], values.shape[-1]
    indices = torch.empty((*call.whole, T, k), dtype=torch.int64, device=call.device)
    weights = torch.empty((*call.whole, T, k), dtype=torch.float32, device=call.device)
    search_pairs(inner, query, subkeys, k, scale, None, indices, weights)
    read, view = call.token_result(T, V, dtype=query.dtype)
    gather(call, values, indices, call.rows(weights), (view, *view.stride()[:4]), T)
    return call.store(read, view), indices, weights


@operator
def product_key_read_backward(
    query: Tensor, subkeys: Tensor, values: Tensor, indices: Tensor, weights: Tensor, d_read: Tensor | None,
    d_weights: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, subkeys and values."""
    T, (N, V) = query.shape[-2], values.shape[-2:]
    more = [("indices", indices, (T, k)), ("weights", weights, (T, k))]
    more += [("d_read", d_read, (T, V)), ("d_weights", d_weights, (T, k))]
    call, inner = calls("product_key_read_backward", query, subkeys, *more, values=values)
    call.require(len(wants) == 3, "wants must have 3 entries")
    p, ds = score_gradient(call, values, None, indices, weights, d_read, d_weights)
    d_values = Gradient(call, values, wants[2], "memory", N, V)
    if d_values.wanted and d_read is not None:
        Segments(call, indices, N).sum(d_values, p, d_read, 1.0)
    else:
        d_values.fill(0.0)
    return *pair_gradients(inner, query, subkeys, indices, ds, scale, wants[:2]), d_values.result()


def examples(x: Inputs) -> Iterator[Example]:
    q, subkeys, v = x(2, x.tokens, 2 * x.width), x(2, 512, x.width), x(512 * 512, x.width)
    yield Example(product_key_read, (q, subkeys, v, 32, SCALE), variant="k = 32", main=True)
    for k in (KEPT, 300):  # the most that a list on the chip holds, and more
        yield Example(product_key_read, (q, subkeys, v, k, SCALE), variant=f"k = {k}")
