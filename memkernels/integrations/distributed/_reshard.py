"""The stores of one number of ranks dealt out over another number of them; slots keep their numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ...store import MemoryStore, StoreError

FILE = "shards.json"  # how many ranks the stores belong to
BLOCK = 1 << 14  # rows in memory at once


def folder(path: Path, ranks: int, rank: int) -> Path:
    """Where the store of ``rank`` of ``ranks`` lies."""
    return path / f"rank-{rank:05}-of-{ranks:05}"


def is_live(store: MemoryStore, slots: torch.Tensor) -> torch.Tensor:
    """Which of the numbers ``[M]``, at least 0, are those of live slots of ``store``."""
    inside = slots.cpu() < store.capacity
    packed = store._engine.maps["live"]
    return inside & torch.from_numpy(packed.has(slots.cpu().where(inside, 0).numpy())) if store.capacity else inside


def reshard(path: Path, before: int, ranks: int, rank: int) -> None:
    """Make the store of ``rank`` of ``ranks`` from those of ``before`` ranks, which stay as they are."""
    target = folder(path, ranks, rank)
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was cut off
    old = [MemoryStore.open(folder(path, before, r)) for r in range(before)]
    try:
        columns = old[0].columns
        with MemoryStore.create(
            target,
            columns["keys"].dim,
            columns["values"].dim,
            key_dtype=columns["keys"].dtype,
            value_dtype=columns["values"].dtype,
            page_slots=columns["keys"].slots,
        ) as new:
            end = max(((s.capacity - 1) * before + r + 1 if s.capacity else 0) for r, s in enumerate(old))
            count = max(-(-(end - rank) // ranks), 0)  # numbers of this rank below the end
            for first in range(0, count, BLOCK):
                _fill(new, old, torch.arange(first, min(first + BLOCK, count)) * ranks + rank, ranks)
    finally:
        for store in old:
            store.close()


def _fill(new: MemoryStore, old: list[MemoryStore], slots: torch.Tensor, ranks: int) -> None:
    """Append the slots of these numbers; those that do not live are appended empty and deleted."""
    keys = torch.zeros(len(slots), new.columns["keys"].dim, dtype=new.columns["keys"].read_dtype)
    values = torch.zeros(len(slots), new.columns["values"].dim, dtype=new.columns["values"].read_dtype)
    meta: list[dict] = [{} for _ in range(len(slots))]
    live = torch.zeros(len(slots), dtype=torch.bool)
    for r, store in enumerate(old):
        held = (slots % len(old) == r).nonzero().squeeze(-1)
        local = slots[held] // len(old)
        living = is_live(store, local)
        held, local = held[living], local[living]
        keys[held], values[held] = store.read(local)
        for place, document in zip(held.tolist(), store.meta(local)):
            meta[place] = document
        live[held] = True
    with new.transaction():
        numbers = new.append(keys, values, meta if any(meta) else None)
        if not torch.equal(numbers, slots // ranks):
            raise StoreError(f"reshard: {new.path} must number its slots in order, got {numbers[:1].tolist()}...")
        if not live.all():
            new.delete(numbers[~live])
