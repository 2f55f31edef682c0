"""generation.mark: what index.db must hold, kept outside it. 24 bytes, little endian.

    generation uint64, size uint64 and crc32c uint32 of the whole of index.db, crc32c uint32 of the 20 bytes before

SQLite drops the end of a write-ahead log that does not read, and with it commits that were acknowledged: the generation
here tells. It is written without a sync after each commit, so it is never later than what is durable. Size and checksum
are those of a store that was closed; they are 0 while it is open for writing, and after a crash.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from ._crc import crc32c
from ._database import FILE as DATABASE
from ._errors import StoreDamaged

FILE = "generation.mark"
WORD = struct.Struct("<QQI")
STEP = 1 << 24  # bytes that a checksum of a whole file reads at once


class Mark(NamedTuple):
    generation: int = 0
    size: int = 0
    crc: int = 0

    def pack(self) -> bytes:
        word = WORD.pack(*self)
        return word + struct.pack("<I", crc32c(word))


def read(directory: Path) -> Mark | None:
    """None where there is none: whoever knows that index.db is good may remove the file."""
    try:
        data = (directory / FILE).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != WORD.size + 4 or struct.unpack("<I", data[-4:])[0] != crc32c(data[:-4]):
        raise StoreDamaged(
            f"{FILE}: its crc32c is wrong; where index.db is known to be good, remove {directory / FILE}"
        )
    return Mark(*WORD.unpack(data[:-4]))


def write(directory: Path, mark: Mark) -> None:
    """Into a new store, durably."""
    with open(directory / FILE, "wb") as file:
        file.write(mark.pack())
        file.flush()
        os.fsync(file.fileno())


def file_crc(path: Path) -> tuple[int, int]:
    """Size and crc32c of a file."""
    size = crc = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(STEP):
            size, crc = size + len(data), crc32c(data, crc)
    return size, crc


def check(directory: Path) -> int:
    """The generation that was acknowledged last. StoreDamaged where a closed index.db is not what it was."""
    mark = read(directory)
    if mark is None:
        return 0
    wal = directory / f"{DATABASE}-wal"
    if mark.size and not (wal.exists() and wal.stat().st_size):
        found = file_crc(directory / DATABASE)
        if found != (mark.size, mark.crc) and read(directory) == mark:  # else a writer opened it meanwhile
            raise StoreDamaged(
                f"{DATABASE}: has {found[0]} bytes of crc32c {found[1]:08x}, and was closed with {mark.size} of "
                f"{mark.crc:08x}; restore a backup"
            )
    return mark.generation


def closed(directory: Path) -> bool:
    """Was the store closed by its last writer, so that :func:`check` has seen all of index.db?"""
    mark = read(directory)
    return mark is not None and mark.size > 0


def open_for_writing(directory: Path, generation: int) -> int:
    """A descriptor to write marks to; from here on index.db may change."""
    fd = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.pwrite(fd, Mark(generation).pack(), 0)
    os.fdatasync(fd)
    return fd
