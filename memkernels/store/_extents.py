"""keys.pages, values.pages: raw extents of a multiple of 4 KiB, one page each, never changed while anything names them.

Extent e lies at e times the size of an extent. A page is rewritten into another extent; the old one is free again when
no reader of an earlier version of the page table is left (``Pin``), and no snapshot names it.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import struct
from pathlib import Path

import numpy as np

from . import _io
from ._columns import Column, Pages
from ._errors import StoreError


class PageFile:
    """One file. ``open`` for a reader too; what allocates is the writer's."""

    def __init__(self, directory: Path, column: Column, writable: bool):
        self.column, self.name = column, f"{column.name}.pages"
        self.size = column.extent_bytes
        path = directory / self.name
        self.fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        self.direct = _open_direct(path) if column.direct else None
        self.end = 0  # extents that the file has, or that were handed out
        self.free: list[int] = []  # heap
        self.waiting: list[tuple[int, np.ndarray]] = []  # version that freed them, extents
        self.pinned = np.zeros(0, dtype=np.int64)  # sorted; named by snapshots
        self.bytes_read = self.bytes_written = 0

    def close(self) -> None:
        os.close(self.fd)
        if self.direct is not None:
            os.close(self.direct)

    # --- pages ---

    def read_run(self, extent: int, count: int, pages: Pages, at: int) -> list[tuple[int, int]]:
        """:meth:`read` of extents in a row into pages in a row."""
        if self.size != self.column.slots * self.column.row_bytes:
            return [self.read(extent + i, pages, at + i) for i in range(count)]
        got = self._fill([pages.bytes[at : at + count].reshape(-1)], extent)
        return [(min(max(got - i * self.size, 0), self.size), pages.crc(at + i, b"")) for i in range(count)]

    def read(self, extent: int, pages: Pages, at: int) -> tuple[int, int]:
        """Fill page ``at`` of ``pages``: bytes that the file had, and the crc32c of the whole extent."""
        buffers = pages.parts(at)
        whole = sum(len(b) for b in buffers)
        pad = bytearray(self.size - whole)
        if pad:
            buffers.append(pad)
        got = self._fill(buffers, extent)
        return got, pages.crc(at, pad)

    def _fill(self, buffers: list, extent: int) -> int:
        """Fill buffers from an extent on; returns how many bytes the file had."""
        try:
            got = _io.read_into(self.fd if self.direct is None else self.direct, buffers, extent * self.size)
        except OSError as error:
            raise StoreError(f"{self.name}: extent {extent}: the system refused to read ({error.strerror})") from error
        self.bytes_read += got
        return got

    def write(self, extent: int, pages: Pages, at: int) -> int:
        """Write page ``at`` of ``pages`` without a sync; returns its crc32c."""
        offset = extent * self.size
        for part in pages.parts(at):
            offset += _io.write_all(self.fd, part, offset)
        if pad := self.size - (offset - extent * self.size):
            _io.write_all(self.fd, bytes(pad), offset)
        self.bytes_written += self.size
        return pages.crc(at, bytes(pad))

    def sync(self) -> None:
        os.fdatasync(self.fd)

    # --- space ---

    def used(self, now: np.ndarray, snapshots: np.ndarray, version: int) -> None:
        """Say which extents the page table and snapshots name; any other waits for readers of ``version``."""
        size = os.fstat(self.fd).st_size
        self.pinned = snapshots
        named = np.union1d(now, self.pinned)
        self.end = max(-(-size // self.size), int(named[-1]) + 1 if len(named) else 0)
        rest = np.setdiff1d(np.arange(self.end), named, assume_unique=True)
        self.free, self.waiting = [], [(version, rest)] if len(rest) else []

    def allocate(self, count: int, oldest) -> list[int]:
        """Extents to write to. ``oldest()`` is the earliest version of the page table that any reader holds."""
        if len(self.free) < count:
            self.collect(oldest)
        taken = [heapq.heappop(self.free) for _ in range(min(count, len(self.free)))]
        more = count - len(taken)
        taken += range(self.end, self.end + more)
        self.end += more
        return taken

    def collect(self, oldest) -> None:
        """Take back the extents that no reader can need."""
        if self.waiting:
            held = oldest()
            for version, extents in self.waiting:
                if version <= held:
                    self.release(extents.tolist())
            self.waiting = [w for w in self.waiting if w[0] > held]

    def release(self, extents: list[int]) -> None:
        """Extents that were allocated and then named by nothing."""
        for extent in extents:
            heapq.heappush(self.free, extent)

    def retire(self, extents: np.ndarray, version: int) -> None:
        """Extents that the page table names no more since ``version``."""
        extents = np.setdiff1d(extents, self.pinned)
        if len(extents):
            self.waiting.append((version, extents))

    def shrink(self, oldest) -> int:
        """Cut free extents off the end of the file; returns the bytes given back."""
        self.collect(oldest)
        free = sorted(self.free)
        before = self.end
        while free and free[-1] == self.end - 1:
            free.pop()
            self.end -= 1
        self.free = free
        size = os.fstat(self.fd).st_size
        if size > self.end * self.size:
            os.ftruncate(self.fd, self.end * self.size)
            os.fsync(self.fd)
        return (before - self.end) * self.size


def _open_direct(path: Path) -> int | None:
    """Past the system's cache, where the file system can."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return None


class Pin:
    """A reader's word on the earliest version of the page table that it may use: 8 bytes in a locked file of its own.

    The lock tells whether the reader is alive. A word only rises, and is written before the version is read, so it is
    never later than what is used.
    """

    def __init__(self, directory: Path, version: int = 0):
        folder = directory / "readers"
        while True:
            self.path = folder / f"{os.getpid()}-{os.urandom(6).hex()}"
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if self.path.exists():  # else a writer found it before it was locked, and took it for a dead one's
                break
            os.close(self.fd)
        self.set(version)

    def set(self, version: int) -> None:
        os.pwrite(self.fd, struct.pack("<q", version), 0)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.fd)


def oldest_pin(directory: Path, none: int) -> int:
    """The earliest version that a living reader holds, ``none`` where there is none. Removes files of dead ones."""
    oldest = none
    for path in (directory / "readers").iterdir():
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            word = os.pread(fd, 8, 0)
            oldest = min(oldest, struct.unpack("<q", word)[0] if len(word) == 8 else 0)
        finally:
            os.close(fd)
    return oldest
