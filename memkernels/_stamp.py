"""What the native libraries are built from, as one number. setup.py runs this file, so it imports nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

FILE = "sources.sha256"  # beside the libraries
SUFFIXES = (".cmake", ".cpp", ".cu", ".h")


def stamp(checkout: Path) -> str:
    """The digest of the native sources of ``checkout``."""
    digest = hashlib.sha256()
    sources = [p for p in (checkout / "csrc").rglob("*") if p.suffix in SUFFIXES]
    for path in [checkout / "CMakeLists.txt", *sorted(sources)]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(checkout).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
