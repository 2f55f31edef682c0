"""Saved states load with ``torch.load`` as it is by default, which makes only objects of types registered as safe.

A state is a NamedTuple of tensors. Its module is imported when a file names it, not when this library is.
"""

from __future__ import annotations

import importlib

import torch

STATES = (
    "memkernels.models.memory_rnn.RNNState",
    "memkernels.models.memory_transformer.LMOutput",
    "memkernels.models.similarity_lm.SimilarityOutput",
    "memkernels.nn.external_memory.MemoryState",
    "memkernels.nn.neural_cache.CacheState",
    "memkernels.nn.replacement.SlotUse",
)


def _stand_in(path: str) -> type:
    """A type whose objects are made by the one that ``path`` names."""
    module, _, name = path.rpartition(".")

    def new(cls, *fields):
        return getattr(importlib.import_module(module), name)(*fields)

    return type(name, (), {"__new__": new})


torch.serialization.add_safe_globals([(_stand_in(path), path) for path in STATES])
