"""product_key_read: read only the k best of n * n slots whose keys are all pairs of two short lists, in one op.

    scores, indices = product_key_search(query, subkeys, k);   p = softmax(scores)
    r_t = sum_j p[t, j] values[indices[t, j]]

Source: Lample et al. 2019, Large Memory Layers with Product Keys: the layer of one head, after its query network.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._options import neighbours, scaled
from .product_key_search import product_scores
from .topk_read import read_chosen
from .topk_search import best


def ranking(query: Tensor, subkeys: Tensor, values: Tensor, k: int, scale: float) -> Tensor:
    return product_scores(query, subkeys, scale)


def reference(query: Tensor, subkeys: Tensor, values: Tensor, k: int, scale: float):
    _, indices = best(product_scores(query, subkeys, scale), k)
    return selected(query, subkeys, values, k, scale, indices)


def selected(query: Tensor, subkeys: Tensor, values: Tensor, k: int, scale: float, indices: Tensor):
    return read_chosen(product_scores(query, subkeys, scale), values, indices, query.dtype)


OP = register(
    Op(
        name="product_key_read",
        args=(
            Arg("query", "T 2h", "tokens", "lead"),
            Arg("subkeys", "2 n h", "memory"),
            Arg("values", "nn V", "memory", "content"),
        ),
        params=(("k", "int"), ("scale", "float")),
        outputs=(
            Out("read", "T V"),
            Out("indices", "T k", dtype="index", grad=False, of="nn", judge=ranking),
            Out("weights", "T k", dtype="stats", positive=True),
        ),
        saved=("indices", "weights"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * (2 * s["n"] * s["h"] + s["k"] * s["V"]),  # two lists of n
        # d_weights, d_values, d_query, d_subkeys, of the chosen
        backward_flops=lambda s: 4 * s["T"] * s["k"] * (2 * s["h"] + s["V"]),
        selected=selected,
        autocast=("query", "subkeys", "values"),
        equation="r_t = sum_j softmax_j(scores[t, j]) v[indices[t, j]] over the k best of n * n slots",
    )
)


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    return_slots: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    return_slots: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    return_slots: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    return_slots: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Softmax read over the ``k`` best of ``n * n`` slots whose keys are the pairs of two lists of ``n`` half keys.

    ``r_t = sum_j softmax_j(scores[t, j]) * values[indices[t, j]]`` with scores and indices of
    :func:`product_key_search`.

    Args:
        query: ``[..., T, K]``, K even, float32, bfloat16, float16 or float64.
        subkeys: ``[..., 2, n, K/2]``, dtype of ``query``.
        values: ``[..., n * n, V]``, dtype of ``query``, or float32 beside a 16-bit query. Row ``i * n + j`` belongs to
            the pair of ``subkeys[0, i]`` and ``subkeys[1, j]``.
        k, scale, backend: as in :func:`product_key_search`.
        return_slots: also return which slots were read and with what weight.

    Returns:
        ``read [..., T, V]`` in the dtype of ``query``; with ``return_slots`` ``(read, indices [..., T, k] int64,
        weights [..., T, k])``, weights in float32 (float64 for float64), 0 where the index is -1. Differentiable in
        query, subkeys and values; gradients touch only the rows that were read.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit.
            NotImplementedError: the named backend cannot run the call.

    Source: Lample et al. 2019, Large Memory Layers with Product Keys.
    """
    k = neighbours("product_key_read", k)
    tensors, factor = scaled(OP, [query, subkeys, values], scale, "product_key_read")
    result = call(OP, tensors, (k, factor), backend)
    return tuple(result) if return_slots else result[0]
