"""What one commit does to slots, and its bytes in the log.

payload = for each change: flags uint8, 7 zero bytes, count uint64, slots int64 [count],
          key rows [count] (flag KEYS), value rows [count] (flag VALUES)          little endian, rows as in a column
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ._columns import Column
from ._errors import StoreDamaged

ALIVE, KEYS, VALUES, DEAD = 1, 2, 4, 8  # slots begin to live; their rows are given; slots are deleted
HEAD = struct.Struct("<B7xQ")


@dataclass
class Change:
    flags: int
    slots: np.ndarray  # int64
    rows: dict[str, np.ndarray]  # "keys", "values" -> uint8 [count, stored_bytes]

    @property
    def bytes(self) -> int:
        return HEAD.size + self.slots.nbytes + sum(r.nbytes for r in self.rows.values())


def encode(changes: list[Change]) -> bytes:
    parts: list[bytes] = []
    for change in changes:
        parts += [HEAD.pack(change.flags, len(change.slots)), change.slots.astype("<i8").tobytes()]
        parts += [change.rows[name].tobytes() for name in ("keys", "values") if name in change.rows]
    return b"".join(parts)


def decode(seq: int, payload: bytes, columns: dict[str, Column]) -> list[Change]:
    changes, at = [], 0
    while at < len(payload):
        if at + HEAD.size > len(payload):
            raise StoreDamaged(f"index.db: log, commit {seq}: is cut short; restore a backup")
        flags, count = HEAD.unpack_from(payload, at)
        at += HEAD.size
        widths = {c.name: c.stored_bytes for c, flag in zip(columns.values(), (KEYS, VALUES)) if flags & flag}
        if count * (8 + sum(widths.values())) > len(payload) - at:
            raise StoreDamaged(f"index.db: log, commit {seq}: is cut short; restore a backup")
        slots = np.frombuffer(payload, "<i8", count, at).astype(np.int64)
        at += 8 * count
        rows = {}
        for name, width in widths.items():
            rows[name] = np.frombuffer(payload, np.uint8, count * width, at).reshape(count, width)
            at += count * width
        changes.append(Change(flags, slots, rows))
    return changes


class Pending:
    """Rows of one column that its pages on disk do not hold yet, by page, in the order of their commits."""

    def __init__(self) -> None:
        self.pages: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}  # page -> (seq, offsets, rows)

    def add(self, seq: int, page: int, offsets: np.ndarray, rows: np.ndarray) -> None:
        self.pages.setdefault(page, []).append((seq, offsets, rows))

    def prune(self, page: int, generation: int) -> None:
        """Forget what the page of that generation holds."""
        if rest := [p for p in self.pages.pop(page, ()) if p[0] > generation]:
            self.pages[page] = rest

    def drop(self, seq: int) -> list[int]:
        """Forget a commit that failed; returns the pages that it touched."""
        touched = [page for page, parts in self.pages.items() if parts[-1][0] == seq]
        for page in touched:
            if rest := [p for p in self.pages.pop(page) if p[0] != seq]:
                self.pages[page] = rest
        return touched

    def first(self, without: set[int]) -> int | None:
        """The earliest commit of which a row waits, on other pages than these."""
        return min((parts[0][0] for page, parts in self.pages.items() if page not in without), default=None)


def by_page(slots: np.ndarray, size: int):
    """Groups of equal page: yields (page, positions in ``slots`` in their order)."""
    pages = slots // size
    if len(pages) == 0:
        return
    if pages[0] == pages[-1] and (pages == pages[0]).all():
        yield int(pages[0]), slice(None)
        return
    order = np.argsort(pages, kind="stable")
    cuts = np.flatnonzero(np.diff(pages[order])) + 1
    for group in np.split(order, cuts):
        yield int(pages[group[0]]), group
