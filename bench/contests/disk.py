"""The system's cache of files."""

from __future__ import annotations

import os
from pathlib import Path


def forget(path: Path) -> None:
    """Drop a file from the system's cache, but for pages that a process has mapped or nobody has written yet."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
