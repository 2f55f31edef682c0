"""The file of a table: written once as a whole, then read by blocks that each have a checksum.

    header      4 KiB: magic, layout version, identity, generation, shape, dtypes, crc32c of the checksums, and its own
    rows        [N, V], up to a multiple of 4 KiB
    scales      [N, scales of a row], up to a multiple of 4 KiB
    checksums   crc32c of every MiB of rows, then of scales, uint32, up to a multiple of 4 KiB

Every byte is under a checksum. Numbers are little-endian.
"""

from __future__ import annotations

import errno
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._columns import DTYPES, dtype_name
from ._crc import crc32c
from ._errors import StoreDamaged, StoreFormat
from ._io import new_file, read_into, write_all
from ._memory import aligned
from ._table_layout import BLOCK, HEADER, SCALES, Layout, layout
from ._verify import Fault

MAGIC = b"mkrows\r\n"
VERSION = 1
FIELDS = struct.Struct(
    "<8sI16sQQQ16s16s16sI"
)  # magic, version, identity, generation, N, V, dtype, scale, its dtype, crc
READERS = 8  # threads that read and check
RUN = 8  # blocks that one of them reads at once


@dataclass(frozen=True)
class Head:
    """What the header says."""

    layout: Layout
    identity: uuid.UUID  # of the table, through all that close() writes
    generation: int  # how often it was written
    crc: int = 0  # of the checksums

    def pack(self) -> bytes:
        t = self.layout
        scale_dtype = dtype_name(t.scale_dtype) if t.scale else ""
        names = [name.encode() for name in (dtype_name(t.dtype), t.scale or "none", scale_dtype)]
        fields = FIELDS.pack(
            MAGIC, VERSION, self.identity.bytes, self.generation, t.rows, t.width, *names, self.crc
        ).ljust(HEADER - 4, b"\0")
        return fields + struct.pack("<I", crc32c(fields))


def read_head(path: Path, fd: int) -> Head:
    """The header, where it is one and the file is as long as it says."""
    page = bytearray(HEADER)
    size = os.fstat(fd).st_size
    if (got := read_into(fd, [page], 0)) < HEADER:
        raise StoreDamaged(f"{path}: ends after {got} bytes, within the header of a table; restore a backup")
    magic, version, identity, generation, rows, width, dtype, scale, scale_dtype, crc = FIELDS.unpack_from(page)
    if magic != MAGIC:
        raise StoreFormat(f"{path}: is no table of rows; RowTable.create makes one")
    if crc32c(memoryview(page)[:-4]) != struct.unpack_from("<I", page, HEADER - 4)[0]:
        raise StoreDamaged(f"{path}: crc32c of the header is wrong; restore a backup")
    if version != VERSION:
        raise StoreFormat(f"{path}: has layout {version}, this memkernels reads layout {VERSION}; use a newer one")
    kind, name, scale_name = (text.rstrip(b"\0").decode("ascii", "replace") for text in (scale, dtype, scale_dtype))
    given = (None if kind == "none" else kind), SCALES.get(scale_name, torch.float32)
    try:
        found = layout("open", rows, width, DTYPES.get(name), *given)
    except (TypeError, ValueError) as error:
        raise StoreDamaged(f"{path}: the header describes no table ({error}); restore a backup") from None
    if size != found.file_bytes:
        raise StoreDamaged(f"{path}: has {size} bytes, and its table {found.file_bytes}; restore a backup")
    return Head(found, uuid.UUID(bytes=identity), generation, crc)


def read_sums(path: Path, fd: int, head: Head) -> np.ndarray:
    """The checksums, checked. uint32 [blocks of rows + of scales]."""
    offset, size = head.layout.sums
    data = np.zeros(size, dtype=np.uint8)
    if read_into(fd, [data], offset) != size or crc32c(data) != head.crc:
        raise StoreDamaged(f"{path}: crc32c of the checksums is wrong; restore a backup")
    return data.view("<u4")[: sum(head.layout.blocks)]


