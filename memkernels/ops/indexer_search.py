"""indexer_search: the k best slots of every token by a score of many small heads, exactly.

    s[t, i] = sum_h head_weights[t, h] * relu(scale * <query_th, key_i>) + slot_mask_i
    scores, indices = the k largest, best first, ties to the smaller i

Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention (the
lightning indexer, which chooses the tokens that the attention then reads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype
from ._formula import inert, inside, open_only, seen, stretch
from ._options import neighbours, scaled
from .selected_scores import with_mask
from .sparse_read import gather_rows
from .topk_search import best


def ranking(
    query: Tensor,
    head_weights: Tensor,
    keys: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
) -> Tensor:
    """The scores of all slots, in float32 (float64 for float64). [..., T, N]."""
    exact = stats_dtype(query.dtype)
    query, keys = query.to(exact), inert(keys, slot_mask).to(exact)
    addressed = None if slot_range is None else inside(slot_range, keys.shape[-2])
    if addressed is None:
        products = torch.einsum("...thc,...nc->...thn", query, keys)
    else:
        products = torch.einsum("...thc,...tnc->...thn", query, seen(keys, addressed))
    s = torch.einsum("...th,...thn->...tn", head_weights.to(exact), torch.relu(scale * products))
    return open_only(s, slot_mask, addressed)


def reference(
    query: Tensor,
    head_weights: Tensor,
    keys: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
):
    with torch.no_grad():
        _, indices = best(ranking(query, head_weights, keys, slot_mask, slot_range, k, scale), k)
    return selected(query, head_weights, keys, slot_mask, slot_range, k, scale, indices)


def selected(
    query: Tensor,
    head_weights: Tensor,
    keys: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
    indices: Tensor,
):
    exact = stats_dtype(query.dtype)
    rows = gather_rows(inert(keys, slot_mask).to(exact), indices)  # [..., T, k, K]
    products = torch.einsum("...thc,...tjc->...thj", query.to(exact), rows)
    s = torch.einsum("...th,...thj->...tj", head_weights.to(exact), torch.relu(scale * products))
    s = s.masked_fill(indices < 0, -torch.inf) if slot_mask is None else with_mask(s, slot_mask, indices)
    return s.to(query.dtype), indices


OP = register(
    Op(
        name="indexer_search",
        args=(
            Arg("query", "T H K", "tokens", "lead"),
            Arg("head_weights", "T H", "tokens", "content"),
            Arg("keys", "N K", "memory"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        params=(("k", "int"), ("scale", "float")),
        outputs=(Out("scores", "T k"), Out("indices", "T k", dtype="index", grad=False, judge=ranking)),
        saved=("indices",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * s["H"] * (s["K"] + 1),
        # of the chosen: products again, d_head_weights, d_query, d_keys
        backward_flops=lambda s: 2 * s["T"] * s["k"] * s["H"] * (3 * s["K"] + 1),
        selected=selected,
        autocast=("query", "keys"),
        over_slots="best",
        equation="the k largest of sum_h w_th relu(scale q_th.k_i) + mask_i, best first, ties to the smaller index",
    )
)


def indexer_search(
    query: Tensor,
    head_weights: Tensor,
    keys: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` slots with the largest scores for every token, where a score is a weighted sum over heads. Exact.

    ``s[t, i] = sum_h head_weights[t, h] * relu(scale * <query_th, key_i>) + slot_mask_i``

    Args:
        query: ``[..., T, H, K]``, float32, bfloat16, float16 or float64.
        head_weights: ``[..., T, H]``, dtype of ``query``, or float32 beside a 16-bit query.
        keys: ``[..., N, K]``, dtype of ``query``: one key per slot, which all heads share.
        k: how many; may exceed N. scale: multiplies the dot products before the relu; default ``K ** -0.5``, or as in
            :func:`softmax_read`. slot_mask: ``[..., N]``, bool or float, added after the sum over heads.
        slot_range: ``[..., T, 2]``, the slots that each token may address, as in :func:`softmax_read`.
        backend: as in :func:`softmax_read`.

    Returns:
        ``(scores [..., T, k] in the dtype of query, indices [..., T, k] int64)``, best first, equal scores by smaller
        index. Index -1 and score -inf where fewer than k slots are addressable. Scores are differentiable in query,
        head_weights, keys and a float mask; the gradient touches only the chosen rows. A NaN score ranks above all
        others, as in ``torch.topk``. With :func:`selected_read` this is a learned sparse attention over a memory.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit.
            NotImplementedError: the named backend cannot run the call.

    Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention.
    """
    k = neighbours("indexer_search", k)
    tensors = [query, head_weights, keys, stretch(slot_mask, keys), slot_range]
    tensors, factor = scaled(OP, tensors, scale, "indexer_search")
    return call(OP, tensors, (k, factor), backend)
