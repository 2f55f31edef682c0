"""Tokens that share a memory, side by side in the order in which they are written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._torch import known


def fold_tokens(x: Tensor, memory: Sequence[int], lead: Sequence[int], tail: int) -> Tensor:
    """Fold the shared leading dimensions of a token tensor into ``T``.

    x: ``[..., T, *tail axes]`` with ``tail`` axes after ``T``. Returns ``[*memory, T', *tail axes]`` where ``T'``
    counts the shared dimensions and ``T`` in row-major order, which is the order in which shared tokens are written.
    """
    kept, shared = _kept_and_shared(memory, lead)
    x = x.expand(*lead, *x.shape[x.dim() - tail - 1 :])
    x = x.permute(*kept, *shared, *range(len(lead), x.dim()))
    tokens = 1
    for size in x.shape[len(kept) : len(lead) + 1]:
        tokens *= size
    return x.reshape(*memory, tokens, *x.shape[x.dim() - tail :] if tail else ())


def unfold_tokens(x: Tensor, memory: Sequence[int], lead: Sequence[int], tokens: int) -> Tensor:
    """Undo :func:`fold_tokens`: ``[*memory, T', D]`` becomes ``[*lead, T, D]`` with ``T = tokens``."""
    order = [d for part in _kept_and_shared(memory, lead) for d in part]
    x = x.reshape(*(lead[d] for d in order), tokens, x.shape[-1])
    return x.permute(*(order.index(d) for d in range(len(lead))), -2, -1)


def _kept_and_shared(memory: Sequence[int], lead: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which dimensions of ``lead`` the memory has, and which its streams share."""
    own = [1] * (len(lead) - len(memory)) + list(memory)
    shared = [d for d, size in enumerate(lead) if known(own[d] == 1) and not known(size == 1)]
    return [d for d in range(len(lead)) if d not in shared], shared