class Output:
    """A new file of a table, whose rows and scales each come in order."""

    def __init__(self, fd: int, layout: Layout):
        self.fd, self.layout = fd, layout
        self.at = list(layout.offsets)
        self.sums: list[list[int]] = [[], []]
        self.open = [[0, 0], [0, 0]]  # of the last block: bytes, crc
        os.ftruncate(fd, layout.file_bytes)

    def put(self, part: int, data: Any) -> None:
        """More bytes of the rows (0) or the scales (1)."""
        view = memoryview(data).cast("B")
        if len(view):
            write_all(self.fd, view, self.at[part])
            self.at[part] += len(view)
            self._sum(part, view)

    def _sum(self, part: int, view: memoryview) -> None:
        size, crc = self.open[part]
        while len(view):
            piece = view[: BLOCK - size]
            size, crc, view = size + len(piece), crc32c(piece, crc), view[len(piece) :]
            if size == BLOCK:
                self.sums[part].append(crc)
                size = crc = 0
        self.open[part] = [size, crc]

    def finish(self, identity: uuid.UUID, generation: int) -> Head:
        """Padding, checksums, header."""
        t = self.layout
        for part in (0, 1):
            missing = t.offsets[part] + t.sizes[part] - self.at[part]
            self._sum(part, memoryview(bytes(missing)))
            if self.open[part][0]:
                self.sums[part].append(self.open[part][1])
        return self.seal(np.array(self.sums[0] + self.sums[1], dtype="<u4"), identity, generation)

    def seal(self, sums: np.ndarray, identity: uuid.UUID, generation: int) -> Head:
        offset, size = self.layout.sums
        data = sums.tobytes().ljust(size, b"\0")
        head = Head(self.layout, identity, generation, crc32c(data))
        write_all(self.fd, data, offset)
        write_all(self.fd, head.pack(), 0)
        return head


def write(path: Path, t: Layout, identity: uuid.UUID, generation: int, chunks: Iterator[tuple]) -> Head:
    """A whole file at ``path``, durable, out of chunks of rows and scales (contiguous tensors); or what was there."""
    with new_file(path) as fd:
        output = Output(fd, t)
        for rows, scales in chunks:
            output.put(0, rows.view(torch.uint8).numpy())
            if scales is not None:
                output.put(1, scales.view(torch.uint8).numpy())
        return output.finish(identity, generation)


def write_zeros(path: Path, t: Layout) -> Head:
    """A table of zeros, which takes no room on the disk until it is written."""
    with new_file(path) as fd:
        output = Output(fd, t)
        sums = [zeros_crc(min(BLOCK, size - at)) for size in t.sizes for at in range(0, size, BLOCK)]
        return output.seal(np.array(sums, dtype="<u4"), uuid.uuid4(), 0)


_zeros: dict[int, int] = {}


def zeros_crc(size: int) -> int:
    if size not in _zeros:
        _zeros[size] = crc32c(bytes(size))
    return _zeros[size]


def is_hole(fd: int, begin: int, end: int) -> bool:
    """Has the file no blocks there? Then it reads as zeros."""
    try:
        return os.lseek(fd, begin, os.SEEK_DATA) >= end
    except OSError as error:
        return error.errno == errno.ENXIO


def check_blocks(
    fd: int, t: Layout, part: int, sums: np.ndarray, into: Any, wrong: Callable[[int, str], None], span: slice
) -> None:
    """Read bytes ``span`` of the rows (0) or scales (1), from a block on, by several threads into ``into`` (uint8 of
    zeros; None: nowhere); ``wrong`` hears of each block that is not what was written."""
    offset, first = t.offsets[part], part * t.blocks[0]

    def run(begin: int) -> None:
        end = min(begin + RUN * BLOCK, span.stop)
        hole = is_hole(fd, offset + begin, offset + end)
        if not hole:
            memory = aligned(end - begin).numpy() if into is None else into[begin - span.start : end - span.start]
            got = read_into(fd, [memory], offset + begin)
        for at in range(begin, end, BLOCK):
            here, number = min(BLOCK, end - at), first + at // BLOCK
            if not hole and got < at - begin + here:
                wrong(number, f"ends after {max(0, got - (at - begin))} bytes")
                continue
            crc = zeros_crc(here) if hole else crc32c(memory[at - begin : at - begin + here])
            if crc != sums[number]:
                wrong(number, f"crc32c is {crc:08x}, not {sums[number]:08x}")

    with ThreadPoolExecutor(READERS) as pool:
        for job in [pool.submit(run, begin) for begin in range(span.start, span.stop, RUN * BLOCK)]:
            job.result()


def load(path: Path, fd: int, head: Head, sums: np.ndarray, part: int, into: Any, begin: int = 0) -> None:
    """Rows (0) or scales (1), from byte ``begin`` on, into memory of zeros, checked."""
    found: list[tuple[int, str]] = []
    span = slice(begin, begin + len(into))
    check_blocks(fd, head.layout, part, sums, into, lambda block, why: found.append((block, why)), span)
    if found:
        block, why = min(found)
        raise StoreDamaged(f"{path}: block {block}: {why}; restore a backup")


def verify(path: Path) -> list[Fault]:
    """Everything that is not what was written."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = read_head(path, fd)
        sums = read_sums(path, fd, head)
        faults: list[Fault] = []
        for part in (0, 1):
            whole = slice(0, head.layout.sizes[part])
            check_blocks(
                fd, head.layout, part, sums, None, lambda n, why: faults.append(Fault(path.name, n, why)), whole
            )
        return sorted(faults)
    except (StoreDamaged, StoreFormat) as error:
        return [Fault(path.name, None, str(error).partition(": ")[2])]
    finally:
        os.close(fd)
