"""Named snapshots, and copies of a whole store.

A snapshot is the state, the page tables, the bitmaps and the metadata of one generation, copied inside index.db. Its
pages stay where they are: extents that it names are not used again until it is dropped.
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import numpy as np

from . import _database, _io, _mark
from ._columns import Pages
from ._database import ABSENT, COLUMNS, ENTRY, text_crc, translated
from ._engine import Engine, named
from ._errors import StoreDamaged
from ._writer import Writer


def create(engine: Writer, name: str) -> None:
    engine.fold_all()
    text = json.dumps(engine.state, sort_keys=True)
    engine.db.begin()
    try:
        with translated():
            if engine.db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise ValueError(f"snapshot: there is one named {name!r}; drop it or choose another name")
            row = engine.db.execute(
                "INSERT INTO snapshots(name, data, crc) VALUES(?, ?, ?)", (name, text, text_crc(name, text))
            )
            for table in ("page_table", "maps"):
                engine.db.execute(
                    f"INSERT INTO snapshot_blobs SELECT ?, '{table}', id, version, crc, blob FROM {table}",
                    (row.lastrowid,),
                )
            engine.db.execute("INSERT INTO snapshot_meta SELECT ?, slot, doc, crc FROM meta", (row.lastrowid,))
        engine.db.commit()
    except BaseException:
        engine.db.rollback()
        raise
    for column, file in engine.files.items():
        file.pinned = np.union1d(file.pinned, named(engine.tables[column]))


def names(engine: Engine) -> list[str]:
    engine.db.check_trees()
    with translated():
        found = engine.db.execute("SELECT name, data, crc FROM snapshots ORDER BY id").fetchall()
    for name, text, crc in found:
        if not isinstance(name, str) or not isinstance(text, str) or text_crc(name, text) != crc:
            raise StoreDamaged(f"{_database.FILE}: snapshots, {name!r}: crc32c is wrong; restore a backup")
    return [row[0] for row in found]


def drop(engine: Writer, name: str) -> None:
    number, _ = engine.db.state(name)
    engine.db.begin()
    try:
        with translated():
            for table in ("snapshot_blobs", "snapshot_meta"):
                engine.db.execute(f"DELETE FROM {table} WHERE snapshot = ?", (number,))
            engine.db.execute("DELETE FROM snapshots WHERE id = ?", (number,))
        engine.db.commit()
    except BaseException:
        engine.db.rollback()
        raise
    engine.unsettle()
    # What only the snapshot named was rewritten since, so its readers hold an earlier version, and are waited for.
    for column, pinned in engine.pinned().items():
        file = engine.files[column]
        gone = np.setdiff1d(file.pinned, np.union1d(pinned, named(engine.tables[column])))
        file.pinned = pinned
        file.retire(gone, engine.version)


def backup(engine: Engine, other: Path) -> None:
    """A copy of the last commit, and of snapshots, checked page by page; extents keep their places."""
    with _io.new_directory(other) as making:
        (making / "readers").mkdir()
        with translated():
            copy = sqlite3.connect(making / _database.FILE, isolation_level=None)
            try:
                copy.execute("PRAGMA journal_mode=WAL")
                copy.execute("PRAGMA synchronous=FULL")
                engine.db.sql.backup(copy)
                copy.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                copy.close()
        _mark.write(making, _mark.Mark(engine.generation, *_mark.file_crc(making / _database.FILE)))
        (making / "writer.lock").touch()
        # The reader's pin is from before the copy of the table, so no extent that the copy names is used again.
        db = _database.Database(making, "r")
        try:
            with db.reading():
                numbers = [0, *(row[0] for row in db.execute("SELECT id FROM snapshots").fetchall())]
                for kind, name in enumerate(COLUMNS):
                    entries: dict[int, np.void] = {}
                    for number in numbers:
                        for _, blob in db.blobs("page_table", kind, snapshot=number):
                            part = np.frombuffer(blob, ENTRY)
                            entries.update((int(e["extent"]), e) for e in part[part["extent"] != ABSENT])
                    _copy_pages(engine, name, entries, making)
        finally:
            db.close()
        _io.sync_directory(making / "readers")


def _copy_pages(engine: Engine, name: str, entries: dict[int, np.void], directory: Path) -> None:
    file, memory = engine.files[name], Pages(engine.columns[name], 1)
    fd = os.open(directory / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        for extent, entry in sorted(entries.items()):
            got, crc = file.read(extent, memory, 0)
            if got != file.size or crc != entry["crc"]:
                raise StoreDamaged(f"backup: {file.name}: extent {extent}: is not what the table says; see verify()")
            offset = extent * file.size
            for part in memory.parts(0):
                offset += _io.write_all(fd, part, offset)
            if pad := (extent + 1) * file.size - offset:
                _io.write_all(fd, bytes(pad), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
