"""Formulas that several references share. Readable PyTorch, no mention of speed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..spec import shaped, stats_dtype


def additive(slot_mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as a number to add to the scores: 0 and -inf for a bool mask, zero for none."""
    if slot_mask is None:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    if slot_mask.dtype == torch.bool:
        return torch.zeros(slot_mask.shape, dtype=like.dtype, device=like.device).masked_fill(~slot_mask, -torch.inf)
    return slot_mask.to(like.dtype)


def inert(x: Tensor, slot_mask: Tensor | None) -> Tensor:
    """x [..., N, D] with the rows of empty slots (mask -inf) set to 0: what they hold, NaN too, reaches no result."""
    if slot_mask is None:
        return x
    empty = torch.isneginf(additive(slot_mask, x.to(stats_dtype(x.dtype))))
    return x.masked_fill(empty.unsqueeze(-1), 0)


def inside(slot_range: Tensor, slots: int) -> Tensor:
    """May token t address slot i: first_t <= i < stop_t? Bool [..., T, N]."""
    i = torch.arange(slots, device=slot_range.device)
    return (slot_range[..., :1] <= i) & (i < slot_range[..., 1:])


def seen(x: Tensor, addressed: Tensor) -> Tensor:
    """x [..., N, D] as each token sees it, [..., T, N, D]: zero where it may not address the slot.

    A product with zero weights would not do, in the result or the gradients: 0 * NaN is NaN.
    """
    return torch.where(addressed.unsqueeze(-1), x.unsqueeze(-3), 0)


def open_only(s: Tensor, slot_mask: Tensor | None, addressed: Tensor | None) -> Tensor:
    """s [..., T, N] plus the mask; exactly -inf at empty slots and at those that the token may not address."""
    mask = additive(slot_mask, s)
    s = s + (mask.unsqueeze(-2) if mask.dim() else mask)
    if slot_mask is not None:
        s = s.masked_fill(torch.isneginf(mask).unsqueeze(-2), -torch.inf)
    return s if addressed is None else s.masked_fill(~addressed, -torch.inf)


def scores(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, scale: float, slot_range: Tensor | None = None
) -> Tensor:
    """s[t, i] = scale * <query_t, key_i> + slot_mask_i, in float32 (float64 for float64), -inf outside of the range of
    token t. [..., T, N]."""
    exact = stats_dtype(query.dtype)
    query, keys = query.to(exact), inert(keys, slot_mask).to(exact)
    if slot_range is None:
        return open_only(scale * (query @ keys.mT), slot_mask, None)
    addressed = inside(slot_range, keys.shape[-2])
    products = (seen(keys, addressed) @ query.unsqueeze(-1)).squeeze(-1)
    return open_only(scale * products, slot_mask, addressed)


def weighted_sum(weights: Tensor, values: Tensor, slot_range: Tensor | None) -> Tensor:
    """sum_i weights[t, i] values_i over the slots that token t may address. [..., T, V]."""
    if slot_range is None:
        return weights @ values
    return (weights.unsqueeze(-2) @ seen(values, inside(slot_range, values.shape[-2]))).squeeze(-2)


def softmax(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and log-sum-exp over the last axis, and the rounding error of the lse; 0, -inf, 0 if all are -inf.

    Weights are formed from the largest score and the sum, never from the lse: where scores are large, rounding the lse
    loses whole units. ``rest`` is what it lost, so that exp((s - lse) - rest) gives the weights.
    """
    if known(s.shape[-1] == 0):
        lse = s.new_full(s.shape[:-1], -torch.inf)
        return s, lse, torch.zeros_like(lse)
    nothing = torch.isneginf(s).all(-1, keepdim=True)
    s = s.masked_fill(nothing, 0)
    top = s.detach().amax(-1, keepdim=True)  # detached: subtracting one number from all scores changes no weight
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    log_total = torch.log(total)
    lse = top + log_total
    rest = (top - lse.detach()) + log_total.detach()
    infinite = torch.isposinf(top)  # the weight of such a score is NaN, of all others 0
    lse = lse.masked_fill(nothing, -torch.inf).masked_fill(infinite, torch.inf)
    rest = rest.masked_fill(nothing | infinite, 0)
    return (e / total).masked_fill(nothing | infinite & (s < top), 0), lse.squeeze(-1), rest.squeeze(-1)


def stretch(slot_mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """A mask whose last axis has size 1, viewed with one entry per slot."""
    if slot_mask is None or not shaped(slot_mask, keys) or keys.dim() < 2:
        return slot_mask
    if not slot_mask.dim() or not known(slot_mask.shape[-1] == 1) or known(keys.shape[-2] == 1):
        return slot_mask
    return slot_mask.expand(*slot_mask.shape[:-1], keys.shape[-2])
