"""Which slots to replace in a full memory: how much each slot is used, and when it was last used.

    reads_i  <- decay^T reads_i  + usage_i             usage_i = sum_t weight[t, i] of the T tokens that read
    writes_i <- decay^T writes_i + (1 - retained_i)    retained_i = prod_t (1 - a[t, i]) of the T tokens that wrote

Sources: Santoro et al. 2016, Meta-Learning with Memory-Augmented Neural Networks (least recently used access, usage
that decays); Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory (usage from reads
and writes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import sparse_write


class SlotUse(NamedTuple):
    """How slots were used so far. A pytree of tensors, without gradient; leading dimensions are those of the memory.

    ``reads_i <- decay^T reads_i + usage_i`` and ``writes_i <- decay^T writes_i + 1 - retained_i`` after T tokens.

    reads: float64 ``[..., N]``, decayed sum of the weights with which tokens read the slot.
    writes: float64 ``[..., N]``, decayed sum of the shares of the slot that were overwritten. A float32 would stop
        counting at 2^24.
    last_used: int64 ``[..., N]``, the value of ``tokens`` when the slot was last read or written; -1 is never.
    tokens: int64 ``[]``, the number of tokens so far.

    Source: Santoro et al. 2016, Meta-Learning with Memory-Augmented Neural Networks; Graves et al. 2016, Hybrid
    computing using a neural network with dynamic external memory.
    """

    reads: Tensor
    writes: Tensor
    last_used: Tensor
    tokens: Tensor

    @classmethod
    def none(cls, *shape: int, device: torch.device | str | None = None) -> SlotUse:
        """The use of a new memory with slots ``[*shape]`` = ``[..., N]``: none was read or written yet."""
        zeros = torch.zeros(shape, dtype=torch.float64, device=device)
        never = torch.full(shape, -1, dtype=torch.int64, device=device)
        return cls(zeros, zeros.clone(), never, torch.zeros((), dtype=torch.int64, device=device))

    def after_read(self, usage: Tensor, tokens: int, *, decay: float = 1.0, threshold: float = 0.1) -> SlotUse:
        """The use after a read whose weights :func:`memkernels.slot_usage` summed.

        Args:
            usage: ``[..., N]``.
            tokens: how many tokens read; 0 if a write has already counted these tokens.
            decay: factor per token by which earlier use counts less, in (0, 1].
            threshold: usage from which on ``last_used`` counts a slot as used.

        Raises:
            ValueError: ``decay`` outside (0, 1], a shape that is not that of the slots.
        """
        return self._after("reads", usage, tokens, decay, threshold)

    def after_write(self, retained: Tensor, tokens: int, *, decay: float = 1.0, threshold: float = 0.1) -> SlotUse:
        """The use after ``tokens`` tokens wrote and left the share ``retained`` ``[..., N]`` of the content of a slot
        (``return_retained`` of the writes). ``decay``, ``threshold`` and errors as in :meth:`after_read`."""
        return self._after("writes", 1 - retained, tokens, decay, threshold)

    def after_replacement(self, indices: Tensor) -> SlotUse:
        """The use after the slots ``indices`` ``[..., R]`` (-1: none) got new content: written once, never read.

        Indices and errors as in :func:`replace_slots`.
        """
        lead, slots = self.reads.shape[:-1], self.reads.shape[-1]
        chosen = _named(_for_each("SlotUse.after_replacement: indices", indices, lead, 1), slots)
        return SlotUse(
            self.reads.masked_fill(chosen, 0),
            self.writes.masked_fill(chosen, 1),
            torch.where(chosen, self.tokens, self.last_used),
            self.tokens,
        )

    def _after(self, kind: str, amount: Tensor, tokens: int, decay: float, threshold: float) -> SlotUse:
        if not 0 < decay <= 1:
            raise ValueError(f"SlotUse: decay must lie in (0, 1], got {decay}")
        if amount.shape != self.reads.shape:
            raise ValueError(f"SlotUse: {kind} must be {list(self.reads.shape)}, got {list(amount.shape)}")
        amount, older, now = amount.detach(), decay**tokens, self.tokens + tokens
        sums = {"reads": self.reads * older, "writes": self.writes * older}
        sums[kind] = sums[kind] + amount
        return SlotUse(**sums, last_used=torch.where(amount >= threshold, now, self.last_used), tokens=now)


def least_used(use: SlotUse, count: int, *, keep: Tensor | None = None) -> Tensor:
    """The ``count`` slots with the smallest sum of reads and writes, least used first, ties to the smaller index.

    Args:
        use: of ``[..., N]`` slots. count: at most N.
        keep: bool ``[..., N]``, slots that are never chosen. With fewer than ``count`` others, the last indices are -1.

    Returns:
        int64 ``[..., count]``.

    Raises:
        ValueError: ``count`` is not between 0 and N.

    Source: Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory.
    """
    return _smallest("least_used", use.reads + use.writes, count, keep)


def least_recently_used(use: SlotUse, count: int, *, keep: Tensor | None = None) -> Tensor:
    """The ``count`` slots that were read or written longest ago, those never used first, ties to the smaller index.

    Arguments, result and errors as :func:`least_used`.

    Source: Santoro et al. 2016, Meta-Learning with Memory-Augmented Neural Networks.
    """
    return _smallest("least_recently_used", use.last_used, count, keep)


def _smallest(name: str, order: Tensor, count: int, keep: Tensor | None) -> Tensor:
    slots = order.shape[-1]
    if not 0 <= count <= slots:
        raise ValueError(f"{name}: count must be between 0 and {slots}, got {count}")
    if keep is None:
        return torch.sort(order, dim=-1, stable=True).indices[..., :count]
    free = (~keep).broadcast_to(order.shape)
    last = order.new_full((), torch.inf) if order.is_floating_point() else torch.iinfo(order.dtype).max
    indices = torch.sort(torch.where(free, order, last), dim=-1, stable=True).indices[..., :count]
    return indices.masked_fill(~free.gather(-1, indices), -1)


def replace_slots(values: Tensor, indices: Tensor, content: Tensor, *, backend: str | None = None) -> Tensor:
    """``values`` with ``v_i = content_j`` where ``i = indices_j``, exactly, and all other slots unchanged.

    Args:
        values: ``[..., N, V]``, not modified.
        indices: int64 ``[..., R]``, all different; -1 is no slot.
        content: ``[..., R, V]``. Both have the leading dimensions of ``values``, or none: the same for every memory.
        backend: passed to :func:`memkernels.sparse_write`.

    Returns:
        ``[..., N, V]`` in the dtype of ``values``, differentiable in values and content.

    Raises:
        ValueError: indices or content have other leading dimensions. ValueError, TypeError, RuntimeError: as
            :func:`memkernels.sparse_write`.
    """
    lead = values.shape[:-2]
    at = _for_each("replace_slots: indices", indices, lead, 1)
    content = _for_each("replace_slots: content", content, lead, 2).to(values.dtype)
    emptied = values.masked_fill(_named(at, values.shape[-2]).unsqueeze(-1), 0)
    weights = torch.ones_like(at, dtype=values.dtype)
    return sparse_write(emptied, at.unsqueeze(-1), weights.unsqueeze(-1), content, erase=0.0, backend=backend)


def _for_each(what: str, x: Tensor, lead: torch.Size, axes: int) -> Tensor:
    """``x`` with the leading dimensions of the memory before its ``axes`` own."""
    own = x.shape[x.dim() - axes :]
    if x.shape not in ((*lead, *own), own):
        wanted = dict.fromkeys((str([*lead, *own]), str(list(own))))
        raise ValueError(f"{what} must be {' or '.join(wanted)}, got {list(x.shape)}")
    return x.expand(*lead, *own)


def _named(indices: Tensor, slots: int) -> Tensor:
    """Which of the slots are among ``indices`` ``[..., R]``, where -1 is none: bool ``[..., N]``."""
    named = torch.zeros(*indices.shape[:-1], slots + 1, dtype=torch.bool, device=indices.device)
    return named.scatter(-1, indices + 1, True)[..., 1:]


def fade(values: Tensor, rate: float | Tensor, tokens: int = 1) -> Tensor:
    """Forgetting by time: ``v_i <- (1 - rate_i)^tokens v_i``.

    Args:
        values: ``[..., N, V]``, any float dtype. rate: share lost per token, one for all slots or ``[..., N]``.
        tokens: how many tokens passed.

    Returns:
        ``[..., N, V]`` in the dtype of ``values``, differentiable in values and a rate that is a tensor.
    """
    exact = torch.promote_types(values.dtype, torch.float32)  # in 16 bits 1 - rate rounds to 1 for small rates
    kept = (1 - torch.as_tensor(rate, dtype=exact, device=values.device)) ** tokens
    return (values * (kept.unsqueeze(-1) if kept.dim() else kept)).to(values.dtype)
