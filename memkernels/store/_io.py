"""Files: whole reads and writes, syncs, locks, and where a store cannot lie."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ._errors import StoreBusy, StoreError, StoreFormat, StoreFull

ALIGN = 4096  # bytes; what O_DIRECT needs of offsets, lengths and memory
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs"}
NETWORK |= {"lustre", "afs", "beegfs", "gpfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone"}


def round_up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """The system's refusal to write ``name`` as a sentence."""
    try:
        yield
    except OSError as error:
        raise refusal(name, error) from error


def refusal(name: str, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(f"{name}: no room to write ({error.strerror}); free some and call again")
    return StoreError(f"{name}: the system refused to write ({error.strerror or error}); the store is as it was")


def write_all(fd: int, data, offset: int) -> int:
    """Every byte of ``data``, however little each call takes; returns how many."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        written = os.pwrite(fd, view[done:], offset + done)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written
    return done


def read_into(fd: int, buffers: list, offset: int) -> int:
    """Fill ``buffers`` from ``offset`` on; returns how many bytes the file had."""
    views = [memoryview(b).cast("B") for b in buffers]
    done = 0
    while views:
        got = os.preadv(fd, views, offset + done)
        if got == 0:
            break
        done += got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if views:
            views[0] = views[0][got:]
    return done


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path, sentence: str) -> int:
    """Take the exclusive lock of a file, for as long as the returned descriptor is open."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise StoreBusy(sentence) from None
    return fd


def filesystem(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that ``path`` is or would be on; "" where the system does not tell."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return ""
    there = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = there == point or there.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def refuse_network(path: Path) -> None:
    """SQLite's write-ahead log shares memory between processes, which a network file system does not."""
    if (kind := filesystem(path)) in NETWORK:
        raise StoreFormat(f"{path}: is on {kind}, a network file system, where no store is safe; use a local disk")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that is at ``path`` when the block ends well: whole and durable, or not there at all."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: there is something already; a store is made where nothing is")
    refuse_network(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with writing(str(path)):
        making.mkdir()
        try:
            yield making
            sync_directory(making)
            os.rename(making, path)
            try:
                sync_directory(path.parent)
            except BaseException:
                remove_tree(path)
                raise
        except BaseException:
            remove_tree(making)
            raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor of what is at ``path`` when the block ends well: whole and durable, or what was there before."""
    making = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with writing(str(path)):
        fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            yield fd
            os.fsync(fd)
            os.rename(making, path)
            sync_directory(path.parent)
        except BaseException:
            making.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)


def remove_tree(path: Path) -> None:
    """A directory that this process made."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
