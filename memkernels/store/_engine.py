"""The present of a store in one process: page tables, bitmaps, rows that wait in the log, and pages in memory.

A slot's row is that of its page on disk, then those of later commits in the log, in order. Frames of a tier always hold
the result. A reader follows commits of the writer: :meth:`Engine.refresh` looks at ``PRAGMA data_version``, and loads
what changed in one consistent view.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _io, _log, _mark
from ._bitmap import Bitmap
from ._columns import DTYPES, Column, Pages
from ._copies import Copies, usable
from ._database import ABSENT, BLOCK, COLUMNS, ENTRY, MAP_BLOCK, MAPS, Database
from ._errors import StoreDamaged, StoreError
from ._extents import PageFile, Pin, oldest_pin
from ._log import ALIVE, DEAD, KEYS, VALUES, Change, Pending
from ._tiers import DeviceTier, Tier, frames_for

CPU = torch.device("cpu")
READERS = 4  # threads that read pages


class TornPage(StoreDamaged):
    """A page is not what the table says: damaged, or rewritten since a reader loaded its table."""

    def __init__(self, sentence: str, column: str, page: int, extent: int):
        super().__init__(sentence)
        self.column, self.page, self.extent = column, page, extent


def columns_of(state: dict) -> dict[str, Column]:
    return {
        name: Column(name, state[f"{name}_dim"], DTYPES[state[f"{name}_dtype"]], state["page_slots"])
        for name in COLUMNS
    }


class Engine:
    autocast = False  # was it on where the call came from?
    staged: list[Change] | None = None  # what the open transaction of a writer has done

    def __init__(self, path: Path, mode: str, ram_bytes: int | None, snapshot: str | None, durability: str):
        self.path, self.mode, self.durability = path, mode, durability
        self.process = os.getpid()
        self.lock = threading.RLock()  # calls of one store run one at a time
        self.closed = False
        self.lock_fd = self.mark_fd = -1
        self.pin: Pin | None = None
        self.pool: ThreadPoolExecutor | None = None
        self.files: dict[str, PageFile] = {}
        self.tiers: dict[str, Tier] = {}
        self.device_tiers: dict[str, DeviceTier] = {}
        self.copies: Copies | None = None  # to the device that keeps pages too
        self.reads = self.commits = self.log_written = 0
        self.buffers: dict[str, deque[Pages]] = {}  # rings of scans and of copies to the device
        self.kept: dict[tuple[str, ...], tuple] = {}  # what searches on the device made, and what they made it from
        self.index: tuple | None = None  # file and contents of the approximate index
        self.recent: Any = None  # what changed since it was built, as _index keeps it
        self.indexed: set[str] = set()  # fields of metadata that have an index
        self.seen = -1  # data_version of what is loaded
        if mode == "w":
            self.lock_fd = _io.lock(
                path / "writer.lock", f"{path}: is open for writing elsewhere; close that, or open with mode='r'"
            )
        try:
            (path / "readers").mkdir(exist_ok=True)  # an empty folder is easily lost in a copy
            if mode == "r":
                self.pin = Pin(path)
            marked = _mark.check(path)
            closed = mode == "w" and _mark.closed(path)
            if mode == "w":
                self.mark_fd = _mark.open_for_writing(path, marked)
            self.db = Database(path, mode, durability)
            with self.db.reading():
                self.snapshot, self.state = self.db.state(snapshot)
                self.db.check_schema()
            self.columns = columns_of(self.state)
            self.page_slots = self.state["page_slots"]
            self.frames = frames_for(list(self.columns.values()), ram_bytes)
            self.files = {c.name: PageFile(path, c, mode == "w") for c in self.columns.values()}
            self.tiers = {c.name: Tier(c, Pages(c, self.frames)) for c in self.columns.values()}
            self._forget()
            self.load()
            if not self.snapshot and self.generation < marked:
                raise StoreDamaged(
                    f"index.db-wal: ends at generation {self.generation}, and generation {marked} was acknowledged; "
                    "restore a backup"
                )
            if mode == "w":
                self.db.check_writable()
                if not closed:
                    self.db.check_trees()
                    self.db.sync_log()
                self._find_space()
        except BaseException:
            self.release()
            raise

    def place(self, device, device_bytes: int) -> None:
        """Keep pages on a device too."""
        if device is None:
            if device_bytes:
                raise ValueError(f"open: device_bytes must come with a device, got {device_bytes} without one")
            return
        found = usable(device)
        if device_bytes == 0:
            return
        frames = frames_for(list(self.columns.values()), device_bytes, "device_bytes")
        self.copies = Copies(found)
        self.device_tiers = {c.name: DeviceTier(c, frames, self.copies) for c in self.columns.values()}
        for tier in self.device_tiers.values():
            tier.grow(len(self.tables["keys"]))

    def home(self, x: torch.Tensor) -> torch.device:
        """Where a call on ``x`` runs: on the device that keeps pages where ``x`` lies there, else on the CPU."""
        return x.device if self.on_device(x.device) else CPU

    @property
    def default(self) -> torch.device:
        """Where rows go that a caller names by plain numbers."""
        return CPU if self.copies is None else self.copies.device

    def on_device(self, device: torch.device | None) -> bool:
        """Has the store pages on ``device``?"""
        return self.copies is not None and device == self.copies.device

    def tier(self, name: str, device: torch.device | None) -> Tier:
        return self.device_tiers[name] if self.on_device(device) else self.tiers[name]

    def _forget(self) -> None:
        self.generation = self.version = -1
        self.capacity = 0
        self.tables = {name: np.zeros(0, ENTRY) for name in COLUMNS}
        self.maps = {name: Bitmap() for name in MAPS}
        self.pending = {name: Pending() for name in COLUMNS}
        self.log_sizes: deque[tuple[int, int]] = deque()  # seq and bytes of the commits in the log
        self.log_bytes = 0

    def release(self) -> None:
        """Close what is open; writes nothing."""
        if self.pool is not None:
            self.pool.shutdown()
        for tier in self.device_tiers.values():
            tier.pages.free()
        self.buffers.clear()
        self.kept.clear()
        for file in self.files.values():
            file.close()
        if hasattr(self, "db"):
            self.db.close()
        if self.pin is not None:
            self.pin.close()
        for fd in (self.mark_fd, self.lock_fd):
            if fd >= 0:
                os.close(fd)

    # --- generations ---

    def mark(self) -> None:
        """Where the system refuses, the mark before stays: it is right too, and the commit is durable without one."""
        with contextlib.suppress(OSError):
            os.pwrite(self.mark_fd, _mark.Mark(self.generation).pack(), 0)

    def refresh(self, force: bool = False) -> None:
        """See what other processes committed."""
        if self.mode == "w" or self.snapshot:
            return
        version = self.db.data_version()
        if version != self.seen or force:
            self.load()
            self.seen = version

    def load(self) -> None:
        """Load what changed since the last load, in one view of the database."""
        with self.db.reading():
            if not self.snapshot:
                _, self.state = self.db.state()
            state, known = self.state, self.generation
            self._grow(state["capacity"], state["table_blocks"], state["map_blocks"])
            if state["version"] != self.version:
                self._load_maps(state)
                self._load_tables(state, known)
                self.capacity = state["capacity"]
            self.generation = max(known, state["maps_generation"])
            if not self.snapshot:
                self._replay(state, known)
            self.version = state["version"]
        if self.pin is not None:
            self.pin.set(self.version)

    def _grow(self, capacity: int, table_blocks: int = 0, map_blocks: int = 0) -> None:
        """Room for that many slots and blocks. A writer has blocks ahead, or from before a compaction."""
        pages = max(-(-capacity // self.page_slots), table_blocks * BLOCK)
        for name, table in self.tables.items():
            if pages > len(table):
                size = -(-max(pages, len(table) * 5 // 4) // BLOCK) * BLOCK
                self.tables[name] = np.empty(size, ENTRY)
                self.tables[name][: len(table)] = table
                self.tables[name][len(table) :] = (ABSENT, 0, 0)
            for tiers in (self.tiers, self.device_tiers):
                if name in tiers:
                    tiers[name].grow(len(self.tables[name]))
        for bitmap in self.maps.values():
            bitmap.grow(max(capacity, map_blocks * MAP_BLOCK))

    def _load_maps(self, state: dict) -> None:
        for kind, name in enumerate(MAPS):
            bitmap, found = self.maps[name], 0
            blobs = self.db.blobs("maps", kind, self.version, self.snapshot)
            if self.version < 0:
                blocks, alike, blobs = self.db.whole_map(kind, self.snapshot)
                if len(blocks):
                    self._check_block(name, int(blocks.max()), 1)
                    bitmap.load_alike(blocks, alike)
                found += len(blocks)
            for block, blob in blobs:
                self._check_block(name, block, len(blob))
                bitmap.load_block(block, blob)
                found += 1
            if self.version < 0 and found != state["map_blocks"]:
                raise StoreDamaged(f"index.db: maps: has {found} blocks of {name}, not {state['map_blocks']}")
        if self.version < 0 and self.maps["live"].count != state["live"]:
            raise StoreDamaged(f"index.db: maps: {self.maps['live'].count} slots live, not {state['live']}")

    def _check_block(self, name: str, block: int, size: int) -> None:
        if size not in (1, MAP_BLOCK // 8) or block >= len(self.maps[name].bytes) * 8 // MAP_BLOCK:
            raise StoreDamaged(f"index.db: maps, block {block} of {name}: its size is wrong")

    def _load_tables(self, state: dict, known: int) -> None:
        for kind, name in enumerate(COLUMNS):
            table, found = self.tables[name], 0
            for block, blob in self.db.blobs("page_table", kind, self.version, self.snapshot):
                if len(blob) != BLOCK * ENTRY.itemsize or (block + 1) * BLOCK > len(table):
                    raise StoreDamaged(f"index.db: page_table, block {block} of {name}: its size is wrong")
                new = np.frombuffer(blob, ENTRY)
                old = table[block * BLOCK : (block + 1) * BLOCK]
                for at in np.flatnonzero(new != old).tolist() if known >= 0 else ():
                    page, generation = block * BLOCK + at, int(new[at]["generation"])
                    self.pending[name].prune(page, generation)
                    if generation > known:
                        self.drop(name, page)
                old[:] = new
                found += 1
            if self.version < 0 and found != state["table_blocks"]:
                raise StoreDamaged(f"index.db: page_table: has {found} blocks of {name}, not {state['table_blocks']}")

    def _replay(self, state: dict, known: int) -> None:
        """Take over the commits in the log that are not known yet."""
        if known < 0:
            known = state["log_from"] - 1
        wanted = max(known + 1, state["log_from"])
        for seq, payload in self.db.log(wanted - 1):
            if seq != wanted:
                raise StoreDamaged(f"index.db: log, commit {wanted}: is missing; restore a backup")
            for change in _log.decode(seq, payload, self.columns):
                self.apply(change, seq, maps=seq > state["maps_generation"])
            self._logged(seq, len(payload))
            self.generation = max(self.generation, seq)
            wanted += 1
        if wanted <= state["maps_generation"]:
            raise StoreDamaged(f"index.db: log, commit {wanted}: is missing; restore a backup")

    def apply(self, change: Change, seq: int, maps: bool = True) -> None:
        """What a commit does to slots, in memory."""
        slots = change.slots
        if change.flags & ALIVE and len(slots):
            self._grow(int(slots.max()) + 1)
            self.capacity = max(self.capacity, int(slots.max()) + 1)
        if maps:
            if change.flags & ALIVE:
                self.maps["live"].set(slots)
                self.maps["free"].set(slots, False)
            if change.flags & DEAD:
                self.maps["live"].set(slots, False)
            if change.flags & KEYS:
                self.maps["changed"].set(slots)
        for name, flag in zip(COLUMNS, (KEYS, VALUES)):
            if change.flags & flag:
                self._apply_rows(name, slots, change.rows[name], seq)

    def _apply_rows(self, name: str, slots: np.ndarray, rows: np.ndarray, seq: int) -> None:
        """Rows of a commit, to pages in memory and to what waits for the disk: those that no page there holds yet."""
        tier, pages = self.tiers[name], slots // self.page_slots
        ahead = seq > self.tables[name]["generation"][pages]
        if not ahead.all():
            slots, rows, pages = slots[ahead], rows[ahead], pages[ahead]
        frames, offsets = tier.frame_of[pages], slots - pages * self.page_slots
        here = np.flatnonzero(frames >= 0)
        if len(here):
            tier.pages.patch(frames[here], offsets[here], rows[here])
        for page, group in _log.by_page(slots, self.page_slots):
            self.pending[name].add(seq, page, offsets[group], rows[group])
            if self.device_tiers:
                self.device_tiers[name].drop(page)

    def _logged(self, seq: int, size: int) -> None:
        self.log_sizes.append((seq, size))
        self.log_bytes += size

    def _find_space(self) -> None:
        """Which extents nothing names."""
        for name, pinned in self.pinned().items():
            self.files[name].used(named(self.tables[name]), pinned, self.version)

    def pinned(self) -> dict[str, np.ndarray]:
        """The extents that snapshots name, sorted."""
        with self.db.reading():
            numbers = [row[0] for row in self.db.execute("SELECT id FROM snapshots").fetchall()]
            return {
                name: np.unique(
                    np.concatenate(
                        [
                            np.zeros(0, np.int64),
                            *(
                                named(np.frombuffer(blob, ENTRY))
                                for number in numbers
                                for _, blob in self.db.blobs("page_table", kind, snapshot=number)
                            ),
                        ]
                    )
                )
                for kind, name in enumerate(COLUMNS)
            }

    def oldest(self) -> int:
        return oldest_pin(self.path, none=1 << 62)

    # --- pages ---

    def fill(self, name: str, page: int, pages: Pages, at: int) -> None:
        """Put the present rows of a page into memory, checked."""
        self.fill_run(name, [page], pages, at)

    def fill_run(self, name: str, numbers: list[int], pages: Pages, at: int) -> None:
        """:meth:`fill` of several into pages in a row; extents in a row are one read."""
        file, entries = self.files[name], self.tables[name][numbers]
        extents = entries["extent"].astype(np.int64)
        cuts = np.flatnonzero((np.diff(extents) != 1) | (extents[1:] == ABSENT) | (extents[:-1] == ABSENT)) + 1
        for first, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)]):
            if extents[first] == ABSENT:
                pages.clear(at + first)
                continue
            found = file.read_run(int(extents[first]), stop - first, pages, at + first)
            for i, (got, crc) in enumerate(found, first):
                if got != file.size or crc != entries[i]["crc"]:
                    raise self._torn(name, numbers[i], entries[i], got, crc)
        for i, page in enumerate(numbers):
            for _, offsets, rows in self.pending[name].pages.get(page, ()):
                pages.patch(at + i, offsets, rows)

    def _torn(self, name: str, page: int, entry: np.void, got: int, crc: int) -> TornPage:
        file, extent = self.files[name], int(entry["extent"])
        why = f"ends after {got} bytes" if got != file.size else f"crc32c is {crc:08x}, not {entry['crc']:08x}"
        return TornPage(f"{file.name}: page {page} (extent {extent}): {why}; restore a backup", name, page, extent)

    def fill_many(self, name: str, numbers: list[int], pages: Pages, ats: list[int]) -> None:
        """:meth:`fill` by several threads."""
        if len(numbers) == 1:
            return self.fill(name, numbers[0], pages, ats[0])
        jobs = [self.threads().submit(self.fill, name, n, pages, at) for n, at in zip(numbers, ats)]
        wait(jobs)  # all, also where one failed: none may write to a frame that was given away
        for job in jobs:
            job.result()

    def threads(self) -> ThreadPoolExecutor:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(READERS, thread_name_prefix="memkernels-store")
        return self.pool

    def resident(self, name: str, numbers: list[int]) -> None:
        """Bring pages into the tier; at most as many as it has frames."""
        tier = self.tiers[name]
        frames = tier.take(numbers)
        try:
            self.fill_many(name, numbers, tier.pages, frames)
        except BaseException:
            for page in numbers:
                tier.drop(page)
            raise
        tier.bytes_copied += len(numbers) * tier.page_bytes

    def buffer(self, name: str, count: int) -> Pages:
        """The next buffer of a ring of two, of ``count`` pages, once the copies out of it are done."""
        if name not in self.buffers:
            self.buffers[name] = deque(Pages(self.columns[name], count, self.copies) for _ in range(2))
        ring = self.buffers[name]
        ring.rotate()
        if name in self.device_tiers:
            self.device_tiers[name].reclaim(ring[0])
        return ring[0]

    def drop(self, name: str, page: int) -> None:
        """Forget what the page held, in memory and on the device."""
        self.tiers[name].drop(page)
        if self.device_tiers:
            self.device_tiers[name].drop(page)

    def check_process(self) -> None:
        if os.getpid() != self.process:
            raise StoreError(f"{self.path}: was opened in another process, before a fork; open it in this one")


def named(table: np.ndarray) -> np.ndarray:
    """The extents that a part of a page table names."""
    extents = table["extent"].astype(np.int64)
    return extents[extents != ABSENT]
