"""Reading everything and comparing it with its checksum."""

from __future__ import annotations

import os
import sqlite3
from typing import NamedTuple

import numpy as np

from . import _index, _mark
from ._columns import Pages
from ._database import ABSENT, COLUMNS, ENTRY, FILE, blob_crc, text_crc
from ._engine import Engine
from ._errors import StoreDamaged, StoreError


class Fault(NamedTuple):
    """Bytes that are not those that were written."""

    file: str
    page: int | None  # of a column; None in index.db
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {'' if self.page is None else f'page {self.page} '}{self.why}"


def document(engine: Engine, slot: int) -> str | None:
    """The JSON text of a slot, checked; None where it has none."""
    if engine.snapshot:
        table, where, number = "snapshot_meta", f"(snapshot, slot) {{}} ({int(engine.snapshot)}, ?)", "snapshot"
        order = "snapshot {0}, slot {0}"
    else:
        table, where, order, number = "meta", "slot {} ?", "slot {}", "0"
    found = f"SELECT {number}, slot, doc, crc FROM {table} WHERE {where}"
    row = engine.db.execute(found.format("="), (slot,)).fetchone()
    if row is not None:
        return _document(row)
    # A changed number would hide its row. It stands between the same neighbours, or its tree is out of order.
    engine.db.check_trees()
    for beside, way in (("<", "DESC"), (">", "ASC")):
        row = engine.db.execute(f"{found.format(beside)} ORDER BY {order.format(way)} LIMIT 1", (slot,)).fetchone()
        if row is not None:
            _document(row)
            known = engine.db.execute("SELECT 1 FROM snapshots WHERE id = ?", (row[0],)).fetchone()
            if engine.snapshot and known is None:
                raise StoreDamaged(f"{FILE}: {table}, slot {row[1]}: is of no snapshot; restore a backup")
    return None


def _document(row: tuple) -> str:
    _, slot, doc, crc = row
    if not isinstance(doc, str) or text_crc(slot, doc) != crc:
        raise StoreDamaged(f"{FILE}: meta, slot {slot}: crc32c is wrong; restore a backup")
    return doc


def verify(engine: Engine) -> list[Fault]:
    faults: list[Fault] = []
    tables: dict[int, dict[str, dict[int, np.ndarray]]] = {}
    try:
        _mark.check(engine.path)
    except StoreDamaged as error:
        file, _, why = str(error).partition(": ")
        faults.append(Fault(file, None, why))
    with engine.db.reading():
        try:
            for (text,) in engine.db.execute("PRAGMA integrity_check").fetchall():
                if text != "ok":
                    faults.append(Fault(FILE, None, text))
            faults += _rows(engine, tables)
        except (sqlite3.Error, StoreDamaged) as error:
            faults.append(Fault(FILE, None, str(error).removeprefix(f"{FILE}: ")))
    seen: set[tuple[str, int]] = set()
    for columns in tables.values():
        for name, blocks in columns.items():
            faults += _pages(engine, name, blocks, seen)
    return faults + [Fault(file, None, why) for file, why in _index.faults(engine)]


def _rows(engine: Engine, tables: dict) -> list[Fault]:
    """Check every row of the database, and collect the page tables: snapshot -> column -> block -> entries."""
    faults, db = [], engine.db
    sources = [("page_table", "SELECT 0, id, version, crc, blob FROM page_table")]
    sources += [("maps", "SELECT 0, id, version, crc, blob FROM maps")]
    sources += [
        (t, f"SELECT snapshot, id, version, crc, blob FROM snapshot_blobs WHERE tab = '{t}'")
        for t in ("page_table", "maps")
    ]
    counts: dict[tuple, int] = {}
    for table, sql in sources:
        for snapshot, key, version, crc, blob in db.execute(sql):
            kind, block = key >> 40, key & ((1 << 40) - 1)
            if not isinstance(blob, bytes) or blob_crc(key, version, blob) != crc:
                faults.append(Fault(FILE, None, f"{table}, block {block} of kind {kind}: crc32c is wrong"))
                continue
            counts[snapshot, table, kind] = counts.get((snapshot, table, kind), 0) + 1
            if table == "page_table" and kind < len(COLUMNS):
                columns = tables.setdefault(snapshot, {name: {} for name in COLUMNS})
                columns[COLUMNS[kind]][block] = np.frombuffer(blob, ENTRY)
    _, state = db.state()
    states = {0: state}
    for (name,) in db.execute("SELECT name FROM snapshots").fetchall():
        number, states[number] = db.state(name)
    for snapshot, one in states.items():
        for table, wanted, kinds in (("page_table", one["table_blocks"], 2), ("maps", one["map_blocks"], 3)):
            for kind in range(kinds):
                if (got := counts.get((snapshot, table, kind), 0)) != wanted:
                    faults.append(Fault(FILE, None, f"{table}: has {got} sound blocks of kind {kind}, not {wanted}"))
    wanted_seq = state["log_from"]
    for seq, crc, payload in db.execute("SELECT seq, crc, payload FROM log ORDER BY seq"):
        if seq != wanted_seq:
            faults.append(Fault(FILE, None, f"log, commit {wanted_seq}: is missing"))
        if not isinstance(payload, bytes) or blob_crc(seq, 0, payload) != crc:
            faults.append(Fault(FILE, None, f"log, commit {seq}: crc32c is wrong"))
        wanted_seq = seq + 1
    for table in ("meta", "snapshot_meta"):
        for slot, doc, crc in db.execute(f"SELECT slot, doc, crc FROM {table}"):
            if not isinstance(doc, str) or text_crc(slot, doc) != crc:
                faults.append(Fault(FILE, None, f"{table}, slot {slot}: crc32c is wrong"))
    for (slot,) in db.execute("SELECT slot FROM snapshot_meta WHERE snapshot NOT IN (SELECT id FROM snapshots)"):
        faults.append(Fault(FILE, None, f"snapshot_meta, slot {slot}: is of no snapshot"))
    return faults


def _pages(engine: Engine, name: str, blocks: dict[int, np.ndarray], seen: set) -> list[Fault]:
    """Check the pages that a table names, each extent once."""
    faults, file = [], engine.files[name]
    memory = Pages(engine.columns[name], 1)
    size = os.fstat(file.fd).st_size
    for block, entries in sorted(blocks.items()):
        for at in np.flatnonzero(entries["extent"] != ABSENT).tolist():
            extent, page = int(entries[at]["extent"]), block * len(entries) + at
            if (name, extent) in seen:
                continue
            seen.add((name, extent))
            try:
                got, crc = file.read(extent, memory, 0)
            except StoreError as error:
                faults.append(Fault(file.name, page, str(error).removeprefix(f"{file.name}: ")))
                continue
            if got != file.size:
                faults.append(Fault(file.name, page, f"(extent {extent}): the file ends at {size}, within it"))
            elif crc != entries[at]["crc"]:
                faults.append(
                    Fault(file.name, page, f"(extent {extent}): crc32c is {crc:08x}, not {entries[at]['crc']:08x}")
                )
    return faults
