"""The shim of ``shim.c``: built once, loaded into the laboratory's process, and what may be said to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
ROOT = SOURCE.parents[2]
LIBRARY = ROOT / ".build" / "crash" / "shim.so"


def build() -> Path:
    """The library, compiled where it is older than its source."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        making = LIBRARY.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["cc", "-O1", "-Wall", "-fPIC", "-shared", "-o", making, SOURCE, "-ldl", "-lpthread"], check=True
        )
        making.replace(LIBRARY)
    return LIBRARY


def environment() -> dict[str, str]:
    """That of a process with the shim in it."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "LD_PRELOAD": str(build()), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "lab_watch")


def enter(module: str) -> None:
    """Begin this process again with the shim in it."""
    if not loaded():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment())


class Shim:
    """One per process; a child begins with what its parent said."""

    def __init__(self) -> None:
        self.lab = ctypes.CDLL(None)
        self.lab.lab_calls.restype = ctypes.c_long
        self.lab.lab_refuse.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self.lab.lab_kill.argtypes = self.lab.lab_note.argtypes = [ctypes.c_long]

    def watch(self, directory: Path) -> None:
        """Calls about what lies under ``directory`` count from here on."""
        self.lab.lab_watch(os.fsencode(directory))

    def record(self, trace: Path) -> None:
        """Write every counted call that changes something to the end of a file."""
        self.lab.lab_record(os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))

    def note(self, number: int) -> None:
        """Put a number between the records."""
        self.lab.lab_note(number)

    def kill(self, nth: int) -> None:
        """The nth call from here on ends the process; 0: none does."""
        self.lab.lab_kill(nth)

    @contextlib.contextmanager
    def refusing(self, nth: int, error: int, lasting: bool = False) -> Iterator[None]:
        """The nth call in the block fails, and with ``lasting`` all after it."""
        self.lab.lab_refuse(nth, error, lasting)
        try:
            yield
        finally:
            self.lab.lab_refuse(0, 0, 0)

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[int]]:
        """Puts the number of calls in the block into the list that it gives."""
        told: list[int] = []
        self.lab.lab_refuse(0, 0, 0)
        yield told
        told.append(self.lab.lab_calls())
