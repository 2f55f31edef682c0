"""A disk that loses power: the calls of a trace, replayed, and what may be left of them.

A file has what was synced, then, of the writes and truncations since, each by itself: all of it, nothing, or of a write
any of its pieces of 512 bytes. A directory has the entries that were synced, then any of the creations, renames and
removals since.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

RECORD = struct.Struct("<iiqq")
OPEN, CLOSE, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, NOTE = range(10)
SECTOR = 512


@dataclass(frozen=True)
class Call:
    kind: int
    fd: int
    offset: int  # of a write; the size of a truncation, the flags of an open, the number of a note
    data: bytes

    @property
    def paths(self) -> list[Path]:
        return [Path(os.fsdecode(part)) for part in self.data.split(b"\0")[:-1]]


def calls(trace: Path) -> Iterator[Call]:
    data, at = memoryview(trace.read_bytes()), 0
    while at < len(data):
        kind, fd, offset, size = RECORD.unpack_from(data, at)
        at += RECORD.size
        yield Call(kind, fd, offset, bytes(data[at : at + size]))
        at += size


@dataclass
class File:
    synced: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, int, bytes]] = field(default_factory=list)  # WRITE or TRUNCATE, offset or size, bytes

    def sync(self) -> None:
        for one in self.since:
            _do(self.synced, *one)
        self.since = []

    def left(self, draw: random.Random, kept: float, told: dict) -> bytearray:
        """What a power cut may leave; ``kept``: how likely each call since the sync is there."""
        data = bytearray(self.synced)
        for kind, offset, part in self.since:
            fate = draw.random()
            if fate < kept:
                _do(data, kind, offset, part)
            elif kind == WRITE and fate < kept + (1 - kept) / 2:
                told["writes torn"] += 1
                for first, piece in _pieces(offset, part):
                    if draw.random() < 0.5:
                        _do(data, WRITE, first, piece)
            else:
                told["calls lost"] += 1
        return data


def _do(data: bytearray, kind: int, offset: int, part: bytes) -> None:
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    if kind == TRUNCATE:
        del data[offset:]
    else:
        data[offset : offset + len(part)] = part


def _pieces(offset: int, part: bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of a write that lie in sectors of their own."""
    at = 0
    while at < len(part):
        size = min(SECTOR - (offset + at) % SECTOR, len(part) - at)
        yield offset + at, part[at : at + size]
        at += size


@dataclass
class Folder:
    entries: dict[str, File | Folder] = field(default_factory=dict)  # as processes see them
    synced: dict[str, File | Folder] = field(default_factory=dict)
    since: list[tuple[str, str, File | Folder | None]] = field(default_factory=list)  # gone name, new name, what it is

    def change(self, gone: str, new: str, node: File | Folder | None) -> None:
        self.since.append((gone, new, node))
        _enter(self.entries, gone, new, node)

    def sync(self) -> None:
        self.synced, self.since = dict(self.entries), []

    def left(self, draw: random.Random, kept: float, told: dict) -> dict[str, File | Folder]:
        entries = dict(self.synced)
        for one in self.since:
            if draw.random() < kept:
                _enter(entries, *one)
            else:
                told["entries lost"] += 1
        return entries


def _enter(entries: dict, gone: str, new: str, node: File | Folder | None) -> None:
    entries.pop(gone, None)
    if node is not None:
        entries[new] = node


class Disk:
    """What is under ``root``, an empty directory when the trace begins."""

    def __init__(self, root: Path):
        self.root, self.top = root, Folder()
        self.open: dict[int, File | Folder] = {}

    def _folder(self, path: Path) -> Folder:
        node: File | Folder = self.top
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            node = node.entries[name]
        assert isinstance(node, Folder), path
        return node

    def take(self, call: Call) -> None:
        if call.kind == OPEN:
            (path,) = call.paths
            if path == self.root:
                self.open[call.fd] = self.top
                return
            folder = self._folder(path.parent)
            if path.name not in folder.entries:
                folder.change("", path.name, File())
            node = self.open[call.fd] = folder.entries[path.name]
            if call.offset & os.O_TRUNC and isinstance(node, File):
                node.since.append((TRUNCATE, 0, b""))
        elif call.kind == CLOSE:
            del self.open[call.fd]
        elif call.kind in (WRITE, TRUNCATE):
            self.open[call.fd].since.append((call.kind, call.offset, call.data))
        elif call.kind == SYNC:
            self.open[call.fd].sync()
        elif call.kind == RENAME:
            old, new = call.paths
            assert old.parent == new.parent, call.paths
            folder = self._folder(old.parent)
            folder.change(old.name, new.name, folder.entries[old.name])
        elif call.kind == MKDIR:
            (path,) = call.paths
            self._folder(path.parent).change("", path.name, Folder())
        else:
            assert call.kind in (UNLINK, RMDIR), call.kind
            (path,) = call.paths
            self._folder(path.parent).change(path.name, "", None)

    def cut(self, draw: random.Random, to: Path, told: dict) -> None:
        """Write into an empty directory what a power cut now may leave."""
        kept = draw.choice([0.0, 0.3, 0.6, 0.9, 1.0])
        _lay(self.top, to, draw, kept, told)


def _lay(folder: Folder, to: Path, draw: random.Random, kept: float, told: dict) -> None:
    for name, node in folder.left(draw, kept, told).items():
        if isinstance(node, Folder):
            (to / name).mkdir()
            _lay(node, to / name, draw, kept, told)
        elif not name.endswith("-shm"):  # memory of SQLite's processes
            (to / name).write_bytes(node.left(draw, kept, told))
