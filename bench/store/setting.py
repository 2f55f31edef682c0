"""The memory that most rows share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memkernels.store import MemoryStore

from ..contests import setting

PIECE = 1 << 17  # slots of one append


@dataclass(frozen=True)
class Setting(setting.Setting):
    @property
    def page_slots(self) -> int:
        return self.size(1024, 64)

    @functools.cached_property
    def memory(self) -> Memory:
        """1 GiB of slots, made where it is first used."""
        return Memory.make(self, "memory", *normal(self.size(1 << 21, 1 << 12), 64, 64))


@dataclass(frozen=True)
class Memory:
    """keys [N, K] and values [N, V] in RAM, and a closed store that holds the same."""

    path: Path
    keys: Tensor
    values: Tensor

    @classmethod
    def make(cls, setting: Setting, name: str, keys: Tensor, values: Tensor) -> Memory:
        path = setting.folder / name
        widths = (keys.shape[-1], values.shape[-1])
        dtypes = {"key_dtype": keys.dtype, "value_dtype": values.dtype}
        with MemoryStore.create(path, *widths, **dtypes, page_slots=setting.page_slots) as store:
            for first in range(0, len(keys), PIECE):
                store.append(keys[first : first + PIECE], values[first : first + PIECE])
        return cls(path, keys, values)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def resident(self) -> MemoryStore:
        """A reader that holds everything in memory once :func:`warm` has read it."""
        return MemoryStore.open(self.path, ram_bytes=2 * self.nbytes)


def warm(store: MemoryStore) -> None:
    """Bring every page into memory, in order."""
    store.prefetch(torch.arange(0, store.capacity, store.columns["keys"].slots))


def normal(count: int, *widths: int, seed: int = 0) -> Iterator[Tensor]:
    """Standard normal rows ``[count, width]`` for each width."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=generator) for width in widths)
