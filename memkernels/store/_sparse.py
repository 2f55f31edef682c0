"""Weighted sums of values that are named by number: over the arena of a tier as it lies, or over the rows gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from . import _rows, _search
from ._columns import as_they_lie
from ._engine import Engine


def read_in_place(engine: Engine, slots: Tensor, weights: Tensor) -> Tensor | None:
    """The read where all values are in the tier of the weights, and lie as the op takes them. [..., T, k] each."""
    # Rows in the arena may change before a backward, so they are read in place only where there is none.
    if torch.is_grad_enabled() and weights.requires_grad:
        return None
    dtype, home = weights.dtype, weights.device
    if engine.home(weights) != home or slots.device != home or not as_they_lie(engine.columns["values"], dtype):
        return None
    tier = engine.tier("values", home)
    at = _rows.places(engine, tier, slots, none=True)
    if at is None:
        return None
    with tier.reading() as memory:
        scales = None if memory.scales is None else memory.scales.to(_search.exact(dtype))
        return ops.sparse_read(memory.rows, at.to(home), weights, value_scale=scales)


def read(engine: Engine, slots: Tensor, weights: Tensor) -> Tensor:
    """The read of gathered rows. [T, k] each -> [T, V] in the exact dtype."""
    used, at = torch.unique(slots.cpu(), return_inverse=True)
    missing = int((used < 0).sum())
    rows = _rows.gather(engine, "values", used[missing:].numpy(), weights.device)
    exact = _search.exact(weights.dtype)
    return ops.sparse_read(rows.to(exact), (at - missing).to(weights.device), weights.to(exact))
