"""additive_read: attention over the slots of a memory by a small network instead of a dot product.

    s[t, i] = sum_a u_a tanh(query_ta + key_ia) + slot_mask_i
    r_t     = sum_i softmax_i(s[t, i]) value_i,      lse_t = log sum_i exp(s[t, i])

Source: Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align and Translate.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import LSE_REST, Arg, Op, Out, stats_dtype
from ._formula import inert, inside, open_only, softmax, stretch, weighted_sum


def additive_scores(
    query: Tensor, keys: Tensor, score_vector: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None
) -> Tensor:
    """s[t, i] = sum_a u_a tanh(q_ta + k_ia) + slot_mask_i, in float32 (float64 for float64), -inf outside of the range
    of token t. [..., T, N]."""
    exact = stats_dtype(query.dtype)
    query, keys = query.to(exact), inert(keys, slot_mask).to(exact)
    added = query.unsqueeze(-2) + keys.unsqueeze(-3)
    addressed = None if slot_range is None else inside(slot_range, keys.shape[-2])
    if addressed is not None:
        added = added.masked_fill(~addressed.unsqueeze(-1), 0)
    s = (torch.tanh(added) * score_vector.to(exact).unsqueeze(-2).unsqueeze(-2)).sum(-1)
    return open_only(s, slot_mask, addressed)


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_vector: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
):
    weights, lse, rest = softmax(additive_scores(query, keys, score_vector, slot_mask, slot_range))
    read = weighted_sum(weights, inert(values, slot_mask).to(weights.dtype), slot_range)
    return read.to(query.dtype), lse.expand(read.shape[:-1]), rest.expand(read.shape[:-1])


OP = register(
    Op(
        name="additive_read",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("values", "N V", "memory", "content"),
            Arg("score_vector", "K", "memory"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        outputs=(Out("read", "T V"), Out("lse", "T", dtype="stats"), LSE_REST),
        saved=("read", "lse", "lse_rest"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * (2 * s["K"] + s["V"]),  # a tanh counts as one multiply-add
        backward_flops=lambda s: 6 * s["T"] * s["N"] * (2 * s["K"] + s["V"]),
        autocast=("query", "keys", "values", "score_vector"),
        over_slots="lse",
        equation="r_t = sum_i softmax_i(u.tanh(q_t + k_i) + mask_i) v_i",
    )
)


@overload
def additive_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_vector: Tensor,
    *,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def additive_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_vector: Tensor,
    *,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def additive_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_vector: Tensor,
    *,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def additive_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_vector: Tensor,
    *,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory by additive scores: the dot product of a vector with the tanh of query plus key.

    ``r_t = sum_i softmax_i(sum_a u_a tanh(query_ta + key_ia) + slot_mask_i) value_i``

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64. keys: ``[..., N, K]``, same dtype. Both are
            already projected to the common width K.
        values: ``[..., N, V]``, dtype of ``query``, or float32 beside a 16-bit query.
        score_vector: ``u``, ``[..., K]``, dtype of ``query``.
        slot_mask, slot_range, return_lse, backend: as in :func:`softmax_read`.

    Returns:
        ``read`` ``[..., T, V]`` in the dtype of ``query``; with ``return_lse`` also ``lse`` ``[..., T]`` in float32
        (float64 for float64). With no addressable slot the read is 0 and lse is -inf. Reads of disjoint memories
        merge by :func:`merge_reads`. Differentiable in every float argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align and Translate.
    """
    tensors = [query, keys, values, score_vector, stretch(slot_mask, keys), slot_range]
    read, lse, _ = call(OP, tensors, (), backend)
    return (read, lse) if return_lse else read
