"""index.db: the only truth of a store. SQLite, write-ahead log; every row carries a CRC-32C of its own.

    state         one row of JSON: format, sizes, counters
    page_table    a blob per 1,024 pages of a column: extent uint32, crc32c uint32, generation uint64, little endian
    maps          a blob per 65,536 slots of a bitmap: live, free, changed; one byte where all its bytes are that
    log           a row per commit that the pages do not hold yet
    meta          a JSON document per slot that has metadata
    snapshots     state of a snapshot; its blobs and documents are in snapshot_blobs, snapshot_meta
    accelerator   what the file of the approximate index was built from

``generation`` counts commits, ``version`` counts changes of page_table and maps: pages that take over rows of the log
change those without a commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import struct
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from . import _io
from ._crc import crc32c, of_rows
from ._errors import StoreBusy, StoreDamaged, StoreError, StoreFormat, StoreFull

FILE = "index.db"
FORMAT = 1
BLOCK = 1024  # pages of a blob of the page table
MAP_BLOCK = 65536  # slots of a blob of a bitmap
ENTRY = np.dtype([("extent", "<u4"), ("crc", "<u4"), ("generation", "<u8")])
ABSENT = 0xFFFFFFFF  # the extent of a page that was never written
COLUMNS = ("keys", "values")
MAPS = ("live", "free", "changed")
SCHEMA = """
CREATE TABLE state(id INTEGER PRIMARY KEY, data TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE page_table(id INTEGER PRIMARY KEY, version INTEGER NOT NULL, crc INTEGER NOT NULL, blob BLOB NOT NULL);
CREATE TABLE maps(id INTEGER PRIMARY KEY, version INTEGER NOT NULL, crc INTEGER NOT NULL, blob BLOB NOT NULL);
CREATE TABLE log(seq INTEGER PRIMARY KEY, crc INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE TABLE meta(slot INTEGER PRIMARY KEY, doc TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE snapshots(id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, data TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE snapshot_blobs(snapshot INTEGER NOT NULL, tab TEXT NOT NULL, id INTEGER NOT NULL, version INTEGER NOT NULL,
    crc INTEGER NOT NULL, blob BLOB NOT NULL, PRIMARY KEY(snapshot, tab, id));
CREATE TABLE snapshot_meta(snapshot INTEGER NOT NULL, slot INTEGER NOT NULL, doc TEXT NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY(snapshot, slot)) WITHOUT ROWID;
CREATE TABLE accelerator(id INTEGER PRIMARY KEY, data TEXT NOT NULL, crc INTEGER NOT NULL);
"""

TABLES = {statement.split("(")[0].split()[-1]: statement.strip() for statement in SCHEMA.split(";\n") if statement}
INDEX = re.compile(r"""CREATE INDEX "meta_(\w+)" ON meta\(json_extract\(doc, '\$\.\1'\)\)""")


def text_crc(kind: int | str, text: str) -> int:
    """Of a JSON document and what it belongs to."""
    return crc32c(text.encode("utf-8", "surrogatepass"), crc32c(str(kind).encode()))


def blob_crc(key: int, version: int, blob: bytes) -> int:
    return crc32c(blob, crc32c(struct.pack("<qq", key, version)))


@contextlib.contextmanager
def translated(file: str = FILE) -> Iterator[None]:
    """SQLite's errors as a store's."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        text = str(error)
        if "is full" in text:
            raise StoreFull(f"{file}: no room to write ({text}); free some and call again") from error
        if "locked" in text or "busy" in text:
            raise StoreBusy(f"{file}: another process holds it ({text})") from error
        if any(part in text for part in ("malformed", "not a database", "encrypted", "corrupt", "codec", "no such")):
            raise StoreDamaged(f"{file}: is damaged ({text}); restore a backup") from error
        if "unable to open" in text or "I/O error" in text or "readonly" in text:
            raise StoreError(f"{file}: the system refused to read or write ({text})") from error
        raise StoreDamaged(f"{file}: cannot be read ({text}); restore a backup") from error


class Database:
    """One connection. A reader's connection cannot write."""

    def __init__(self, directory: Path, mode: str, durability: str = "commit"):
        self.path = directory / FILE
        self.whole = False  # were the trees checked?
        with translated():
            uri = f"file:{urllib.parse.quote(str(self.path))}?mode=rw"
            # Calls of a store run one at a time, so that a connection may serve several threads.
            self.sql = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
            try:
                self.execute("PRAGMA cell_size_check=ON")
                self.execute(f"PRAGMA synchronous={'FULL' if durability == 'commit' else 'NORMAL'}")
                self.execute("PRAGMA wal_autocheckpoint=4096")
                self.execute(f"PRAGMA journal_size_limit={64 << 20}")
                if mode == "r":
                    self.execute("PRAGMA query_only=ON")
            except BaseException:
                self.sql.close()
                raise

    def execute(self, sql: str, values=()):
        return self.sql.execute(sql, values)

    def close(self) -> None:
        self.sql.close()

    def data_version(self) -> int:
        with translated():
            return self.execute("PRAGMA data_version").fetchone()[0]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """One consistent view of all tables."""
        with translated():
            inside = self.sql.in_transaction
            if not inside:
                self.execute("BEGIN")
            try:
                yield
            finally:
                if not inside:
                    self.execute("ROLLBACK")

    def begin(self) -> None:
        with translated():
            self.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        with translated():
            self.execute("COMMIT")

    def checkpoint(self) -> bool:
        """Bring the write-ahead log into the file; is it empty now?"""
        with translated():
            return self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0

    def check_writable(self) -> None:
        """SQLite opens a file to read where the system refuses to open it to write, and tells at the first write."""
        self.begin()
        try:
            with translated():
                self.execute("DELETE FROM log WHERE seq < 0")
        finally:
            self.rollback()

    def check_schema(self) -> None:
        """A changed bit in the text of a table gives its columns another meaning; nothing else may be in the file."""
        found = {}
        for name, sql in self.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
            if not isinstance(sql, str) or (name not in TABLES and not INDEX.fullmatch(sql)):
                raise StoreDamaged(f"{FILE}: schema, {name}: is not what a store has; restore a backup")
            found[name] = sql
        for name, sql in TABLES.items():
            if found.get(name) != sql:
                raise StoreDamaged(f"{FILE}: schema, {name}: is not what a store has; restore a backup")

    def sync_log(self) -> None:
        """Make durable what a writer that was killed left in the write-ahead log, before extents it freed are used."""
        log = self.path.with_name(f"{FILE}-wal")
        if log.exists():
            with _io.writing(log.name):
                fd = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
                _io.sync_directory(log.parent)

    def check_trees(self) -> None:
        """Once: damage to a tree of SQLite can hide rows, whose checksums tell only where they are found."""
        if not self.whole:
            with translated():
                (told,) = self.execute("PRAGMA quick_check(1)").fetchone()
            if told != "ok":
                raise StoreDamaged(f"{FILE}: is damaged ({told}); restore a backup")
            self.whole = True

    def rollback(self) -> None:
        """Undo the open transaction, which a failed commit may have closed already."""
        with contextlib.suppress(sqlite3.Error):
            if self.sql.in_transaction:
                self.execute("ROLLBACK")

    # --- rows with a checksum ---

    def state(self, snapshot: str | None = None) -> tuple[int, dict]:
        """Number (0: the present) and state of the store or of a snapshot."""
        if snapshot is None:
            row = self.execute("SELECT 0, 'state', data, crc FROM state WHERE id = 1").fetchone()
        else:
            row = self.execute("SELECT id, name, data, crc FROM snapshots WHERE name = ?", (snapshot,)).fetchone()
            if row is None:
                raise KeyError(f"open: there is no snapshot {snapshot!r}")
        if row is None or not isinstance(row[2], str) or text_crc(row[1], row[2]) != row[3]:
            raise StoreDamaged(f"{FILE}: the state is damaged; restore a backup")
        state = json.loads(row[2])
        if state["format"] > FORMAT:
            raise StoreFormat(
                f"{self.path.parent}: is of format {state['format']}, this memkernels reads up to {FORMAT}; update it"
            )
        return row[0], state

    def put_state(self, state: dict) -> None:
        text = json.dumps(state, sort_keys=True)
        self.execute("INSERT OR REPLACE INTO state VALUES(1, ?, ?)", (text, text_crc("state", text)))

    def blobs(self, table: str, kind: int, newer: int = -1, snapshot: int = 0) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of the blobs of a column or a map that changed after version ``newer``."""
        return self._checked(self._blobs(table, kind, newer, snapshot), table, kind)

    def whole_map(self, kind: int, snapshot: int = 0) -> tuple[np.ndarray, np.ndarray, Iterator[tuple[int, bytes]]]:
        """All blocks of a bitmap: numbers int64 [n] and bytes uint8 [n] of those that are one byte throughout, then
        number and bytes of the others.

        A map of a billion slots has 15,259 blocks, nearly all of them of one byte. SQLite joins those in one text, and
        their checksums are made together, where a row each would be most of the time of opening.
        """
        short = "typeof(blob) = 'blob' AND length(blob) = 1 AND typeof(version) = 'integer' AND typeof(crc) = 'integer'"
        joined = "group_concat(printf('%016x%016x%016x', id, version, crc) || hex(blob), '')"
        ((found,),) = self._blobs("maps", kind, -1, snapshot, f"AND {short}", joined)
        rows = np.frombuffer(bytes.fromhex(found or ""), dtype=np.uint8).reshape(-1, 25)
        numbers = rows[:, :24].copy().view(">i8").astype("<i8")  # [n, 3]: id, version, crc
        text = np.concatenate([numbers[:, :2].copy().view(np.uint8), rows[:, 24:]], 1)
        blocks = numbers[:, 0] - (kind << 40)
        wrong = np.flatnonzero(of_rows(text) != numbers[:, 2])
        if len(wrong):
            raise self._damaged("maps", kind, int(blocks[wrong[0]]))
        others = self._blobs("maps", kind, -1, snapshot, f"AND NOT ({short})")
        return blocks, rows[:, 24], self._checked(others, "maps", kind)

    def _blobs(
        self, table: str, kind: int, newer: int, snapshot: int, only: str = "", what: str = "id, version, crc, blob"
    ) -> sqlite3.Cursor:
        low, high = kind << 40, (kind + 1) << 40
        if snapshot:
            return self.execute(
                f"SELECT {what} FROM snapshot_blobs WHERE snapshot = ? AND tab = ? AND id >= ? AND id < ? {only}",
                (snapshot, table, low, high),
            )
        return self.execute(
            f"SELECT {what} FROM {table} WHERE id >= ? AND id < ? AND version > ? {only}", (low, high, newer)
        )

    def _checked(self, rows: Iterable[tuple], table: str, kind: int) -> Iterator[tuple[int, bytes]]:
        for key, version, crc, blob in rows:
            block = key - (kind << 40)
            if not isinstance(blob, bytes) or not isinstance(version, int) or blob_crc(key, version, blob) != crc:
                raise self._damaged(table, kind, block)
            yield block, blob

    def _damaged(self, table: str, kind: int, block: int) -> StoreDamaged:
        return StoreDamaged(f"{FILE}: {table}, block {block} of {self.kind(table, kind)}: crc32c is wrong")

    @staticmethod
    def kind(table: str, kind: int) -> str:
        return (COLUMNS if table == "page_table" else MAPS)[kind]

    def put_blob(self, table: str, kind: int, block: int, version: int, blob: bytes) -> None:
        key = (kind << 40) + block
        row = (key, version, blob_crc(key, version, blob), blob)
        self.execute(f"INSERT OR REPLACE INTO {table} VALUES(?, ?, ?, ?)", row)

    def log(self, after: int) -> Iterator[tuple[int, bytes]]:
        for seq, crc, payload in self.execute("SELECT seq, crc, payload FROM log WHERE seq > ? ORDER BY seq", (after,)):
            if not isinstance(payload, bytes) or blob_crc(seq, 0, payload) != crc:
                raise StoreDamaged(f"{FILE}: log, commit {seq}: crc32c is wrong; restore a backup")
            yield seq, payload

    def put_log(self, seq: int, payload: bytes) -> None:
        self.execute("INSERT INTO log VALUES(?, ?, ?)", (seq, blob_crc(seq, 0, payload), payload))


def create(directory: Path, state: dict) -> None:
    """A database with its tables and its first state, synced and closed."""
    path = directory / FILE
    with translated():
        sql = sqlite3.connect(path, isolation_level=None)
        try:
            sql.execute("PRAGMA journal_mode=WAL")
            sql.execute("PRAGMA synchronous=FULL")
            sql.execute("BEGIN")
            for statement in SCHEMA.split(";\n"):
                sql.execute(statement)
            text = json.dumps(state, sort_keys=True)
            sql.execute("INSERT INTO state VALUES(1, ?, ?)", (text, text_crc("state", text)))
            sql.execute("COMMIT")
            sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            sql.close()
