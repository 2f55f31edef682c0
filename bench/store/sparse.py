"""A store of a billion slots that takes next to no room: its page table is written, its pages are holes in a file.

A hole reads as zeros, and the table has the checksum of a page of zeros, so this is a store like any other: it opens,
reads and verifies. Some of its pages are real.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from memkernels.store import MemoryStore, _mark
from memkernels.store._crc import crc32c
from memkernels.store._database import ABSENT, BLOCK, COLUMNS, ENTRY, FILE, MAP_BLOCK, MAPS, Database

GENERATION = 1  # of the one commit that made all of it


def make(path: Path, slots: int, dim: int, page_slots: int, real: np.ndarray) -> np.ndarray:
    """A closed store of ``slots`` live slots of K = V = dim float32, zeros but for the values of pages ``real``.

    Returns the entries of the pages of one column, keys and values being alike but for those.
    """
    with MemoryStore.create(path, dim, dim, page_slots=page_slots) as store:
        size = store.columns["keys"].extent_bytes
    pages = -(-slots // page_slots)
    table = np.zeros(-(-pages // BLOCK) * BLOCK, ENTRY)
    table["extent"] = ABSENT
    table[:pages]["extent"] = np.arange(pages)
    table[:pages]["crc"] = crc32c(bytes(size))
    table[:pages]["generation"] = GENERATION
    tables = {name: table.copy() for name in COLUMNS}
    for name in COLUMNS:
        os.truncate(path / f"{name}.pages", pages * size)
    with open(path / "values.pages", "r+b") as file:
        for page in real.tolist():
            data = content(page, size)
            file.seek(page * size)
            file.write(data)
            tables["values"][page]["crc"] = crc32c(data)
        file.flush()
        os.fsync(file.fileno())
    _write_tables(path, slots, tables)
    return tables["values"][:pages]


def content(page: int, size: int) -> bytes:
    """The values of a page that is real: its number, as float32."""
    return np.full(size // 4, page, np.float32).tobytes()


def _write_tables(path: Path, slots: int, tables: dict[str, np.ndarray]) -> None:
    """Page table, bitmaps and state, in one transaction, and the mark of a closed store."""
    blocks = -(-slots // MAP_BLOCK)
    rest = np.packbits(np.arange(MAP_BLOCK) < slots - (blocks - 1) * MAP_BLOCK, bitorder="little")
    db = Database(path, "w")
    try:
        state = db.state()[1]
        version = state["version"] + 1
        db.begin()
        for kind, name in enumerate(COLUMNS):
            for block, part in enumerate(np.split(tables[name], len(tables[name]) // BLOCK)):
                db.put_blob("page_table", kind, block, version, part.tobytes())
        for kind, name in enumerate(MAPS):
            for block in range(blocks):
                full = b"\xff" if name == "live" else b"\x00"
                last = rest.tobytes() if name == "live" and block == blocks - 1 else full
                db.put_blob("maps", kind, block, version, last)
        state |= {"version": version, "maps_generation": GENERATION, "log_from": GENERATION + 1}
        state |= {"capacity": slots, "live": slots, "map_blocks": blocks, "table_blocks": len(tables["keys"]) // BLOCK}
        db.put_state(state)
        db.commit()
        db.checkpoint()
    finally:
        db.close()
    size, crc = _mark.file_crc(path / FILE)
    _mark.write(path, _mark.Mark(GENERATION, size, crc))
