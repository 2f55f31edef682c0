"""The ranges of slots that tokens may address, ``slot_range``: causal, windows, packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._options import integer


def causal_range(T: int, N: int | None = None, *, window: int | None = None, offset: int = 0) -> Tensor:
    """Ranges in which token t addresses the slots up to its own: ``t + offset - window < i <= t + offset``.

    Args:
        T: how many tokens. N: how many slots, to which ranges are clipped; None: clipped by the op that takes them.
        window: at most so many slots, the token's own among them; None: all from slot 0 on.
        offset: number of the slot that belongs to token 0. With a memory of N slots that ends with those of the T
            tokens it is ``N - T``.

    Returns:
        int64 ``[T, 2]``, first and stop of every token; ``first == stop`` where nothing is addressed.

    Raises:
        ValueError, TypeError: T or N is no integer of at least 0, window none of at least 1, or offset no integer.
    """
    name = "causal_range"
    T, offset = integer(name, "T", T, 0), integer(name, "offset", offset, None)
    N = None if N is None else integer(name, "N", N, 0)
    window = None if window is None else integer(name, "window", window, 1)
    stop = torch.arange(offset + 1, offset + T + 1)
    first = torch.zeros_like(stop) if window is None else stop - window
    return torch.stack([first, stop], -1).clamp(0, N)


def packed_range(
    lengths: Sequence[int] | Tensor,
    slot_lengths: Sequence[int] | Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Ranges for sequences that lie one after the other: each token addresses the slots of its own document.

    Args:
        lengths: tokens of each document, a list of integers or an integer tensor ``[documents]``.
        slot_lengths: slots of each document; None: as many as tokens.
        causal: token j of a document addresses its slots up to j, as in :func:`causal_range`.
        window: at most so many of them, with ``causal``.

    Returns:
        int64 ``[sum(lengths), 2]``, on the device of ``lengths``.

    Raises:
        ValueError, TypeError: a length is no integer of at least 0, window none of at least 1 or without causal, or
            lengths and slot_lengths differ in number.
    """
    name = "packed_range"
    window = None if window is None else integer(name, "window", window, 1)
    if not isinstance(causal, bool):
        raise TypeError(f"{name}: causal must be a bool, got {type(causal).__name__}")
    if window is not None and not causal:
        raise ValueError(f"{name}: window must be None without causal, got {window}")
    tokens = _lengths(name, "lengths", lengths)
    slots = tokens if slot_lengths is None else _lengths(name, "slot_lengths", slot_lengths).to(tokens.device)
    if tokens.shape != slots.shape:
        raise ValueError(f"{name}: slot_lengths must be one per document, {tokens.shape[0]}, got {slots.shape[0]}")
    document = torch.repeat_interleave(tokens)
    first, stop = (slots.cumsum(0) - slots)[document], slots.cumsum(0)[document]
    if causal:
        own = first + torch.arange(document.shape[0], device=tokens.device) - (tokens.cumsum(0) - tokens)[document]
        if window is not None:
            first = torch.minimum(torch.maximum(first, own + 1 - window), stop)
        stop = torch.minimum(stop, own + 1)
    return torch.stack([first, stop], -1)


def _lengths(op: str, name: str, lengths: Sequence[int] | Tensor) -> Tensor:
    """``lengths`` as an int64 tensor ``[documents]``."""
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            kind = f"{list(lengths.shape)} of {str(lengths.dtype).removeprefix('torch.')}"
            raise TypeError(f"{op}: {name} must be integers [documents], got {kind}")
        if (lengths < 0).any():
            raise ValueError(f"{op}: {name} must be at least 0, got {int(lengths.min())}")
        return lengths.long()
    return torch.tensor([integer(op, name, length, 0) for length in lengths], dtype=torch.int64)
