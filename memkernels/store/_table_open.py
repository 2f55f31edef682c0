"""How the tiers of a table are made out of its file."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _table_file, _table_host
from ._copies import Copies
from ._errors import StoreFormat
from ._io import ALIGN, filesystem, read_into
from ._memory import aligned, zeros
from ._table_device import OnDevice
from ._table_file import Head
from ._table_host import Host
from ._table_layout import BLOCK
from ._table_shared import SharedCopy

PIECE = 64 * BLOCK  # of a copy to the device

Bounds = tuple[int, int, int]  # threads, tickets, bytes of tickets


def in_ram(path: Path, fd: int, head: Head) -> tuple[Tensor, Tensor]:
    """Rows and scales, checked, as uint8 in memory of this process."""
    sums = _table_file.read_sums(path, fd, head)
    memory = [zeros(size) for size in head.layout.sizes]
    for part in (0, 1):
        _table_file.load(path, fd, head, sums, part, memory[part])
    return torch.from_numpy(memory[0]), torch.from_numpy(memory[1])


def host(name: str, head: Head, memory: tuple[Tensor, Tensor], out_dtype, bounds: Bounds, release=None) -> Host:
    """A tier of uint8 rows and scales in memory."""
    t = head.layout
    rows, scales = t.rows_of(memory[0]), t.scales_of(memory[1])
    return _table_host.in_memory(name, t, rows, scales, out_dtype, bounds, release or (lambda: None))


def shared(path: Path, head: Head) -> SharedCopy:
    def fill(fd: int, now: Head, memory: Tensor) -> None:
        sums = _table_file.read_sums(path, fd, now)
        size, into = now.layout.sizes[0], memory.numpy()
        _table_file.load(path, fd, now, sums, 0, into[:size])
        _table_file.load(path, fd, now, sums, 1, into[size:])

    return SharedCopy(path, head, fill)


def mapped(path: Path, fd: int, head: Head, out_dtype, bounds: Bounds) -> Host:
    """Rows and scales in the page cache, of which a gather brings the pages that it needs, and no others."""
    t = head.layout
    end = t.sums[0]
    memory = mmap.mmap(fd, end, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that is only read
        whole = torch.frombuffer(memory, dtype=torch.uint8)
    rows, scales = t.rows_of(whole[t.offsets[0] :]), t.scales_of(whole[t.offsets[1] :])
    return _table_host.in_memory(str(path), t, rows, scales, out_dtype, bounds, lambda: None, paged=True)


def direct(path: Path, fd: int, head: Head, out_dtype, cache_rows: int, bounds: Bounds) -> Host:
    """Rows that are read past the page cache; scales in memory."""
    t = head.layout
    refused = f"{path}: is on {filesystem(path) or 'a file system'} that refuses O_DIRECT; use tier='mmap' or 'ram'"
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise StoreFormat(f"{refused} ({error.strerror})") from None
    try:
        if (os.fstat(file).st_dev, os.fstat(file).st_ino) != (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
            raise StoreFormat(f"{path}: was replaced while it was opened; open it again")
        try:
            read_into(file, [aligned(ALIGN).numpy()], 0)
        except OSError as error:
            raise StoreFormat(f"{refused} ({error.strerror})") from None
        scales = zeros(t.sizes[1])
        _table_file.load(path, fd, head, _table_file.read_sums(path, fd, head), 1, scales)
        kept = t.scales_of(torch.from_numpy(scales))
        return _table_host.in_file(str(path), t, file, kept, out_dtype, cache_rows, bounds, lambda: os.close(file))
    except BaseException:
        os.close(file)
        raise


def on_device(path: Path, fd: int, head: Head, tier: str, copies: Copies, out_dtype, bounds: Bounds) -> OnDevice:
    """Rows and scales in page-locked memory that the device reads, or in its own."""
    t = head.layout
    sums = _table_file.read_sums(path, fd, head)
    memory = []
    for part, size in enumerate(t.sizes):
        if tier == "pinned":
            locked = copies.locked(size)
            locked.zero_()
            _table_file.load(path, fd, head, sums, part, locked.numpy())
            memory.append(copies.visible(locked))
        else:
            target = copies.empty(size, dtype=torch.uint8)
            _to_device(copies, target, partial(_table_file.load, path, fd, head, sums, part))
            memory.append(target)
    rows, scales = t.rows_of(memory[0]), t.scales_of(memory[1])
    return OnDevice(str(path), t, rows, scales, out_dtype, copies, bounds)


def _to_device(copies: Copies, target: Tensor, load: Callable[[Any, int], None]) -> None:
    """Pieces by way of two buffers of page-locked memory: one is filled while the other is copied."""
    size = len(target)
    ring = [copies.locked(min(PIECE, size)) for _ in range(2)]
    sent: list[Any] = [None, None]
    for i, begin in enumerate(range(0, size, PIECE)):
        if sent[i % 2] is not None:
            copies.wait("host", sent[i % 2])
        piece = ring[i % 2][: min(PIECE, size - begin)]
        piece.zero_()
        load(piece.numpy(), begin)
        copies.stage(target[begin : begin + len(piece)], piece)
        sent[i % 2] = copies.record("copy")
    for event in sent:
        if event is not None:
            copies.wait("host", event)


def parts(head: Head, memory: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows and scales in memory as chunks of a new file."""
    t = head.layout
    rows, scales = t.rows_of(memory[0]), t.scales_of(memory[1])
    step = max(1, PIECE // t.row_bytes)
    for begin in range(0, t.rows, step):
        yield rows[begin : begin + step], None if scales is None else scales[begin : begin + step]
