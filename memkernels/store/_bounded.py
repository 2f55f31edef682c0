"""BoundedStore: a store of at most so many live slots; what is appended beyond that evicts the least used ones.

    u_i <- 1                                          when slot i is appended
    u_i <- decay^T u_i + sum_{t,j: slot_tj = i} w_tj  when T tokens read slots [..., T, k] with weights w
    evicted: the smallest u_i of the live slots, equal ones by smaller slot

Source: Lee et al. 2001, LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
policies. Time goes by tokens; for a memory in tensors, :class:`memkernels.nn.SlotUse` counts the same.

What is kept is u_i * unit, where the unit grows by decay^-T: a read costs what it touches, not the slots of the store.
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _arguments, _io
from ._crc import crc32c
from ._errors import StoreDamaged
from ._store import MemoryStore

FILE = "slot.use"
LARGEST = 1e100  # of the unit; a sum of weights beside it is finite


class BoundedStore:
    """A :class:`MemoryStore` of at most ``max_slots`` live slots: evicts what is used least, by use that decays (LRFU).

    Reads through this object count use. An append evicts in the same commit what would be too many: the slots of least
    use, equal ones by smaller slot, never one of those that it appends. The store itself stays open to all other calls.

    A slot that was appended otherwise counts as appended when this object first sees it. Use belongs to reads, not to
    commits: where a transaction is undone, slots that it evicted are back with their use, and what was read in it
    stays counted. Use is kept in memory; :meth:`save` makes it durable.

    Args:
        store: open for writing; open for reading, it counts reads, and appends raise.
        max_slots: live slots after an append; at least 1. A store that has more loses them at the next append.
        decay: factor per token by which earlier use counts less, in (0, 1]. 1 evicts what is used least frequently; the
            smaller it is, the more what is used least recently.

    Raises:
        TypeError: ``store`` or ``max_slots`` of another type. ValueError: ``max_slots`` below 1, ``decay`` outside
            (0, 1]. StoreDamaged: the file that :meth:`save` wrote is not what it was.
    """

    def __init__(self, store: MemoryStore, max_slots: int, *, decay: float = 1.0):
        if not isinstance(store, MemoryStore):
            raise TypeError(f"BoundedStore: store must be a MemoryStore, got {type(store).__name__}")
        if isinstance(max_slots, bool) or not hasattr(max_slots, "__index__"):
            raise TypeError(f"BoundedStore: max_slots must be an int, got {type(max_slots).__name__}")
        if max_slots.__index__() < 1:
            raise ValueError(f"BoundedStore: max_slots must be at least 1, got {max_slots}")
        if not 0 < decay <= 1:
            raise ValueError(f"BoundedStore: decay must lie in (0, 1], got {decay}")
        self.store, self.max_slots, self.decay = store, max_slots.__index__(), float(decay)
        self._engine: Any = store._engine
        self._unit = 1.0
        self._counted = np.zeros(0)  # use in units by slot number, NaN where a slot was not seen yet
        slots, use = _load(store.path)
        known = (slots >= 0) & (slots < store.capacity)  # a compaction may have taken the last numbers back
        self._grow(store.capacity)
        self._counted[slots[known]] = use[known]

    def __repr__(self) -> str:
        return f"BoundedStore({self.store!r}, {self.max_slots}, decay={self.decay})"

    # --- reads, which count ---

    def topk_read(
        self, query: Tensor, k: int, *, scale=None, where=None, index=None, return_slots=False, return_lse=False
    ) -> Any:
        """:meth:`MemoryStore.topk_read`, whose weights count as use of the slots."""
        options = {"scale": scale, "where": where, "index": index}
        with self._engine.lock:
            read, slots, weights, *lse = self.store.topk_read(
                query, k, **options, return_slots=True, return_lse=return_lse
            )
            self._count(slots, weights)
        results = [read, *((slots, weights) if return_slots else ()), *lse]
        return results[0] if len(results) == 1 else tuple(results)

    def sparse_read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """:meth:`MemoryStore.sparse_read`, whose weights count as use of the slots."""
        with self._engine.lock:
            read = self.store.sparse_read(slots, weights)
            self._count(slots, weights)
        return read

    def _count(self, slots: Tensor, weights: Tensor) -> None:
        """Use of slots ``[..., T, k]``; -1, and weights that are NaN or infinite, count nothing."""
        at, shape = _arguments.numbers("sparse_read", slots)
        amount = weights.detach().cpu().double().reshape(-1).numpy()
        some = (at >= 0) & np.isfinite(amount)
        at, amount = at[some], amount[some]
        self._see(np.unique(at))
        tokens = shape[:-1].numel()
        older = self.decay**tokens
        if self._unit > LARGEST * older:
            self._counted *= older / self._unit
            self._unit = 1.0
        else:
            self._unit /= older
        np.add.at(self._counted, at, amount * self._unit)

    def _grow(self, capacity: int) -> None:
        if (more := capacity - len(self._counted)) > 0:
            more = max(more, len(self._counted) // 4)
            self._counted = np.concatenate([self._counted, np.full(more, np.nan)])

    def _see(self, slots: np.ndarray) -> None:
        """Slots that were not seen yet count as appended now."""
        self._grow(self._engine.capacity)
        self._counted[slots[np.isnan(self._counted[slots])]] = self._unit

    # --- what is used least ---

    def use(self, slots) -> Tensor:
        """The use of live slots of any shape ``[...]``, float64 ``[...]``. IndexError and KeyError as of ``read``."""
        with self._engine.lock:
            self.store._ready("use")
            self._engine.refresh()
            at, shape = _arguments.numbers("use", slots)
            _arguments.live("use", self._engine, at)
            self._see(at)
            use = torch.from_numpy(self._counted[at] / self._unit)
            return use.view(shape)

    def least_used(self, count: int) -> Tensor:
        """The ``count`` live slots that would be evicted next, least used first, equal ones by smaller slot.

        Returns:
            int64 ``[count]``, fewer where fewer are live.
        """
        if isinstance(count, bool) or not hasattr(count, "__index__"):
            raise TypeError(f"least_used: count must be an int, got {type(count).__name__}")
        if count.__index__() < 0:
            raise ValueError(f"least_used: count must be at least 0, got {count}")
        with self._engine.lock:
            self.store._ready("least_used")
            self._engine.refresh()
            return torch.from_numpy(self._least(count.__index__()))

    def _least(self, count: int) -> np.ndarray:
        engine = self._engine
        count = min(count, engine.maps["live"].count)
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        self._grow(engine.capacity)
        live = np.unpackbits(engine.maps["live"].bytes, count=engine.capacity, bitorder="little").view(bool)
        counted = self._counted[: engine.capacity]
        counted[live & np.isnan(counted)] = self._unit
        use = np.where(live, counted, np.nan)
        if engine.staged is None:  # else a slot that is deleted may be back when the transaction is undone
            counted[:], self._counted[engine.capacity :] = use, np.nan
        some = np.flatnonzero(use <= np.partition(use, count - 1)[count - 1])
        return some[np.argsort(use[some], kind="stable")[:count]].astype(np.int64)

    # --- writing ---

    def append(self, keys: Tensor, values: Tensor, meta: list[dict] | None = None) -> Tensor:
        """:meth:`MemoryStore.append`, which deletes the least used slots where there would be too many: one commit, or
        a part of the open transaction.

        ValueError, and nothing written, where there are more than ``max_slots`` rows. Their numbers and their space
        come back by ``store.compact()``.
        """
        engine = self._engine
        with engine.lock:
            self.store._ready("append", write=True)
            count = len(keys) if isinstance(keys, Tensor) and keys.dim() == 2 else 0  # else the store refuses them
            if count > self.max_slots:
                raise ValueError(f"append: keys must have at most max_slots={self.max_slots} rows, got {count}")
            inside = engine.staged is not None
            gone = self._least(max(0, len(self.store) + count - self.max_slots))
            with contextlib.nullcontext() if inside else self.store.transaction():
                slots = self.store.append(keys, values, meta)
                self.store.delete(gone)
            self._grow(self._engine.capacity)
            self._counted[slots.numpy()] = self._unit
        return slots

    # --- keeping use ---

    def save(self) -> None:
        """Write the use of all live slots to the directory of the store, durable when it returns.

        A BoundedStore that is made over the store later begins with it. Slots appended since then count as appended
        when they are seen. StoreError where the store is open for reading or a transaction is open.
        """
        with self._engine.lock:
            self.store._outside("save", write=True)
            live = self._engine.maps["live"].slots()
            self._see(live)
            body = struct.pack("<Q", len(live)) + live.astype("<i8").tobytes()
            body += (self._counted[live] / self._unit).astype("<f8").tobytes()
            with _io.new_file(self.store.path / FILE) as fd:
                _io.write_all(fd, body + struct.pack("<I", crc32c(body)), 0)


def _load(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Slots and their use, as :meth:`BoundedStore.save` wrote them; none where it never did."""
    try:
        data = (directory / FILE).read_bytes()
    except FileNotFoundError:
        return np.zeros(0, np.int64), np.zeros(0)
    count = (len(data) - 12) // 16
    whole = len(data) == 12 + 16 * count and data[:8] == struct.pack("<Q", count)
    if not whole or struct.unpack("<I", data[-4:])[0] != crc32c(data[:-4]):
        raise StoreDamaged(f"{FILE}: its crc32c is wrong; remove {directory / FILE} to begin with no use")
    slots = np.frombuffer(data, "<i8", count, 8).astype(np.int64)
    return slots, np.frombuffer(data, "<f8", count, 8 + 8 * count).astype(np.float64)
