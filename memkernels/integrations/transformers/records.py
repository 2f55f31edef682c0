"""The records of a TokenStore: keys, the token that followed each, and where it stood; in memory or on disk.

Both kinds give slots numbers that never change, and find the nearest keys by

    -|q - k_i|^2 = 2 <q, k_i> - |k_i|^2 - |q|^2,   the last term alike for all slots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import topk_search
from ...store import MemoryStore

COLUMNS = 3  # token, document, position
_AT_ONCE = 1024  # queries; their k keys are gathered side by side
_IN_CACHE = 32  # of these, whose differences from their keys stay in the processor's cache
_SPLIT = 3  # bfloat16 or float16 parts of |k|^2 / 2, that add up to the precision of float32
_LARGEST = 2**24  # float32 counts up to here


class Records:
    """The records in memory: keys ``[N, dim]``, -|k|^2 ``[N]`` (-inf: removed), int32 ``[N, 3]`` for token, document,
    position."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.dim, self.dtype = dim, dtype
        self.keys = torch.empty(0, dim, dtype=dtype, device=device)
        self.lengths = torch.empty(0, device=device)
        self.columns = torch.empty(0, COLUMNS, dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return int(torch.isfinite(self.lengths).sum())

    @property
    def bytes_per_slot(self) -> int:
        return self.dim * self.keys.element_size() + 4 + 4 * COLUMNS

    def append(self, keys: Tensor, columns: Tensor) -> None:
        keys = keys.to(self.keys.device, self.dtype)
        self.keys = torch.cat([self.keys, keys])
        self.lengths = torch.cat([self.lengths, -keys.float().square().sum(-1)])
        self.columns = torch.cat([self.columns, columns.to(self.columns.device, torch.int32)])

    def search(self, query: Tensor, k: int) -> Tensor:
        """The k nearest slots ``[T, k]`` of queries ``[T, dim]``, -1 where fewer are left."""
        return topk_search(query.to(self.dtype), self.keys, k, scale=2.0, slot_mask=self.lengths)[1]

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys in a dtype of floats and columns; any numbers where a slot is -1."""
        at = slots.clamp(min=0)
        if len(self.keys) == 0:
            return self.keys.new_zeros(*slots.shape, self.dim), slots.new_zeros(*slots.shape, COLUMNS)
        return self.keys[at], self.columns[at]

    def columns_at(self, slots: Tensor) -> Tensor:
        """int64 ``[..., 3]``."""
        return self.columns[slots].long()

    def remove(self, documents: Sequence[int]) -> int:
        """Remove the records of documents; how many there were."""
        gone = torch.isin(self.columns[:, 1], torch.tensor(list(documents), dtype=torch.int32))
        gone &= torch.isfinite(self.lengths)
        self.lengths = self.lengths.masked_fill(gone, -torch.inf)
        return int(gone.sum())

    def live(self) -> tuple[Tensor, Tensor]:
        """Keys and columns of those that were not removed, in order."""
        here = torch.isfinite(self.lengths)
        return self.keys[here], self.columns[here]

    def alive(self, slots: Tensor) -> Tensor:
        """bool, of the shape of ``slots``: False where there is none, or it was removed."""
        inside = (slots >= 0) & (slots < len(self.lengths))
        found = torch.zeros_like(inside)
        found[inside] = torch.isfinite(self.lengths[slots[inside]])
        return found


class DiskRecords:
    """The records in a :class:`memkernels.store.MemoryStore`, which keeps pages in memory as far as there is room.

    A key has ``_SPLIT`` numbers more, the parts of -|k|^2 / 2, and a query has ones there: the dot product is then that
    of the search above. The value is float32 ``[3]``.
    """

    def __init__(self, path: str | os.PathLike[str], dim: int, dtype: torch.dtype, create: bool):
        self.dim, self.dtype, self.path = dim, dtype, os.path.abspath(path)
        if create:
            MemoryStore.create(self.path, dim + _SPLIT, COLUMNS, key_dtype=dtype).close()
        self.store = MemoryStore.open(self.path, mode="w")
        width = self.store.columns["keys"].dim
        if width != dim + _SPLIT or self.store.columns["keys"].dtype != dtype:
            self.store.close()
            raise ValueError(f"TokenStore: {self.path} must hold keys of width {dim + _SPLIT}, got {width}")

    def __len__(self) -> int:
        return len(self.store)

    @property
    def bytes_per_slot(self) -> int:
        return sum(column.row_bytes for column in self.store.columns.values())

    def append(self, keys: Tensor, columns: Tensor) -> None:
        if len(columns) and int(columns.max()) >= _LARGEST:
            raise ValueError(f"TokenStore: tokens, documents and positions on disk must be below {_LARGEST}")
        keys = keys.cpu().to(self.dtype)
        rest = -keys.float().square().sum(-1) / 2
        parts = []
        for _ in range(_SPLIT):
            parts.append(rest.to(self.dtype))
            rest = rest - parts[-1].float()
        self.store.append(torch.cat([keys, torch.stack(parts, -1)], -1), columns.float())

    def search(self, query: Tensor, k: int) -> Tensor:
        ones = query.new_ones(len(query), _SPLIT)
        return self.store.topk_search(torch.cat([query, ones], -1).cpu().to(self.dtype), k, scale=2.0)[1]

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        there = slots >= 0
        keys = torch.zeros(*slots.shape, self.dim)
        columns = torch.zeros(*slots.shape, COLUMNS, dtype=torch.int64)
        if bool(there.any()):
            read = self.store.read(slots[there])
            keys[there], columns[there] = read[0][:, : self.dim].float(), read[1].long()
        return keys, columns

    def columns_at(self, slots: Tensor) -> Tensor:
        return self.store.gather(slots).long()

    def alive(self, slots: Tensor) -> Tensor:
        inside = (slots >= 0) & (slots < self.store.capacity)
        found = torch.zeros_like(inside)
        found[inside] = torch.from_numpy(self.store._engine.maps["live"].has(slots[inside].numpy()))
        return found

    def live(self) -> tuple[Tensor, Tensor]:
        numbers = self._numbers()
        keys, columns = self.rows(numbers)
        return keys.to(self.dtype), columns.to(torch.int32)

    def _numbers(self) -> Tensor:
        return torch.from_numpy(self.store._engine.maps["live"].slots().astype("int64"))

    def remove(self, documents: Sequence[int]) -> int:
        numbers = self._numbers()
        gone = torch.isin(self.columns_at(numbers)[:, 1], torch.tensor(list(documents)))
        return self.store.delete(numbers[gone]) if bool(gone.any()) else 0

    def close(self) -> None:
        self.store.close()


def nearest(records: Records | DiskRecords, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest records of queries ``[T, dim]``, float32.

    Returns:
        ``(distances, slots, tokens)``, each ``[T, k]``: |q - k|^2 in float32, +inf where there is no record; int64, -1
        there.
    """
    found = [_nearest(records, part, k) for part in query.split(_AT_ONCE)]
    if not found:
        empty = query.new_empty(0, k)
        return empty, empty.long(), empty.long()
    distances, slots, tokens = (torch.cat(parts) for parts in zip(*found))
    return distances, slots, tokens


def _nearest(records: Records | DiskRecords, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = records.search(query, k)
    none = slots < 0
    keys, columns = records.rows(slots)
    # A score of 16 bits has too few digits to tell neighbours apart: the distance is computed anew.
    pairs = zip(query.split(_IN_CACHE), keys.split(_IN_CACHE))
    distances = torch.cat([(q[:, None] - near.float()).square_().sum(-1) for q, near in pairs])
    return distances.masked_fill(none, torch.inf), slots, columns[..., 0].long().masked_fill(none, -1)


def around(records: Records | DiskRecords, slot: int, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Tokens of the records that lead up to a slot in its document, itself last, and of those that follow it: int64
    ``[at most before + 1]`` and ``[at most after]``."""
    near = torch.arange(slot - before, slot + after + 1)
    near = near[records.alive(near)]
    columns = records.columns_at(near).cpu()
    at = int((near == slot).nonzero()[0])
    steps = torch.arange(len(near)) - at
    follows = (columns[:, 1] == columns[at, 1]) & (columns[:, 2] - columns[at, 2] == steps)
    gaps = (~follows).nonzero()[:, 0]
    first = int(gaps[gaps < at].max()) + 1 if bool((gaps < at).any()) else 0
    stop = int(gaps[gaps > at].min()) if bool((gaps > at).any()) else len(near)
    return columns[first : at + 1, 0], columns[at + 1 : stop, 0]
