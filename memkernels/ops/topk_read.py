"""topk_read: read only the k best-scoring slots; search, softmax and gather in one op.

    scores, indices = topk_search(query, keys, k);   p = softmax(scores);   r_t = sum_j p[t, j] values[indices[t, j]]

Sources: Rae et al. 2016, Sparse Access Memory; Wu et al. 2022, Memorizing Transformers; Lample et al. 2019, Large
Memory Layers with Product Keys.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._compressed import choose, compressed
from ._formula import inert, scores, softmax, stretch
from ._options import SIXTEEN_BITS, neighbours, scaled
from ._sparse_gradient import read_sparse, wants_sparse
from .sparse_read import gather_rows
from .topk_search import at, best


def ranking(query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, k: int, scale: float) -> Tensor:
    return scores(query, keys, slot_mask, scale)


def reference(query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, k: int, scale: float):
    _, indices = best(scores(query, keys, slot_mask, scale), k)
    return selected(query, keys, values, slot_mask, k, scale, indices)


def selected(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, k: int, scale: float, indices: Tensor
):
    return read_chosen(scores(query, keys, slot_mask, scale), inert(values, slot_mask), indices, query.dtype)


def read_chosen(all_scores: Tensor, values: Tensor, indices: Tensor, dtype: torch.dtype):
    """Softmax over the chosen scores, weighted sum of their rows: ``(read in dtype, indices, weights)``."""
    weights = softmax(at(all_scores, indices))[0]
    rows = gather_rows(values.to(weights.dtype), indices)
    read = torch.einsum("...tk,...tkv->...tv", weights, rows)
    lead, k = read.shape[:-1], indices.shape[-1]
    return read.to(dtype), indices.expand(*lead, k), weights.expand(*lead, k)


OP = register(
    Op(
        name="topk_read",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("values", "N V", "memory", "content"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
        ),
        params=(("k", "int"), ("scale", "float")),
        outputs=(
            Out("read", "T V"),
            Out("indices", "T k", dtype="index", grad=False, judge=ranking),
            Out("weights", "T k", dtype="stats", positive=True),
        ),
        saved=("indices", "weights"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * (s["N"] * s["K"] + s["k"] * s["V"]),
        # d_weights, d_values, d_query, d_keys, of the chosen
        backward_flops=lambda s: 4 * s["T"] * s["k"] * (s["K"] + s["V"]),
        selected=selected,
        autocast=("query", "keys", "values"),
        equation="r_t = sum_j softmax_j(scores[t, j]) v[indices[t, j]] over the k best slots",
    )
)
COMPRESSED = register(compressed(OP, keys="key_scale", values="value_scale"))


@overload
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: Literal[False] = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: bool,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_slots: bool = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Softmax read over the ``k`` best-scoring slots of every token.

    ``r_t = sum_j softmax_j(scores[t, j]) * values[indices[t, j]]`` with scores and indices of :func:`topk_search`.

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64.
        keys: ``[..., N, K]``, dtype of ``query``, or int8 or float8_e4m3fn with ``key_scale``.
        values: ``[..., N, V]``, dtype of ``query``, or float32 beside a 16-bit query, or int8 or float8_e4m3fn with
            ``value_scale``.
        key_scale, value_scale: as in :func:`softmax_read`.
        k, scale, slot_mask, backend: as in :func:`topk_search`.
        return_slots: also return which slots were read and with what weight.
        sparse_grad: the gradients of ``keys [N, K]`` and ``values [N, V]`` are sparse tensors of the rows that were
            read, as in :func:`gather_rows`.

    Returns:
        ``read [..., T, V]`` in the dtype of ``query``; with ``return_slots`` ``(read, indices [..., T, k] int64,
        weights [..., T, k])``, weights in float32 (float64 for float64), 0 where the index is -1. Differentiable in
        query, keys, values and a float mask; gradients touch only the rows that were read.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: keys or
            values beside compressed ones require a gradient. NotImplementedError: the named backend cannot run the
            call.

    Source: Rae et al. 2016, Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes; Wu et al. 2022,
    Memorizing Transformers.
    """
    k = neighbours("topk_read", k)
    tensors = [query, keys, values, stretch(slot_mask, keys)]
    op, tensors = choose(OP, COMPRESSED, tensors, {"keys": key_scale, "values": value_scale})
    tensors, factor = scaled(op, tensors, scale, "topk_read")
    if wants_sparse("topk_read", sparse_grad, keys, values):
        if isinstance(scale, Tensor) and query.dtype in SIXTEEN_BITS and scale.dim():
            raise ValueError("topk_read: scale must be a number with sparse_grad and 16-bit keys, got a tensor")
        result = read_sparse(op, tensors, (k, factor), backend)
    else:
        result = call(op, tensors, (k, factor), backend)
    return tuple(result) if return_slots else result[0]
