"""A file as fast as its disk gives it: read by four threads past the system's cache, or by way of a mapping."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

THREADS = 4
STEP = 1 << 20  # bytes of one read of a whole file


class Direct:
    """A file open with O_DIRECT. ``why`` says why the file system does not allow that, or is empty."""

    def __init__(self, path: Path) -> None:
        self.path, self.why, self.fd = path, "", -1
        self.pool = ThreadPoolExecutor(THREADS)
        self.buffer = mmap.mmap(-1, THREADS * STEP)  # begins at a page of memory, as O_DIRECT wants it

    def __enter__(self) -> Direct:
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError) as error:
            self.why = f"no O_DIRECT on this file system ({error})"
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()
        if self.fd >= 0:
            os.close(self.fd)

    def blocks(self, numbers: Sequence[int], size: int) -> np.ndarray:
        """Blocks of ``size`` bytes, by their number: uint8 [len(numbers), size]."""
        if len(self.buffer) < len(numbers) * size:
            self.buffer = mmap.mmap(-1, len(numbers) * size)
        view = memoryview(self.buffer)

        def read(i: int) -> int:
            return os.preadv(self.fd, [view[i * size : (i + 1) * size]], numbers[i] * size)

        if any(got != size for got in self.pool.map(read, range(len(numbers)))):
            raise OSError(f"{self.path}: a block is short")
        return np.frombuffer(self.buffer, np.uint8, len(numbers) * size).reshape(-1, size)

    def whole(self) -> int:
        """Read the file in order, into memory that is used again; returns how many bytes it has."""
        view = memoryview(self.buffer)
        parts = [view[i * STEP : (i + 1) * STEP] for i in range(THREADS)]

        def read(i: int) -> int:
            return sum(os.preadv(self.fd, [parts[i]], at) for at in range(i * STEP, size, THREADS * STEP))

        size = os.path.getsize(self.path)
        return sum(self.pool.map(read, range(THREADS)))


class Mapped:
    """A file read through a new mapping, four threads side by side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()

    def blocks(self, numbers: Sequence[int], size: int) -> np.ndarray:
        """As :meth:`Direct.blocks`."""
        file = np.memmap(self.path, np.uint8, mode="r").reshape(-1, size)
        out = np.empty((len(numbers), size), np.uint8)

        def read(i: int) -> None:
            out[i] = file[numbers[i]]

        list(self.pool.map(read, range(len(numbers))))
        return out
