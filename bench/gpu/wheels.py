"""Torch as its wheel has it, unpacked into a folder of its own: importable from there, installed nowhere."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def cache() -> Path:
    """Where downloads stay: ``$MEMKERNELS_CACHE``, or a folder in the user's cache."""
    if own := os.environ.get("MEMKERNELS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memkernels"


def torch_folder(version: str) -> Path:
    """A folder for ``PYTHONPATH`` with torch ``version``, fetched at the first call. RuntimeError: it cannot be had.

    It holds torch alone. What torch imports comes from the interpreter; what it links must come from elsewhere.
    """
    folder = cache() / f"torch-{version}-{sys.implementation.cache_tag}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:  # others may want it at the same time
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _fetch(version, folder)
    except OSError as error:
        raise RuntimeError(f"torch {version} cannot be unpacked to {folder}: {error}") from error
    return folder


def _fetch(version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        download += ["--only-binary=:all:", "--no-cache-dir", "--dest", scratch, f"torch=={version}"]
        done = subprocess.run(download, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            said = re.search(r"ERROR: (.*)", done.stderr)
            raise RuntimeError(f"torch {version} cannot be had by pip: {said[1] if said else 'it says no more'}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(Path(scratch) / "unpacked")
        wheels[0].unlink()
        # A folder with the final name is complete: the name comes last.
        Path(scratch, "unpacked").rename(folder)
