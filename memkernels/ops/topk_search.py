"""topk_search: the k best-scoring slots of every token, exactly.

    s[t, i] = scale * <query_t, key_i> + slot_mask_i;   scores, indices = the k largest, best first, ties to the
    smaller i

Sources: Johnson et al. 2017, Billion-scale similarity search with GPUs (exact search by selection fused into the
product); Wu et al. 2022, Memorizing Transformers; Khandelwal et al. 2020, kNN-LM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import Arg, Op, Out
from ._compressed import choose, compressed
from ._formula import scores, stretch
from ._options import neighbours, scaled


def best(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, best first, ties to the smaller index; -inf is never chosen (index -1)."""
    at_least_k = torch.nn.functional.pad(s, (0, k), value=-torch.inf)
    order = torch.sort(at_least_k, dim=-1, descending=True, stable=True)
    chosen, indices = order.values[..., :k], order.indices[..., :k]
    return chosen, indices.masked_fill(torch.isneginf(chosen), -1)


def ranking(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, k: int, scale: float
) -> Tensor:
    return scores(query, keys, slot_mask, scale, slot_range)


def reference(query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, k: int, scale: float):
    chosen, indices = best(scores(query, keys, slot_mask, scale, slot_range), k)
    return chosen.to(query.dtype), indices


def at(s: Tensor, indices: Tensor) -> Tensor:
    """The scores of slots already chosen; -inf where the index is -1. [..., T, N], [..., T, k] -> [..., T, k]."""
    lead = torch.broadcast_shapes(s.shape[:-1], indices.shape[:-1])
    s, indices = s.expand(*lead, -1), indices.expand(*lead, -1)
    if known(s.shape[-1] == 0):
        return s.new_full(indices.shape, -torch.inf)
    return torch.gather(s, -1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)


def selected(
    query: Tensor,
    keys: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    k: int,
    scale: float,
    indices: Tensor,
):
    return at(scores(query, keys, slot_mask, scale, slot_range), indices).to(query.dtype), indices


OP = register(
    Op(
        name="topk_search",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        params=(("k", "int"), ("scale", "float")),
        outputs=(Out("scores", "T k"), Out("indices", "T k", dtype="index", grad=False, judge=ranking)),
        saved=("indices",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * s["K"],
        backward_flops=lambda s: 4 * s["T"] * s["k"] * s["K"],  # d_query, d_keys, of the chosen
        selected=selected,
        autocast=("query", "keys"),
        over_slots="best",
        equation="the k largest of scale q_t.k_i + mask_i, best first, ties to the smaller index",
    )
)
COMPRESSED = register(compressed(OP, keys="key_scale"))


def topk_search(
    query: Tensor,
    keys: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` slots with the largest scores for every token. Exact.

    ``s[t, i] = scale * <query_t, key_i> + slot_mask_i``

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64.
        keys: ``[..., N, K]``, dtype of ``query``, or int8 or float8_e4m3fn with ``key_scale``.
        key_scale: as in :func:`softmax_read`.
        k: how many; may exceed N. scale: as in :func:`softmax_read`. slot_mask: ``[..., N]``, bool or float.
        slot_range: ``[..., T, 2]``, the slots that each token may address, as in :func:`softmax_read`.
        backend: as in :func:`softmax_read`.

    Returns:
        ``(scores [..., T, k] in the dtype of query, indices [..., T, k] int64)``, best first, equal scores by smaller
        index. Index -1 and score -inf where fewer than k slots are addressable. Scores are differentiable in query,
        keys and a float mask; the gradient touches only the chosen rows. A NaN score ranks above all others, as in
        ``torch.topk``.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit.
            NotImplementedError: the named backend cannot run the call.

    L2 search is ``scale=2, slot_mask=-(keys ** 2).sum(-1)``; cosine search is the same op on unit vectors.

    Source: Johnson et al. 2017, Billion-scale similarity search with GPUs; Wu et al. 2022, Memorizing Transformers.
    """
    k = neighbours("topk_search", k)
    op, tensors = choose(OP, COMPRESSED, [query, keys, stretch(slot_mask, keys), slot_range], key_scale)
    tensors, factor = scaled(op, tensors, scale, "topk_search")
    return call(op, tensors, (k, factor), backend)
