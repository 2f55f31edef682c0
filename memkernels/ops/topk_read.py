"""topk_read: read only the k best-scoring slots; search, softmax and gather in one op.

    scores, indices = topk_search(query, keys, k);   p = softmax(scores);   r_t = sum_j p[t, j] values[indices[t, j]]

Sources: Rae et al. 2016, Sparse Access Memory; Wu et al. 2022, Memorizing Transformers; Lample et al. 2019, Large
Memory Layers with Product Keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._compressed import choose, compressed
from ._formula import inert, scores, softmax, stretch
from ._options import neighbours, scaled
from ._sink import with_sink
from ._sparse_gradient import check_scale, read_sparse, wants_sparse
from .sparse_read import gather_rows
from .topk_search import at, best


def ranking(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
) -> Tensor:
    return scores(query, keys, slot_mask, scale, slot_range)


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
):
    _, indices = best(scores(query, keys, slot_mask, scale, slot_range), k)
    return selected(query, keys, values, slot_mask, slot_range, k, scale, indices)


def selected(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
    indices: Tensor,
):
    s = scores(query, keys, slot_mask, scale, slot_range)
    return read_chosen(s, inert(values, slot_mask), indices, query.dtype)


def read_chosen(all_scores: Tensor, values: Tensor, indices: Tensor, dtype: torch.dtype):
    """Softmax over the chosen scores, weighted sum of their rows: ``(read in dtype, indices, weights, lse)``."""
    weights, lse, _ = softmax(at(all_scores, indices))
    rows = gather_rows(values.to(weights.dtype), indices)
    read = torch.einsum("...tk,...tkv->...tv", weights, rows)
    lead, k = read.shape[:-1], indices.shape[-1]
    return read.to(dtype), indices.expand(*lead, k), weights.expand(*lead, k), lse.expand(lead)


def results(
    name: str, found: Sequence[Tensor], sink: float | Tensor | None, return_slots: bool, return_lse: bool
) -> Tensor | tuple[Tensor, ...]:
    """What a read of chosen slots returns, of ``found``: read, indices, weights and lse, and of a sink beside them."""
    read, indices, weights, lse = found
    if sink is not None:
        read, lse, weights = with_sink(name, sink, read, lse, weights)
    asked = (read, *((indices, weights) if return_slots else ()), *((lse,) if return_lse else ()))
    return asked if len(asked) > 1 else read


OP = register(
    Op(
        name="topk_read",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("values", "N V", "memory", "content"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        params=(("k", "int"), ("scale", "float")),
        outputs=(
            Out("read", "T V"),
            Out("indices", "T k", dtype="index", grad=False, judge=ranking),
            Out("weights", "T k", dtype="stats", positive=True),
            Out("lse", "T", dtype="stats"),
        ),
        saved=("indices", "weights"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * (s["N"] * s["K"] + s["k"] * s["V"]),
        # d_weights, d_values, d_query, d_keys, of the chosen
        backward_flops=lambda s: 4 * s["T"] * s["k"] * (s["K"] + s["V"]),
        selected=selected,
        autocast=("query", "keys", "values"),
        over_slots="best",
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
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: Literal[False] = False,
    return_lse: Literal[False] = False,
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
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: Literal[True],
    return_lse: Literal[False] = False,
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
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: Literal[False] = False,
    return_lse: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: Literal[True],
    return_lse: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@overload
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: bool,
    return_lse: Literal[False] = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...


@overload
def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: bool,
    return_lse: bool,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]: ...


def topk_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_slots: bool = False,
    return_lse: bool = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax read over the ``k`` best-scoring slots of every token.

    ``r_t = sum_j softmax_j(scores[t, j]) * values[indices[t, j]]`` with scores and indices of :func:`topk_search`.

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64.
        keys: ``[..., N, K]``, dtype of ``query``, or int8 or float8_e4m3fn with ``key_scale``.
        values: ``[..., N, V]``, dtype of ``query``, or float32 beside a 16-bit query, or int8 or float8_e4m3fn with
            ``value_scale``.
        key_scale, value_scale: as in :func:`softmax_read`.
        k, scale, slot_mask, slot_range, backend: as in :func:`topk_search`.
        sink: as in :func:`softmax_read`. It also takes its share of the weights that are returned.
        return_slots: also return which slots were read and with what weight.
        return_lse: also return ``lse``, the log-sum-exp of the scores of the slots that were read (natural logarithm),
            by which the read merges with those of other memories, or with local attention (:func:`merge_reads`).
        sparse_grad: the gradients of ``keys [N, K]`` and ``values [N, V]`` are sparse tensors of the rows that were
            read, as in :func:`gather_rows`.

    Returns:
        ``read [..., T, V]`` in the dtype of ``query``; with ``return_slots`` also ``indices [..., T, k]`` int64 and
        ``weights [..., T, k]``, 0 where the index is -1; with ``return_lse`` also ``lse [..., T]``, -inf (or the
        ``sink``) where nothing was read; in this order. Weights and lse are in float32 (float64 for float64).
        Differentiable in query, keys, values, a float mask and a tensor of ``scale`` or ``sink``; gradients touch only
        the rows that were read.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit. RuntimeError: keys or
            values beside compressed ones require a gradient. NotImplementedError: the named backend cannot run the
            call.

    Source: Rae et al. 2016, Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes; Wu et al. 2022,
    Memorizing Transformers.
    """
    k = neighbours("topk_read", k)
    tensors = [query, keys, values, stretch(slot_mask, keys), slot_range]
    op, tensors = choose(OP, COMPRESSED, tensors, key_scale, value_scale)
    tensors, factor = scaled(op, tensors, scale, "topk_read")
    if wants_sparse("topk_read", sparse_grad, keys, values):
        check_scale("topk_read", scale, query)
        result = read_sparse(op, tensors, (k, factor), backend)
    else:
        result = call(op, tensors, (k, factor), backend)
    return results("topk_read", result, sink, return_slots, return_lse)
