"""Mutants: stores with one fault each, to see that the laboratory finds it. A mutant lives in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memkernels.store import _columns, _database, _engine, _extents, _mark, _writer

from . import flips, kills, power, readers, refusals
from .judge import Broken, forked, status_of
from .shim import Shim

FOUND = 3  # exit status of a mutant that was found


def pages_without_a_sync() -> None:
    _extents.PageFile.sync = lambda self: None


def commits_without_a_sync() -> None:
    real = _database.Database.__init__

    def connect(self, *args) -> None:
        real(self, *args)
        self.execute("PRAGMA synchronous=OFF")

    _database.Database.__init__ = connect


def pages_without_a_checksum() -> None:
    _columns.Pages.crc = lambda self, at, padding: 0


def rows_of_the_log_without_a_checksum() -> None:
    def log(self, after: int):
        yield from self.execute("SELECT seq, payload FROM log WHERE seq > ? ORDER BY seq", (after,))

    _database.Database.log = log


def a_lost_end_of_the_log_taken_for_the_end() -> None:
    _mark.check = lambda directory: 0


def extents_used_again_before_the_commit() -> None:
    real = _writer.Writer.publish

    def publish(self, pages: dict, *args, **options) -> None:
        for name, numbers in pages.items():
            old = self.tables[name]["extent"][numbers].astype(np.int64)
            self.files[name].release(np.setdiff1d(old[old != _database.ABSENT], self.files[name].pinned).tolist())
        real(self, pages, *args, **options)

    _writer.Writer.publish = publish
    _extents.PageFile.retire = lambda self, extents, version: None


def extents_used_again_before_a_sync_of_batches() -> None:
    _writer.Writer.oldest = _engine.Engine.oldest


def extents_used_again_under_readers() -> None:
    _engine.Engine.oldest = lambda self: 1 << 62


def a_commit_in_several_transactions() -> None:
    _database.Database.begin = _database.Database.commit = lambda self: None


def a_refusal_after_the_commit() -> None:
    def mark(self) -> None:
        os.pwrite(self.mark_fd, _mark.Mark(self.generation).pack(), 0)

    _engine.Engine.mark = mark


def _batches(shim: Shim, folder: Path) -> dict:
    power.BATCH = 1
    return power.run(shim, folder, 400, "0")


def _rows_of_the_log(shim: Shim, folder: Path) -> dict:
    flips.Sound.every_bit = (
        lambda self: (  # as many as it takes, of these rows alone
            (flips.DATABASE, 8 * (self.files[flips.DATABASE].rfind(row) + byte))
            for row in self.rows()[2:]
            for byte in range(len(row))
        )
    )
    return flips.run(shim, folder, 0, "0", None, ("killed after a checkpoint",))


MUTANTS: dict[Callable[[], None], Callable[[Shim, Path], Any]] = {
    pages_without_a_sync: lambda shim, folder: power.run(shim, folder, 300, "0"),
    commits_without_a_sync: lambda shim, folder: power.run(shim, folder, 100, "0"),
    pages_without_a_checksum: lambda shim, folder: flips.run(shim, folder, 300, "0", 0, ("closed",)),
    rows_of_the_log_without_a_checksum: lambda shim, folder: _rows_of_the_log(shim, folder),
    a_lost_end_of_the_log_taken_for_the_end: lambda shim, folder: flips.run(shim, folder, 300, "0", 0, ("killed",)),
    extents_used_again_before_the_commit: lambda shim, folder: kills.run(shim, folder, 100, "0"),
    extents_used_again_before_a_sync_of_batches: _batches,
    extents_used_again_under_readers: lambda shim, folder: readers.run(shim, folder, 5),
    a_commit_in_several_transactions: lambda shim, folder: kills.run(shim, folder, 60, "0"),
    a_refusal_after_the_commit: lambda shim, folder: refusals.run(shim, folder, 200, "0"),
}


def _hunt(change: Callable[[], None], look: Callable[[Shim, Path], Any], shim: Shim, folder: Path) -> None:
    folder.mkdir()
    change()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what its own processes have to say
    try:
        look(shim, folder)
    except Broken:
        os._exit(FOUND)


def run(shim: Shim, folder: Path) -> dict:
    for change, look in MUTANTS.items():
        there = folder / change.__name__
        if status_of(forked(lambda change=change, look=look, there=there: _hunt(change, look, shim, there))) != FOUND:
            raise Broken(f"nobody noticed {change.__name__.replace('_', ' ')}")
    return {"mutants": len(MUTANTS), "found": len(MUTANTS)}
