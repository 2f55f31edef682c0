"""What changes a table: filling a new one, updates of its rows in memory, and writing them to its file."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _table_file, _table_open
from ._errors import StoreError
from ._table_file import Head
from ._table_layout import Layout
from ._table_shared import SharedCopy
from ._table_slots import in_range, slots_of


def encoded(t: Layout, values: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``values`` ``[N, V]``, or chunks ``[M, V]`` of them, as rows and scales of the table."""
    done = 0
    step = max(1, _table_open.PIECE // (4 * t.width))
    for chunk in [values] if isinstance(values, Tensor) else values:
        rows = t.check("create", chunk)
        done += len(rows)
        if done > t.rows:
            break
        for piece in rows.split(step):
            yield t.encode(piece)
    if done != t.rows:
        raise ValueError(f"create: values must be {t.rows} rows, got {'more' if done > t.rows else done}")


def put(t: Layout, memory: tuple[Tensor, Tensor], slots: Any, rows: Any) -> bool:
    """Write rows ``[..., V]`` to slots ``[...]`` of a table in memory; of a slot that is named twice the last stays,
    -1 names none. Was there anything to write?"""
    at = slots_of("update", slots).cpu()
    in_range("update", at, t.rows)
    wanted = [*at.shape, t.width]
    if isinstance(rows, Tensor) and list(rows.shape) != wanted:
        raise ValueError(f"update: rows must be {wanted}, got {list(rows.shape)}")
    flat = t.check("update", rows.reshape(-1, t.width) if isinstance(rows, Tensor) else rows)
    numbers = at.reshape(-1).numpy()
    found, last = np.unique(numbers[::-1], return_index=True)
    kept = torch.from_numpy(len(numbers) - 1 - last[found >= 0])
    if len(kept) == 0:
        return False
    stored, scales = t.encode(flat[kept])
    where = torch.from_numpy(found[found >= 0].copy())
    for part, new in ((t.rows_of(memory[0]), stored), (t.scales_of(memory[1]), scales)):
        if part is not None and new is not None:
            part.view(torch.uint8).index_copy_(0, where, new.view(torch.uint8))
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes the file of the table in the block."""
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                yield
                return
        finally:
            os.close(fd)


def write_back(path: Path, head: Head, memory: tuple[Tensor, Tensor], copy: SharedCopy | None) -> Head:
    """The whole table as a new file in the place of the old one, where that is still what this table was read from."""
    with copy.guard() if copy else contextlib.nullcontext(), locked(path):
        generation = copy.generation if copy else head.generation
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            now = _table_file.read_head(path, fd)
        finally:
            os.close(fd)
        if (now.identity, now.generation) != (head.identity, generation):
            raise StoreError(
                f"close: {path}: was written by another process since it was opened, so the updates of this one are "
                "not written; close(write=False) gives them up"
            )
        written = _table_file.write(path, head.layout, head.identity, generation + 1, _table_open.parts(head, memory))
        if copy:
            copy.generation = generation + 1
            copy.renamed(written, os.stat(path))
        return written
