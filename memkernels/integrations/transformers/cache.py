"""The state of memories rides in the model's cache, whose class becomes a subclass that carries it along.

Whatever is done to the keys and values of a cache is then done to the memories: beam search reorders both, and a
repeated, selected or reset batch has the memories that belong to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attention import is_range

if TYPE_CHECKING:
    from .memory import Memory, Read

CACHE_NAMES = ("cache", "past_key_values")  # of the argument, in this order: transformers 5.24 renamed it


class MemoryCache:
    """Mixed into the class of a cache in use.

    memory_states: name -> state, a tensor or a (named) tuple of tensors whose leading dimension is the batch.
    memory_owners: name -> the memory, which is asked when tokens are to be removed.
    memory_reads: name -> what every token read so far.
    """

    memory_states: dict[str, Any]
    memory_owners: dict[str, Memory]
    memory_reads: dict[str, Read]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memory_states = {name: mapped(state, change) for name, state in self.memory_states.items()}
        self.memory_reads = {name: mapped(read, change) for name, read in self.memory_reads.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memory_states, self.memory_reads = {}, {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, from the memories too; what a memory cannot undo is refused before anything is."""
        before = int(self.get_seq_length())  # type: ignore[attr-defined]
        removed = _removed(before, args[0] if args else next(iter(kwargs.values())), self)
        cropped = {}
        for name, state in self.memory_states.items():
            cropped[name] = self.memory_owners[name].crop(state, removed) if removed else state
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.memory_states = cropped
        if removed:
            self.memory_reads = {name: mapped(x, lambda x: x[:, :-removed]) for name, x in self.memory_reads.items()}


def _removed(length: int, count: int, cache: MemoryCache) -> int:
    """How many tokens ``crop(count)`` removes: up to transformers 5.23 a positive count is the length that stays."""
    count = int(count)
    if count < 0:
        return min(-count, length)
    return min(count, length) if _crops_by_removal(type(cache)) else max(length - count, 0)


def _crops_by_removal(cls: type) -> bool:
    import inspect

    base = next(c for c in cls.__mro__ if "crop" in vars(c) and not issubclass(c, MemoryCache))
    return "tokens_to_remove" in inspect.signature(base.crop).parameters  # type: ignore[attr-defined]


_CLASSES: dict[type, type] = {}


def remember(cache: Any) -> Any:
    """Let ``cache`` carry the states of memories; it is returned, its class a subclass of what it was."""
    cls = type(cache)
    if not issubclass(cls, MemoryCache):
        if cls not in _CLASSES:
            _CLASSES[cls] = type(cls.__name__, (MemoryCache, cls), {"__module__": cls.__module__})
        cache.__class__ = _CLASSES[cls]
        cache.memory_states, cache.memory_owners, cache.memory_reads = {}, {}, {}
    return cache


def given_cache(arguments: dict[str, Any]) -> Any | None:
    """The cache among the arguments of a call.

    Raises:
        TypeError: it is no ``transformers.Cache`` (such as the pages of continuous batching), and cannot carry states.
    """
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"memory: the model's cache must be a transformers Cache, got {type(cache).__name__}")
    return cache


def returned_cache(output: Any) -> Any | None:
    """The cache in the output of a model: by its name, or in its tuple."""
    if isinstance(output, tuple):
        return next((x for x in output if isinstance(x, Cache)), None)
    known = getattr(output, "__dataclass_fields__", CACHE_NAMES)  # asking for the old name in vain is a warning
    name = next((name for name in CACHE_NAMES if name in known), "")
    return getattr(output, name, None)


def mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` applied to every tensor of a state."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        parts = [mapped(x, change) for x in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise TypeError(f"memory: a state must be a tensor or a tuple of tensors, got {type(state).__name__}")


def current_tokens(mask: Any, length: int, cache: Any | None) -> Tensor | None:
    """Which of the ``length`` tokens of a call are real: bool ``[B, T]``, or None where all are.

    Args:
        mask: what the decoder got: ``[B, N]``; or ``[B, 1, T, N]`` or a dictionary of such, made by ``generate`` for a
            static cache, of which the last token's row tells which tokens are padding.
    """
    if isinstance(mask, dict):
        full = mask.get("full_attention")
        mask = next((m for m in mask.values() if m is not None), None) if full is None else full
    if mask is None or not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, mask.shape[1] - length :].bool()
    seen = 0 if cache is None else cache.get_seq_length()
    if is_range(mask):
        first, stop = mask[:, 0, -1].split(1, -1)
        at = seen + torch.arange(length, device=mask.device)
        return (at >= first) & (at < stop)
    row = mask[:, 0, -1]
    real = row if row.dtype == torch.bool else row >= 0  # a float mask is added to the scores: 0, or very negative
    return real.index_select(1, seen + torch.arange(length, device=real.device))
