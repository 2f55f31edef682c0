"""address: the explicit weights of every token on every slot, for inspection.

    s[t, i] = scale * <query_t, key_i> + slot_mask_i
    softmax: w[t, i] = exp(s[t, i]) / sum_j exp(s[t, j])        sigmoid: w[t, i] = 1 / (1 + exp(-s[t, i]))

Sources: Vaswani et al. 2017, Attention Is All You Need; Graves et al. 2014, Neural Turing Machines (content
    addressing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._formula import inside, scores, softmax, stretch
from ._options import scaled

GATES = ("softmax", "sigmoid")


def reference(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float, sigmoid: bool
):
    s = scores(query, keys, slot_mask, scale, slot_range)
    weights = torch.sigmoid(s) if sigmoid else softmax(s)[0]
    if slot_range is not None:  # of a token with a NaN score, too
        weights = weights.masked_fill(~inside(slot_range, keys.shape[-2]), 0)
    return (weights.to(query.dtype),)


OP = register(
    Op(
        name="address",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        params=(("scale", "float"), ("sigmoid", "bool")),
        outputs=(Out("weights", "T N", positive=True),),
        saved=("weights",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * s["K"],
        backward_flops=lambda s: 4 * s["T"] * s["N"] * s["K"],  # d_query, d_keys
        autocast=("query", "keys"),
        over_slots="whole",
        equation="w[t, i] = gate(scale q_t.k_i + mask_i), gate = softmax over i or sigmoid",
    )
)


def address(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    gate: str = "softmax",
    backend: str | None = None,
) -> Tensor:
    """Weights of every token on every slot.

    ``w[t, i] = gate(scale * <query_t, key_i> + slot_mask_i)`` with ``gate`` a softmax over the slots or an
    elementwise sigmoid.

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64. keys: ``[..., N, K]``, same dtype.
        scale: as in :func:`softmax_read`. slot_mask: ``[..., N]``, bool or float; an empty slot (-inf) has weight 0.
        slot_range: ``[..., T, 2]``, as in :func:`softmax_read`; a slot outside of a token's range has weight 0.
        gate: ``"softmax"`` or ``"sigmoid"``. backend: as in :func:`softmax_read`.

    Returns:
        weights ``[..., T, N]`` in the dtype of ``query``. This op is for looking at weights: its result is T x N
        numbers, which the fused reads and writes never form.

    Raises:
        ValueError: an unknown ``gate``, or a shape or device does not fit. TypeError: a dtype does not fit.
            NotImplementedError: the named backend cannot run the call.

    Source: Vaswani et al. 2017, Attention Is All You Need; Graves et al. 2014, Neural Turing Machines.
    """
    if not isinstance(gate, str) or gate not in GATES:
        raise ValueError(f"address: gate must be one of {', '.join(GATES)}, got {gate!r}")
    tensors, factor = scaled(OP, [query, keys, stretch(slot_mask, keys), slot_range], scale, "address")
    return call(OP, tensors, (factor, gate == "sigmoid"), backend)
