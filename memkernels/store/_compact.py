"""Giving space back: numbers of deleted slots, pages without a live slot, and the ends of the files."""

from __future__ import annotations

import numpy as np

from ._bitmap import pages_with_bits
from ._database import ABSENT, COLUMNS, translated
from ._writer import STEP, Writer


def compact(engine: Writer) -> int:
    before = _size(engine)
    engine.fold_all()
    _give_numbers_back(engine)
    for name in COLUMNS:
        _move_down(engine, name)
    for name in COLUMNS:
        engine.files[name].shrink(engine.oldest)
    with translated():
        engine.db.execute("VACUUM")
    engine.db.checkpoint()
    return before - _size(engine)


def _size(engine: Writer) -> int:
    return sum(file.stat().st_size for file in engine.path.iterdir() if file.is_file())


def _give_numbers_back(engine: Writer) -> None:
    """Numbers of deleted slots may be given out again; pages of nothing else go."""
    live, free = engine.maps["live"], engine.maps["free"]
    numbers = live.slots()
    capacity, old = (int(numbers[-1]) + 1 if len(numbers) else 0), engine.capacity
    everything = np.arange(old, dtype=np.int64)
    dead = everything[~live.has(everything)]
    before = free.copy()
    free.set(dead[dead < capacity])
    free.set(dead[dead >= capacity], False)
    kept = set(pages_with_bits(live.bytes, engine.page_slots).tolist())
    gone = {
        name: [p for p in np.flatnonzero(engine.tables[name]["extent"] != ABSENT).tolist() if p not in kept]
        for name in COLUMNS
    }
    engine.capacity = capacity
    try:
        engine.publish({name: [] for name in COLUMNS}, engine.generation, absent=gone)
    except BaseException:
        engine.capacity, engine.maps["free"] = old, before
        raise
    for name, pages in gone.items():
        for page in pages:
            engine.drop(name, page)


def _move_down(engine: Writer, name: str) -> None:
    """Rewrite the pages at the end of the file into free extents before them."""
    file = engine.files[name]
    while True:
        file.collect(engine.oldest)
        extents = engine.tables[name]["extent"].astype(np.int64)
        pages = np.flatnonzero(extents != ABSENT)
        order = pages[np.argsort(-extents[pages])][:STEP]
        lower = np.sort(np.array(file.free, dtype=np.int64))[: len(order)]
        step = int((lower < extents[order[: len(lower)]]).sum())
        if step == 0:
            return
        engine.publish({other: order[:step].tolist() if other == name else [] for other in COLUMNS}, engine.generation)
