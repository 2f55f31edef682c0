"""Registers the types of states as safe, so that ``torch.load`` loads saved states with its default arguments.

A state is a NamedTuple of tensors. Its module is imported when a saved file names it, not with memkernels.
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
    "memkernels.nn.ngram_memory.NgramHistory",
    "memkernels.nn.replacement.SlotUse",
)


def _stand_in(path: str) -> type:
    """A type that imports the type at ``path`` when it is called, and makes an object of that one."""
    module, _, name = path.rpartition(".")

    def new(cls, *fields):
        return getattr(importlib.import_module(module), name)(*fields)

    return type(name, (), {"__new__": new})


torch.serialization.add_safe_globals([(_stand_in(path), path) for path in STATES])
