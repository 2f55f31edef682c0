"""selected_read: attention over the slots that each token names.

    s[t, j] = scale * <query_t, key_{i_j}> + slot_mask_{i_j},   i_j = indices[t, j]       (-inf where i_j is -1)
    r_t     = sum_j softmax_j(s[t, j]) value_{i_j},             lse_t = log sum_j exp(s[t, j])

Sources: DeepSeek-AI 2025, DeepSeek-V3.2-Exp (attention over the tokens that an indexer selects); Child et al. 2019,
Generating Long Sequences with Sparse Transformers.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._compressed import choose, compressed
from ._formula import inert, softmax, stretch
from ._options import scaled
from ._sink import with_sink
from ._sparse_gradient import check_scale, read_sparse, wants_sparse
from .selected_scores import chosen_scores
from .sparse_read import gather_rows


def reference(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights, lse, _ = softmax(chosen_scores(query, keys, indices, slot_mask, scale))
    rows = gather_rows(inert(values, slot_mask).to(weights.dtype), indices)
    read = torch.einsum("...tk,...tkv->...tv", weights, rows)
    lead = read.shape[:-1]
    return read.to(query.dtype), weights.expand(*lead, indices.shape[-1]), lse.expand(lead)


OP = register(
    Op(
        name="selected_read",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("values", "N V", "memory", "content"),
            Arg("indices", "T k", "tokens", "index"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
        ),
        params=(("scale", "float"),),
        outputs=(
            Out("read", "T V"),
            Out("weights", "T k", dtype="stats", positive=True),
            Out("lse", "T", dtype="stats"),
        ),
        saved=("weights",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["k"] * (s["K"] + s["V"]),
        backward_flops=lambda s: 4 * s["T"] * s["k"] * (s["K"] + s["V"]),  # d_weights, d_values, d_query, d_keys
        autocast=("query", "keys", "values"),
        over_slots="rows",
        equation="r_t = sum_j softmax_j(scale q_t.k_{i_j} + mask_{i_j}) v_{i_j}, i_j = indices[t, j]",
    )
)
COMPRESSED = register(compressed(OP, keys="key_scale", values="value_scale"))


@overload
def selected_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def selected_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[True],
    return_weights: Literal[False] = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def selected_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    return_weights: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def selected_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[True],
    return_weights: Literal[True],
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def selected_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]: ...


def selected_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax read over the slots that each token names.

    ``r_t = sum_j softmax_j(scale * <query_t, key_{i_j}> + slot_mask_{i_j}) value_{i_j}`` with ``i_j = indices[t, j]``

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64.
        keys: ``[..., N, K]``, dtype of ``query``, or int8 or float8_e4m3fn with ``key_scale``.
        values: ``[..., N, V]``, dtype of ``query``, or float32 beside a 16-bit query, or int8 or float8_e4m3fn with
            ``value_scale``.
        indices: int64 or int32 ``[..., T, k]`` in ``[-1, N)``; -1 is ignored, duplicates all count. Heads that share
            their slots have a dimension of size 1 there: it is not expanded.
        scale, slot_mask, key_scale, value_scale, backend: as in :func:`softmax_read`.
        sink: as in :func:`softmax_read`. It also takes its share of the weights that are returned.
        return_lse, return_weights: also return the log-sum-exp of the scores, and the weight of every entry.
        sparse_grad: the gradients of ``keys [N, K]`` and ``values [N, V]`` are sparse tensors of the rows that were
            read, as in :func:`gather_rows`.

    Returns:
        ``read [..., T, V]`` in the dtype of ``query``; with flags a tuple of ``read``, ``weights [..., T, k]`` and
        ``lse [..., T]``, both in float32 (float64 for float64). The weight is 0 where the index is -1 or the slot
        masked; where a token names no slot that may be addressed, the read is 0 and lse is -inf, or the ``sink``.
        Differentiable in query, keys, values, a float mask and a tensor of ``scale`` or ``sink``; gradients touch only
        the rows that were read, and are the same bits on every run.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. RuntimeError: an index outside ``[-1, N)``, or
            keys or values beside compressed ones require a gradient. NotImplementedError: the named backend cannot run
            the call.

    Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp; Child et al. 2019, Generating Long Sequences with Sparse Transformers.
    """
    tensors = [query, keys, values, indices, stretch(slot_mask, keys)]
    op, tensors = choose(OP, COMPRESSED, tensors, key_scale, value_scale)
    tensors, factor = scaled(op, tensors, scale, "selected_read")
    if wants_sparse("selected_read", sparse_grad, keys, values):
        check_scale("selected_read", scale, query)
        read, weights, lse = read_sparse(op, tensors, (factor,), backend)
    else:
        read, weights, lse = call(op, tensors, (factor,), backend)
    if sink is not None:
        read, lse, weights = with_sink("selected_read", sink, read, lse, weights)
    if not return_lse and not return_weights:
        return read
    return (read, *([weights] if return_weights else []), *([lse] if return_lse else []))
