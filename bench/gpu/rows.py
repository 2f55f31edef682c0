"""The rows of a check: one line of JSON each, appended and flushed as it comes, so that no later fault can lose it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

KEY = ("op", "backend", "dtype", "case", "direction")
PASSED, FAILED, GAP = "passed", "failed", "gap"


def key(row: dict) -> tuple:
    """Rows with the same key are of the same work. A row of the smoke is a row of the grid, done earlier."""
    stage = "grid" if row["stage"] == "smoke" else row["stage"]
    return (stage, *(row[name] for name in KEY))


def describe(row: dict) -> str:
    """One line for people."""
    what = ", ".join(row[name] for name in ("dtype", "case", "direction") if row[name] != "-")
    who = " on ".join(row[name] for name in ("op", "backend") if row[name] != "-")
    return f"{row['stage']}: {', '.join(filter(None, (who, what)))}: {row['message']}"


class Rows:
    """The rows of a folder: those of earlier runs, and those that come. One with the same key replaces the earlier.

    One that failed is printed as it comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._rows: dict[tuple, dict] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the run ended in the middle of this line
                continue
            self._rows[key(row)] = row
        self._file = path.open("a")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def add(self, row: dict) -> None:
        with self._lock:
            self._rows[key(row)] = row
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if row["status"] == FAILED:
            print(describe(row), flush=True)

    def get(self, key: tuple) -> dict | None:
        return self._rows.get(key)

    def __contains__(self, key: tuple) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[dict]:
        with self._lock:
            return iter(list(self._rows.values()))
