"""selected_scores: the scores of the slots that each token names.

    s[t, j] = scale * <query_t, key_{indices[t, j]}>                      (-inf where the index is -1)

Sources: He 2024, Mixture of A Million Experts (a dot product with the gathered row of every retrieved expert); Jegou et
al. 2011, Searching in one billion vectors: re-rank with source coding (exact scores of a short list).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype
from ._compressed import choose, compressed
from ._formula import additive, inert
from ._options import scaled
from ._sparse_gradient import check_scale, read_sparse, wants_sparse
from .sparse_read import gather_rows
from .topk_search import at


def chosen_scores(query: Tensor, keys: Tensor, indices: Tensor, slot_mask: Tensor | None, scale: float) -> Tensor:
    """Scores of the named slots, in float32 (float64 for float64); -inf at index -1 and empty slots. [..., T, k]."""
    exact = stats_dtype(query.dtype)
    rows = gather_rows(inert(keys, slot_mask).to(exact), indices)
    s = scale * torch.einsum("...tc,...tjc->...tj", query.to(exact), rows)
    return s.masked_fill(indices < 0, -torch.inf) if slot_mask is None else with_mask(s, slot_mask, indices)


def with_mask(s: Tensor, slot_mask: Tensor, indices: Tensor) -> Tensor:
    """s [..., T, k] plus the mask of the slots ``indices``; -inf where that is -inf, whatever s is."""
    mask = at(additive(slot_mask, s).unsqueeze(-2), indices)
    return (s + mask).masked_fill(torch.isneginf(mask), -torch.inf)


def reference(query: Tensor, keys: Tensor, indices: Tensor, scale: float):
    return (chosen_scores(query, keys, indices, None, scale).to(query.dtype),)


OP = register(
    Op(
        name="selected_scores",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("indices", "T k", "tokens", "index"),
        ),
        params=(("scale", "float"),),
        outputs=(Out("scores", "T k"),),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["k"] * s["K"],
        backward_flops=lambda s: 4 * s["T"] * s["k"] * s["K"],  # d_query, d_keys
        autocast=("query", "keys"),
        over_slots="rows",
        equation="s[t, j] = scale q_t.k_{indices[t, j]}",
    )
)
COMPRESSED = register(compressed(OP, keys="key_scale"))


def selected_scores(
    query: Tensor,
    keys: Tensor,
    indices: Tensor,
    *,
    scale: float | Tensor | None = None,
    key_scale: Tensor | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The score of every slot that a token names.

    ``s[t, j] = scale * <query_t, key_{indices[t, j]}>``

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64.
        keys: ``[..., N, K]``, dtype of ``query``, or int8 or float8_e4m3fn with ``key_scale``.
        indices: int64 or int32 ``[..., T, k]`` in ``[-1, N)``; -1 names no slot.
        scale, key_scale, backend: as in :func:`softmax_read`.
        sparse_grad: the gradient of ``keys [N, K]`` is a sparse tensor, as in :func:`gather_rows`.

    Returns:
        scores ``[..., T, k]`` in the dtype of ``query``, -inf where the index is -1: the dtype and the scores of
        :func:`topk_search`. Differentiable in query and keys; the gradient of the keys sums each named row in token
        order, so it is the same bits on every run.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. RuntimeError: an index outside ``[-1, N)``.
            NotImplementedError: the named backend cannot run the call.

    Source: He 2024, Mixture of A Million Experts; Jegou et al. 2011, Searching in one billion vectors: re-rank with
    source coding.
    """
    op, tensors = choose(OP, COMPRESSED, [query, keys, indices], key_scale)
    tensors, factor = scaled(op, tensors, scale, "selected_scores")
    if wants_sparse("selected_scores", sparse_grad, keys):
        check_scale("selected_scores", scale, query)
        return read_sparse(op, tensors, (factor,), backend)
    return call(op, tensors, (factor,), backend)
