"""What a form is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Result = Any


def _always(**arguments: Any) -> bool:
    return True


@dataclass(frozen=True)
class Form:
    """One way to write an op in plain PyTorch: ``function(**tensors, **options)``, the main result or all of them.

    fits: can it run these arguments, in time?
    in_place: it writes into its memory.
    """

    name: str
    function: Callable[..., Result]
    fits: Callable[..., bool] = _always
    in_place: bool = False


def exact(scores: Tensor) -> Tensor:
    """In float32 at least."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def masked(scores: Tensor, slot_mask: Tensor | None) -> Tensor:
    """scores [..., T, N] under a mask [..., N], bool or added."""
    if slot_mask is None:
        return scores
    if slot_mask.dtype == torch.bool:
        return scores.masked_fill(~slot_mask.unsqueeze(-2), -torch.inf)
    return scores + slot_mask.unsqueeze(-2)


_closed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def closed(slot_range: Tensor, slots: int) -> Tensor:
    """The slots that a token may not address, ``[T, N]``: made once for a range, as an author would."""
    found = _closed.get((id(slot_range), slots))
    if found is None:
        i = torch.arange(slots)
        outside = (i < slot_range[..., :1]) | (i >= slot_range[..., 1:])
        found = _closed[id(slot_range), slots] = (slot_range, outside)  # the range is kept, and with it its id
    return found[1]


def scored(query: Tensor, keys: Tensor, slot_mask: Tensor | None = None, slot_range: Tensor | None = None) -> Tensor:
    """[..., T, N]. A product with keys [N, K] that all streams share is one product with the tokens of all."""
    scores = masked((query.shape[-1] ** -0.5 * query) @ keys.mT, slot_mask)
    return scores if slot_range is None else scores.masked_fill(closed(slot_range, keys.shape[-2]), -torch.inf)


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """values [..., N, V], indices [..., T, k] -> [..., T, k, V]; of one table [N, V] as F.embedding takes them."""
    if values.dim() == 2:
        return F.embedding(indices, values)
    lead, n = values.shape[:-2], values.shape[-2]
    first = torch.arange(0, lead.numel() * n, n).view(*lead, 1, 1)
    return F.embedding(indices + first, values.reshape(-1, values.shape[-1]))
