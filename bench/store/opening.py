"""Opening a store of a billion slots: its page table as blobs, against the same table as rows of SQLite."""

from __future__ import annotations

import gc
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from memkernels.store import MemoryStore
from memkernels.store._database import ENTRY

from ..contests.contest import Contest
from ..contests.finding import TOLD, Finding, Wrong, most
from . import sparse
from .setting import Setting

ROWS_OF_SQLITE = "a row per page"
DIM = 64


def make_rows(path: Path, entries: np.ndarray) -> None:
    """The page table of both columns, a row per page."""
    with sqlite3.connect(path) as sql:
        sql.execute("CREATE TABLE page(id INTEGER PRIMARY KEY, extent INTEGER, crc INTEGER, generation INTEGER)")
        columns = [entries[name].tolist() for name in ENTRY.names]
        for kind in range(2):
            numbers = range(kind * len(entries), (kind + 1) * len(entries))
            sql.executemany("INSERT INTO page VALUES(?, ?, ?, ?)", zip(numbers, *columns))
    sql.close()


def load_rows(path: Path) -> np.ndarray:
    sql = sqlite3.connect(path)
    found = np.array(sql.execute("SELECT extent, crc, generation FROM page ORDER BY id").fetchall(), dtype=ENTRY)
    sql.close()
    return found


def opening(setting: Setting) -> Iterator[Finding]:
    """Opening a store of 10^9 slots to read, and closing it."""
    slots, size = setting.size(10**9, 10**5 + 3), setting.page_slots
    path, rows = setting.folder / "billion", setting.folder / "rows.db"
    real = np.random.default_rng(7).choice(slots // size, 5, replace=False)
    entries = sparse.make(path, slots, DIM, size, real)
    make_rows(rows, entries)

    def own() -> Path:
        MemoryStore.open(path).close()
        return path

    def check(found) -> None:
        if isinstance(found, Path):
            _check_store(path, slots, size, real)
        elif not np.array_equal(found, np.tile(entries, 2)):
            raise Wrong("the rows are not those of the table")

    contest = Contest(f"opening {slots:,} slots".replace(",", " "), own, check, before=gc.collect)
    contest.enter(ROWS_OF_SQLITE, lambda: load_rows(rows))
    contest.run(setting.seconds)
    told = contest.against(ROWS_OF_SQLITE, TOLD, clock="processor")
    yield Finding(told.what, "", most(0.1, "s"), told.own, told.own, clock="processor", samples=told.samples)
    yield told
    shutil.rmtree(path)
    rows.unlink()


def _check_store(path: Path, slots: int, size: int, real: np.ndarray) -> None:
    """Real pages hold their number, others zeros, and every slot lives."""
    with MemoryStore.open(path, ram_bytes=1 << 28) as store:
        if len(store) != slots:
            raise Wrong(f"{len(store)} slots are live, not {slots}")
        pages = np.append(real, [p for p in np.random.default_rng(8).integers(slots // size, size=64) if p not in real])
        wanted = torch.from_numpy(np.where(np.isin(pages, real), pages, 0)).float()
        got = store.gather(torch.from_numpy(pages * size + size // 3))
        if not got.eq(wanted.unsqueeze(1)).all():
            raise Wrong("a slot does not hold what its page does")


ROWS = {"open": opening}
