"""Durable commits of scattered slots, against a raw file that is appended to and synced, and against LMDB."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from memkernels.store import MemoryStore

from ..contests.contest import Contest, same
from ..contests.finding import TOLD, Finding, Wrong, least, most
from ..contests.peers import Lmdb, missing
from .setting import Memory, Setting, normal

RAW, LMDB = "append and fdatasync", "LMDB"
GOALS = {1: TOLD, 100: least(4)}  # against LMDB


class Raw:
    """A file that grows by the bytes of each commit: slot numbers, then rows."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, 0
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, slots: np.ndarray, rows: np.ndarray) -> None:
        data = slots.tobytes() + rows.tobytes()
        if os.write(self.fd, data) != len(data):
            raise OSError(f"{self.path}: a write was cut short")
        os.fdatasync(self.fd)
        self.last = len(data)

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Rows of the last commit."""
        with open(self.path, "rb") as file:
            file.seek(-self.last, os.SEEK_END)
            data = np.frombuffer(bytearray(file.read()), np.uint8)
        return data[slots.nbytes :].reshape(len(slots), -1)

    def close(self) -> None:
        os.close(self.fd)


class Own:
    """The store as the peers are used; a second process would read what :meth:`read` does."""

    def __init__(self, memory: Memory) -> None:
        self.path, self.width = memory.path, memory.keys.shape[-1]
        self.store = MemoryStore.open(memory.path, mode="w")

    def write(self, slots: np.ndarray, rows: np.ndarray) -> None:
        numbers = torch.from_numpy(rows).view(torch.float32)
        self.store.write(torch.from_numpy(slots), numbers[:, : self.width], numbers[:, self.width :])

    def read(self, slots: np.ndarray) -> np.ndarray:
        with MemoryStore.open(self.path) as reader:
            return torch.cat(reader.read(torch.from_numpy(slots)), 1).view(torch.uint8).numpy()

    def close(self) -> None:
        self.store.close()


def rows_of(memory: Memory) -> np.ndarray:
    """uint8 [N, bytes]: key and value of a slot side by side."""
    return torch.cat([memory.keys, memory.values], 1).view(torch.uint8).numpy()


class Draw:
    """Which slots get which rows, drawn before the clock runs."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.random = rows, np.random.default_rng(4)

    def next(self, count: int) -> None:
        self.slots = self.random.choice(len(self.rows), count, replace=False)
        self.new = self.rows[self.random.integers(len(self.rows), size=count)]

    def commit(self, table) -> Callable:
        """A commit of what was drawn; returns what must be read."""

        def run() -> tuple[object, np.ndarray, np.ndarray]:
            table.write(self.slots, self.new)
            return table, self.slots, self.new

        return run


def commit(setting: Setting) -> Iterator[Finding]:
    """``write`` of a few scattered slots, whole: it returns when they are durable."""
    memory = Memory.make(setting, "commits", *normal(setting.size(1 << 20, 1 << 12), 64, 64, seed=3))
    rows, absent = rows_of(memory), missing(LMDB)
    tables = {"own": Own(memory), RAW: Raw(setting.folder / "raw")}
    if not absent:
        tables[LMDB] = Lmdb(setting.folder / "lmdb", rows)
    draw = Draw(rows)
    for count, goal in GOALS.items():
        contest = Contest(
            f"durable commit of {count} scattered slot{'s' * (count > 1)}",
            draw.commit(tables["own"]),
            _was_written,
            before=lambda count=count: draw.next(count),
        )
        for name in (RAW, LMDB):
            if name in tables:
                contest.enter(name, draw.commit(tables[name]))
            else:
                contest.lacks(name, absent)
        contest.run(setting.seconds)
        yield contest.against(RAW, most(1.3))
        yield contest.against(LMDB, goal)
    for table in tables.values():
        table.close()
    _check_whole(memory)
    for name in ("commits", "lmdb"):
        shutil.rmtree(setting.folder / name, ignore_errors=True)
    (setting.folder / "raw").unlink()


def _was_written(found: tuple) -> None:
    table, slots, new = found
    same(torch.from_numpy(table.read(slots)), torch.from_numpy(new))


def _check_whole(memory: Memory) -> None:
    """Every row of the store is one that was written, and its checksums are right."""
    with MemoryStore.open(memory.path) as store:
        if store.verify() or len(store) != len(memory.keys):
            raise Wrong("the store is damaged after its commits")


ROWS = {"commit": commit}
