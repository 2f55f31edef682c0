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
from ._compressed import choose, compressed
from ._options import neighbours, scaled
from ._sparse_gradient import read_table_sparse, wants_sparse
from .product_key_search import product_scores
from .sparse_read import OP as SPARSE_READ
from .topk_read import read_chosen, results
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
            Out("lse", "T", dtype="stats"),
        ),
        saved=("indices", "weights"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * (2 * s["n"] * s["h"] + s["k"] * s["V"]),  # two lists of n
        # d_weights, d_values, d_query, d_subkeys, of the chosen
        backward_flops=lambda s: 4 * s["T"] * s["k"] * (2 * s["h"] + s["V"]),
        selected=selected,
        autocast=("query", "subkeys", "values"),
        over_slots="rows",
        equation="r_t = sum_j softmax_j(scores[t, j]) v[indices[t, j]] over the k best of n * n slots",
    )
)
COMPRESSED = register(compressed(OP, values="value_scale"))


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: Literal[False] = False,
    return_lse: Literal[False] = False,
    sparse_grad: bool = False,
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
    value_scale: Tensor | None = None,
    return_slots: Literal[True],
    return_lse: Literal[False] = False,
    sparse_grad: bool = False,
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
    value_scale: Tensor | None = None,
    return_slots: Literal[False] = False,
    return_lse: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: Literal[True],
    return_lse: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: bool,
    return_lse: Literal[False] = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


@overload
def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: bool,
    return_lse: bool,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]: ...


def product_key_read(
    query: Tensor,
    subkeys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: bool = False,
    return_lse: bool = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax read over the ``k`` best of ``n * n`` slots whose keys are the pairs of two lists of ``n`` half keys.

    ``r_t = sum_j softmax_j(scores[t, j]) * values[indices[t, j]]`` with scores and indices of
    :func:`product_key_search`.

    Args:
        query: ``[..., T, K]``, K even, float32, bfloat16, float16 or float64.
        subkeys: ``[..., 2, n, K/2]``, dtype of ``query``.
        values: ``[..., n * n, V]``, dtype of ``query``, or float32 beside a 16-bit query, or int8 or float8_e4m3fn with
            ``value_scale``. Row ``i * n + j`` belongs to the pair of ``subkeys[0, i]`` and ``subkeys[1, j]``.
        k, scale, backend: as in :func:`product_key_search`.
        value_scale: ``[..., n * n]``, as in :func:`softmax_read`.
        return_slots, return_lse: as in :func:`topk_read`.
        sparse_grad: the gradient of ``values [n * n, V]`` is a sparse tensor of the rows that were read, as in
            :func:`gather_rows`. That of ``subkeys`` stays dense.

    Returns:
        ``read [..., T, V]`` in the dtype of ``query``; with ``return_slots`` also ``indices [..., T, k]`` int64 and
        ``weights [..., T, k]``, 0 where the index is -1; with ``return_lse`` also ``lse [..., T]``, -inf where nothing
        was read; in this order. Weights and lse are in float32 (float64 for float64). Differentiable in query, subkeys,
        values and a tensor of ``scale``; gradients touch only the rows that were read.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: compressed
            values require a gradient. NotImplementedError: the named backend cannot run the call.

    Source: Lample et al. 2019, Large Memory Layers with Product Keys.
    """
    k = neighbours("product_key_read", k)
    op, tensors = choose(OP, COMPRESSED, [query, subkeys, values], value_scale)
    tensors, factor = scaled(op, tensors, scale, "product_key_read")
    if wants_sparse("product_key_read", sparse_grad, values):
        result = read_table_sparse(op, SPARSE_READ, tensors, (k, factor), backend)
    else:
        result = call(op, tensors, (k, factor), backend)
    return results("product_key_read", result, None, return_slots, return_lse)
