"""slot_usage: how much all tokens together read each slot; what eviction needs, without the T x N weights.

    usage_i = sum_t exp(scale * <query_t, key_i> + slot_mask_i - lse_t)

Source: Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory (usage of locations).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._folds import fold_tokens
from ._formula import inside, scores, softmax, stretch
from ._options import scaled


def reference(
    query: Tensor, keys: Tensor, lse: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float
):
    s = scores(query, keys, slot_mask, scale, slot_range)
    nothing = torch.isneginf(lse).unsqueeze(-1)
    if slot_range is not None:
        nothing = nothing | ~inside(slot_range, keys.shape[-2])
    weights = torch.exp(s - lse.unsqueeze(-1).masked_fill(nothing, 0)).masked_fill(nothing, 0)
    memory = keys.shape[:-2] if slot_mask is None else torch.broadcast_shapes(keys.shape[:-2], slot_mask.shape[:-1])
    return (fold_tokens(weights, memory, weights.shape[:-2], tail=1).sum(-2),)


def lse_of(
    query: Tensor, keys: Tensor, lse: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float
) -> Tensor:
    """The lse of these very scores. With any other, the weights exp(s - lse) do not sum to 1."""
    mask = slot_mask.double() if slot_mask is not None and slot_mask.is_floating_point() else slot_mask
    return softmax(scores(query.double(), keys.double(), mask, scale, slot_range))[1].to(lse.dtype)


OP = register(
    Op(
        name="slot_usage",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("lse", "T", "tokens", "stats", fill=lse_of),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        params=(("scale", "float"),),
        outputs=(Out("usage", "N", lead="memory", dtype="stats", positive=True),),
        saved=(),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * s["K"],
        backward_flops=lambda s: 6 * s["T"] * s["N"] * s["K"],  # scores again, d_query, d_keys
        autocast=("query", "keys"),
        equation="usage_i = sum_t exp(scale q_t.k_i + mask_i - lse_t)",
    )
)


def slot_usage(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum over the tokens of their softmax weight on each slot.

    ``usage_i = sum_t exp(scale * <query_t, key_i> + slot_mask_i - lse_t)``

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64. keys: ``[..., N, K]``, same dtype.
        lse: ``[..., T]``, float32 (float64 for float64), from :func:`softmax_read` with ``return_lse=True``. Where the
            read was merged with others, the merged lse. A token with lse -inf reads nothing.
        scale, slot_mask, slot_range, backend: as in :func:`softmax_read`.

    Returns:
        usage ``[..., N]`` with the leading dimensions of the memory (tokens that share a memory are summed), float32
        (float64 for float64). Differentiable in query, keys, lse and a float mask. The lse is rounded to its dtype, so
        the result is off by a factor of at most ``exp(|lse| * 2**-24)``: 6e-5 near scores of 1000, 0.06 near 1e6.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory.
    """
    tensors, factor = scaled(OP, [query, keys, lse, stretch(slot_mask, keys), slot_range], scale, "slot_usage")
    return call(OP, tensors, (factor,), backend)
