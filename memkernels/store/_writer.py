"""Commits. A small one is a row of the log and one sync; a large one is pages, a sync, then the table and one sync.

    small:  log row, COMMIT                                                       (durable when COMMIT returns)
    large:  pages into free extents, fdatasync, then page_table, maps, state, an empty log row, COMMIT
    fold:   the same as large without a log row, for pages that the log is ahead of, then those rows of the log go

Pages are durable before a table names them. What is in memory changes before the commit, so that a transaction reads
its own writes, and is undone where the commit fails.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _io, _log, _mark
from ._columns import Pages
from ._database import ABSENT, BLOCK, COLUMNS, ENTRY, FILE, MAP_BLOCK, MAPS, text_crc, translated
from ._engine import Engine
from ._errors import StoreError
from ._log import ALIVE, DEAD, Change

SMALL = 1 << 20  # bytes of a commit that goes to the log
FOLD_BYTES = 16 << 20  # the log is folded in the background from here
FOLD_COMMITS = 4096
STEP = 64  # pages of a column that one step of a fold rewrites
PRESSURE = 4  # times as much log, and a commit folds before it begins


class Writer(Engine):
    staged: Any  # typed in Engine; a list in all that runs within a transaction
    undo: list[tuple[Change, np.ndarray, int]]  # change, numbers that it took from those given back, capacity before

    def __init__(self, *args) -> None:
        self.folder: threading.Thread | None = None
        self.settled = -1  # version of the page table that is known to be durable
        super().__init__(*args)
        self.settled = self.version

    # --- transactions ---

    def begin(self) -> None:
        while self._ahead(PRESSURE):
            self.fold(STEP)
        self.settle()
        self.db.begin()
        self.staged, self.undo, self.touched, self.doomed = [], [], False, False
        self.seq = self.generation + 1

    def settle(self) -> None:
        """With durability="batch": make the last table durable, before extents that it freed are used again."""
        if self.durability == "batch" and self.settled < self.version and self.db.checkpoint():
            self.settled = self.version

    def unsettle(self) -> None:
        """The last commit freed extents without a new version: with durability="batch" it may not be durable yet."""
        self.settled = min(self.settled, self.version - 1)

    def oldest(self) -> int:
        return super().oldest() if self.durability == "commit" else min(super().oldest(), self.settled)

    def stage(self, change: Change) -> None:
        slots = change.slots
        before = self.capacity
        if change.flags & ALIVE and len(slots):
            self._grow(int(slots.max()) + 1)
        self.undo.append((change, slots[self.maps["free"].has(slots)], before))
        self.staged.append(change)
        self.apply(change, self.seq)

    def commit(self) -> None:
        if not self.staged and not self.touched:
            self.db.rollback()
            self.staged = None
            return
        try:
            if sum(change.bytes for change in self.staged) <= SMALL:
                payload = _log.encode(self.staged)
                with translated():
                    self.db.put_log(self.seq, payload)
                self.db.commit()
                self._logged(self.seq, len(payload))
                self.log_written += len(payload)
            else:
                pages = {name: self._touched_pages(name) for name in COLUMNS}
                self.publish(pages, self.seq, commit=True)
        except BaseException:
            self.abort()
            raise
        self.staged = None
        self.generation = self.seq
        self.commits += 1
        if self.durability == "commit":
            self.mark()
        if self._ahead(1):
            self._fold_in_background()

    def abort(self) -> None:
        """Undo what was staged, on disk and in memory."""
        self.db.rollback()
        for change, freed, capacity in reversed(self.undo):
            if change.flags & ALIVE:
                self.maps["live"].set(change.slots, False)
                self.maps["free"].set(freed)
                self.capacity = capacity
            if change.flags & DEAD:
                self.maps["live"].set(change.slots)
        for name in COLUMNS:
            for page in self.pending[name].drop(self.seq):
                self.drop(name, page)
        self.staged = None

    def numbers(self, count: int) -> np.ndarray:
        """Numbers for new slots: those that a compaction gave back, then new ones."""
        free = self.maps["free"]
        back = free.slots()[:count] if free.count else np.zeros(0, np.int64)
        return np.concatenate([back, np.arange(self.capacity, self.capacity + count - len(back), dtype=np.int64)])

    def put_meta(self, slots: np.ndarray, docs: list[str]) -> None:
        self.touched = True
        rows = [(slot, doc, text_crc(slot, doc)) for slot, doc in zip(slots.tolist(), docs)]
        with translated():
            self.db.sql.executemany("INSERT OR REPLACE INTO meta VALUES(?, ?, ?)", rows)

    def drop_meta(self, slots: np.ndarray) -> None:
        with translated():
            if self.db.execute("SELECT EXISTS(SELECT 1 FROM meta)").fetchone()[0]:
                self.db.sql.executemany("DELETE FROM meta WHERE slot = ?", [(slot,) for slot in slots.tolist()])

    # --- pages ---

    def _touched_pages(self, name: str) -> list[int]:
        slots = [c.slots for c in self.staged if name in c.rows]
        return np.unique(np.concatenate(slots) // self.page_slots).tolist() if slots else []

    def _write_pages(self, name: str, numbers: list[int], extents: list[int], generation: int) -> np.ndarray:
        """The present rows of pages into extents that nothing names; returns their entries."""
        file, tier = self.files[name], self.tiers[name]
        scratch = Pages(self.columns[name], 1)
        entries = np.zeros(len(numbers), ENTRY)
        for i, (page, extent) in enumerate(zip(numbers, extents)):
            frame = int(tier.frame_of[page])
            if frame < 0:
                self.fill(name, page, scratch, 0)
            crc = file.write(extent, *((scratch, 0) if frame < 0 else (tier.pages, frame)))
            entries[i] = (extent, crc, generation)
        return entries

    def publish(
        self,
        pages: dict[str, list[int]],
        generation: int,
        commit: bool = False,
        also: Callable[[], object] | None = None,
        absent: dict[str, list[int]] | None = None,
    ) -> None:
        """Rewrite ``pages`` and name them in the table, with all bitmaps, as of ``generation``.

        ``commit``: it is the commit of the open transaction. ``also``: what else the same transaction does.
        ``absent``: pages that the table names no more.
        """
        taken: dict[str, list[int]] = {name: [] for name in pages}
        try:
            entries = {}
            with _io.writing("pages"):
                for name, numbers in pages.items():
                    taken[name] = self.files[name].allocate(len(numbers), self.oldest)
                    entries[name] = self._write_pages(name, numbers, taken[name], generation)
                    if gone := (absent or {}).get(name):
                        nothing = np.zeros(len(gone), ENTRY)
                        nothing["extent"], nothing["generation"] = ABSENT, generation
                        entries[name] = np.concatenate([entries[name], nothing])
                for name, numbers in pages.items():
                    if numbers:
                        self.files[name].sync()
            pages = {name: [*numbers, *(absent or {}).get(name, ())] for name, numbers in pages.items()}
            if not commit:
                self.db.begin()
            with translated():
                new = self._put(pages, entries, generation)
                logged = commit and new["log_from"] <= generation  # the log has a row for each commit from there on
                if logged:
                    self.db.put_log(generation, b"")
                self.db.execute("DELETE FROM log WHERE seq < ?", (new["log_from"],))
                if also is not None:
                    also()
            self.db.commit()
        except BaseException:
            self.db.rollback()
            for name, extents in taken.items():
                self.files[name].release(extents)
            raise
        self._published(pages, entries, generation, new)
        if logged:
            self._logged(generation, 0)

    def _put(self, pages: dict, entries: dict, generation: int) -> dict:
        """Blobs and state into the open transaction; returns the state."""
        version = self.version + 1
        for kind, name in enumerate(COLUMNS):
            table = self.tables[name]
            numbers = np.array(pages[name], dtype=np.int64)
            changed = set((numbers // BLOCK).tolist())
            blocks = len(table) // BLOCK
            for block in changed | set(range(self.state["table_blocks"], blocks)):
                new = table[block * BLOCK : (block + 1) * BLOCK].copy()
                inside = numbers // BLOCK == block
                new[numbers[inside] % BLOCK] = entries[name][inside]
                self.db.put_blob("page_table", kind, block, version, new.tobytes())
        map_blocks = 0
        for kind, name in enumerate(MAPS):
            bitmap = self.maps[name]
            map_blocks = len(bitmap.bytes) * 8 // MAP_BLOCK
            for block in bitmap.dirty | set(range(self.state["map_blocks"], map_blocks)):
                self.db.put_blob("maps", kind, block, version, bitmap.block(block))
        waiting = [self.pending[name].first(set(pages[name])) for name in COLUMNS]
        new = {
            **self.state,
            "version": version,
            "capacity": self.capacity,
            "live": self.maps["live"].count,
            "maps_generation": generation,
            "log_from": min([seq for seq in waiting if seq is not None], default=generation + 1),
            "table_blocks": len(self.tables["keys"]) // BLOCK,
            "map_blocks": map_blocks,
        }
        self.db.put_state(new)
        return new

    def _published(self, pages: dict, entries: dict, generation: int, state: dict) -> None:
        """The same in memory, after the commit."""
        for name, numbers in pages.items():
            table = self.tables[name]
            old = table["extent"][numbers].astype(np.int64)
            table[numbers] = entries[name]
            self.files[name].retire(old[old != ABSENT], state["version"])
            for page in numbers:
                self.pending[name].prune(page, generation)
        for bitmap in self.maps.values():
            bitmap.dirty.clear()
        self.state, self.version = state, state["version"]
        while self.log_sizes and self.log_sizes[0][0] < state["log_from"]:
            self.log_bytes -= self.log_sizes.popleft()[1]

    def close_files(self) -> None:
        """Bring everything into pages and index.db, and say what that must be when it is opened again."""
        self.fold_all()
        whole = self.db.checkpoint()
        with _io.writing(_mark.FILE):
            size, crc = _mark.file_crc(self.path / FILE) if whole else (0, 0)
            os.pwrite(self.mark_fd, _mark.Mark(self.generation, size, crc).pack(), 0)
            os.fdatasync(self.mark_fd)

    # --- folding ---

    def _ahead(self, times: int) -> bool:
        """Is the log ``times`` as long as it should be?"""
        return len(self.log_sizes) > times * FOLD_COMMITS or self.log_bytes > times * FOLD_BYTES

    def fold(self, step: int) -> None:
        """Rewrite the pages that have waited longest, ``step`` of each column."""
        self.settle()
        pages = {name: list(self.pending[name].pages)[:step] for name in COLUMNS}
        self.publish(pages, self.generation)

    def fold_all(self) -> None:
        while self.log_sizes:
            self.fold(4 * STEP)

    def _fold_in_background(self) -> None:
        if self.folder is None or not self.folder.is_alive():
            self.folder = threading.Thread(target=self._fold_while_ahead, name="memkernels-store-fold", daemon=True)
            self.folder.start()

    def _fold_while_ahead(self) -> None:
        while True:
            with self.lock:
                if self.closed or not self.log_sizes:
                    return
                try:
                    self.fold(STEP)
                except StoreError:
                    return  # the log still has the rows; a commit under pressure folds itself, and says why it cannot
