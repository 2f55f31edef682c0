"""One copy of a table for all processes of a machine: a file in shared memory, of which each user holds a lock.

    memkernels-<identity>-<device>-<inode>   the copy: a page of its own, then rows, then scales; shared lock of a user
    memkernels-<identity>.guard              exclusive lock of whoever opens, closes, updates or writes

The name of a copy is the identity that stands in the table's file, and where that file lies. Who opens a copy that
nobody uses fills it, also where one is left: its users were killed, and may have been writing. The system frees the
locks of a killed process. Who closes a copy that nobody else uses removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._errors import StoreError, StoreFormat, StoreFull
from ._io import ALIGN
from ._memory import HUGE
from ._table_file import Head, read_head

FOLDER = Path("/dev/shm")
PAGE = struct.Struct("<Q")  # the generation of the file that close() wrote last


def copy_name(head: Head, status: os.stat_result) -> str:
    return f"memkernels-{head.identity.hex}-{status.st_dev:x}-{status.st_ino:x}"


class SharedCopy:
    """This process's hold of a copy. ``memory`` is uint8 [bytes] of rows and scales, the same in every process.

    ``head`` is that of the file as it is while nobody writes it; ``fill`` gets the file, its header and the memory.
    """

    def __init__(self, path: Path, head: Head, fill: Callable[[int, Head, Tensor], None]):
        self.path = path
        self.guard_path = FOLDER / f"memkernels-{head.identity.hex}.guard"
        self.here = threading.RLock()  # a lock of a file is one for all threads of a process
        if not FOLDER.is_dir():
            raise StoreFormat(f"{path}: tier='shared' needs {FOLDER}, which is not there; use tier='ram' or 'mmap'")
        with self.guard(), open(path, "rb") as file:
            self.head = read_head(path, file.fileno())
            if self.head.identity != head.identity:
                raise StoreError(f"{path}: was replaced while it was opened; open it again")
            self.fd = self._open(FOLDER / copy_name(head, os.fstat(file.fileno())))
            try:
                self._begin(lambda memory: fill(file.fileno(), self.head, memory))
            except BaseException:
                if self._alone():
                    self.file().unlink(missing_ok=True)
                    self.guard_path.unlink(missing_ok=True)
                os.close(self.fd)
                raise

    def _open(self, file: Path) -> int:
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            raise StoreError(f"{self.path}: its shared copy {file} is another user's ({error.strerror})") from None

    def _begin(self, fill: Callable[[Tensor], None]) -> None:
        size = ALIGN + sum(self.head.layout.sizes)
        alone = self._alone()
        if alone:
            os.ftruncate(self.fd, 0)
            try:
                os.posix_fallocate(self.fd, 0, size)  # a full memory is an error here, and a signal when it is touched
            except OSError as error:
                raise StoreFull(f"{self.path}: {FOLDER} has no room for {size} bytes ({error.strerror})") from None
        elif os.fstat(self.fd).st_size != size:
            raise StoreError(f"{self.path}: its shared copy {self.file()} is of another table; remove it")
        self.page: Any = mmap.mmap(self.fd, size)
        if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self.page.madvise(mmap.MADV_HUGEPAGE)
        self.memory: Any = torch.frombuffer(self.page, dtype=torch.uint8)[ALIGN:]
        if alone:
            self.generation = self.head.generation
            fill(self.memory)
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    @property
    def generation(self) -> int:
        return PAGE.unpack_from(self.page)[0]

    @generation.setter
    def generation(self, number: int) -> None:
        PAGE.pack_into(self.page, 0, number)

    def file(self) -> Path:
        """Where the copy lies now: another process may have given it another name."""
        return Path(os.readlink(f"/proc/self/fd/{self.fd}"))

    def renamed(self, head: Head, status: os.stat_result) -> None:
        """The file of the table is another one now. Under the guard."""
        os.rename(self.file(), FOLDER / copy_name(head, status))

    def _alone(self) -> bool:
        """Does nobody else use the copy? Then this one has its lock alone. Under the guard."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Nobody else opens, closes, updates or writes a copy of the table in the block."""
        with self.here:
            fd = self._guard()
            try:
                yield
            finally:
                os.close(fd)

    def _guard(self) -> int:
        while True:
            fd = self._open(self.guard_path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.stat(self.guard_path).st_ino == os.fstat(fd).st_ino:
                    return fd
            except FileNotFoundError:
                pass  # the last user removed it after it was opened here
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def release(self) -> None:
        with self.guard():
            if self._alone():
                self.file().unlink(missing_ok=True)
                self.guard_path.unlink(missing_ok=True)
            self.memory = self.page = None
            os.close(self.fd)
