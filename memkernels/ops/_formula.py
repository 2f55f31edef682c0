"""Formulas that several references share. Readable PyTorch, no mention of speed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..spec import stats_dtype


def additive(slot_mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as a number to add to the scores: 0 and -inf for a bool mask, zero for none."""
    if slot_mask is None:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    if slot_mask.dtype == torch.bool:
        return torch.zeros(slot_mask.shape, dtype=like.dtype, device=like.device).masked_fill(~slot_mask, -torch.inf)
    return slot_mask.to(like.dtype)


def inert(x: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Rows of empty slots (mask -inf) set to zero: what lies in an empty slot is never seen. x: [..., N, D]."""
    if slot_mask is None:
        return x
    empty = torch.isneginf(additive(slot_mask, x.to(stats_dtype(x.dtype))))
    return x.masked_fill(empty.unsqueeze(-1), 0)


def scores(query: Tensor, keys: Tensor, slot_mask: Tensor | None, scale: float) -> Tensor:
    """s[t, i] = scale * <query_t, key_i> + slot_mask_i, in float32 (float64 for float64). [..., T, N]."""
    exact = stats_dtype(query.dtype)
    query, keys = query.to(exact), inert(keys, slot_mask).to(exact)
    mask = additive(slot_mask, query)
    s = scale * (query @ keys.mT) + (mask.unsqueeze(-2) if mask.dim() else mask)
    if slot_mask is None:
        return s
    return s.masked_fill(torch.isneginf(mask).unsqueeze(-2), -torch.inf)


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last axis; where every score is -inf (or there is none) 0 and -inf."""
    if known(s.shape[-1] == 0):
        return s, s.new_full(s.shape[:-1], -torch.inf)
    nothing = torch.isneginf(s).all(-1, keepdim=True)
    finite = s.masked_fill(nothing, 0)
    top = finite.detach().amax(-1, keepdim=True)  # torch.logsumexp guards on a size that depends on data
    lse = top + torch.log(torch.exp(finite - top).sum(-1, keepdim=True))
    weights = torch.exp(s - lse).masked_fill(nothing, 0)
    return weights, lse.masked_fill(nothing, -torch.inf).squeeze(-1)


def default_scale(query: Tensor, scale: float | None) -> float:
    """``scale``, or the default ``K ** -0.5`` of scaled dot-product attention."""
    if scale is not None:
        return float(scale)
    width = query.shape[-1] if isinstance(query, Tensor) and query.dim() else 1
    return width**-0.5 if width else 1.0


def stretch(slot_mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """A mask whose last axis has size 1, viewed with one entry per slot."""
    if not (isinstance(slot_mask, Tensor) and slot_mask.dim() and known(slot_mask.shape[-1] == 1)):
        return slot_mask
    return slot_mask if known(keys.shape[-2] == 1) else slot_mask.expand(*slot_mask.shape[:-1], keys.shape[-2])
