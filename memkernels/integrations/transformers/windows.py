"""A text that is longer than the model's context: read window by window, while the memories go on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .attachment import Attachment
from .cache import CACHE_NAMES, remember, returned_cache


class Window(NamedTuple):
    """Tokens ``[T]`` of a text, those that follow them, and the model's output for them."""

    tokens: Tensor
    targets: Tensor
    output: Any


def next_window(model: Any, cache: Any) -> Any:
    """A cache without keys and values that has the memories of ``cache``: the next window of the same text starts with
    it. The model's attention begins anew, its memories do not.

    Args:
        model: a causal language model. cache: what its last call returned.
    """
    from transformers import DynamicCache

    fresh = remember(DynamicCache(config=model.config))
    for name in ("memory_states", "memory_owners", "memory_reads"):
        setattr(fresh, name, dict(getattr(cache, name, {})))
    return fresh


def cache_name(model: Any) -> str:
    """The name of the argument of ``model.forward`` that takes a cache."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[-1])


def windows(model: Any, ids: Tensor, window: int, carries: bool) -> Iterator[Window]:
    """Run the model over the windows of a text ``ids [T]``. carries: its memories go on from one to the next."""
    device, cache = next(model.parameters()).device, None
    for first in range(0, len(ids) - 1, window):
        tokens, targets = ids[first : first + window], ids[first + 1 : first + window + 1].to(device)
        tokens = tokens[: len(targets)][None].to(device)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": carries}
        if cache is not None:
            given[cache_name(model)] = next_window(model, cache)
        output = model(**given)
        cache = returned_cache(output) if carries else None
        yield Window(tokens[0], targets, output)


@torch.no_grad()
def score(model: Any, ids: Tensor, *, window: int = 1024) -> Tensor:
    """The loss of every token of a text but the first, given those before it in its window, and the memories.

    Args:
        model: a causal language model, or the :class:`Attachment` of one, which saves a pass over the vocabulary.
        ids: int64 ``[T]``. window: tokens that the model's attention sees at most.

    Returns:
        nats, float32 ``[T - 1]``: ``exp`` of their mean is the perplexity.
    """
    attachment = model if isinstance(model, Attachment) else None
    if attachment is not None:
        model = attachment.model
    carries = hasattr(model, "mk_memory") and (attachment is None or attachment.enabled)
    run, losses = windows(model.eval(), ids, window, carries), []
    for targets in ids[1:].split(window) if len(ids) > 1 else ():
        if attachment is not None and attachment.mixes:
            with attachment._passes.scoring(targets[None].to(next(model.parameters()).device)):
                losses.append(next(run).output.loss[0])
        else:
            _, targets, output = next(run)
            losses.append(F.cross_entropy(output.logits[0].float(), targets, reduction="none"))
    return torch.cat(losses) if losses else torch.empty(0)
