"""The approximate index: faiss proposes candidates, and their present keys score them. Never the truth.

    search = the k best of   candidates of the index, live and unchanged since it was built, scored exactly,
                       and   all slots changed since, searched exactly

The file is made again from the store at any time. A token for which the index finds fewer than k slots, though there
are k, is searched exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from . import _io, _rows, _search
from ._bitmap import numbers, ones, pages_with_bits
from ._crc import crc32c
from ._database import COLUMNS, text_crc, translated
from ._engine import CPU, Engine
from ._errors import StoreDamaged, StoreError
from ._writer import Writer

TRAIN = 131_072  # keys that train the index
PROBES = 64  # at most so many lists of an inverted file a search looks into: as few as give ENOUGH recall
ENOUGH = 0.99
OFTEN = 8  # candidates for each of the k
STALE = 0.2  # share of live slots that changed; past it the index is built again
SAMPLE = 64  # keys whose neighbours measure the recall
GOOD = 0.9
RECENT_BYTES = 32 << 20  # of the keys that changed since, kept side by side; more are searched where they lie


def library():
    try:
        import faiss
    except ImportError:
        raise StoreError("build_index: needs faiss, which is not installed (pip install memkernels[index])") from None
    return faiss


def record(engine: Engine) -> dict | None:
    """What the index was built from; None where there is none."""
    with translated():
        row = engine.db.execute("SELECT data, crc FROM accelerator WHERE id = 1").fetchone()
    if row is None or engine.snapshot:
        return None
    if not isinstance(row[0], str) or text_crc("accelerator", row[0]) != row[1]:
        raise StoreDamaged("index.db: accelerator: crc32c is wrong; build_index makes it again")
    return json.loads(row[0])


def build(engine: Writer, description: str) -> dict:
    """Build from the live keys, write it, and name it in the database; returns its record."""
    faiss = library()
    engine.fold_all()
    packed = engine.maps["live"].bytes
    live = engine.maps["live"].slots()
    if len(live) == 0:
        raise StoreError("build_index: the store has no live slots; append some first")
    dim = engine.columns["keys"].dim
    try:
        index = faiss.index_factory(dim, description, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"build_index: {description!r} is no index that faiss makes: {error}") from None
    if not isinstance(index, faiss.IndexIVF):
        index = faiss.IndexIDMap(index)
    sample = np.sort(np.random.default_rng(0).choice(live, min(TRAIN, len(live)), replace=False))
    try:
        index.train(_rows.gather(engine, "keys", sample).float().numpy())
    except RuntimeError as error:
        raise ValueError(f"build_index: {description!r} cannot be trained on {len(sample)} keys: {error}") from None
    for run, at in _live_runs(engine, packed):
        rows, scales = run.rows["keys"], run.scales["keys"]
        keys = engine.columns["keys"].decode(_rows.take(rows, at), None if scales is None else scales[at])
        index.add_with_ids(keys.float().numpy(), run.numbers(at, engine.page_slots).numpy())
    data = faiss.serialize_index(index)
    name = f"index-{engine.generation}-{os.urandom(4).hex()}.faiss"
    found: dict[str, Any] = {
        "file": name,
        "description": description,
        "generation": engine.generation,
        "slots": len(live),
    }
    found |= {"bytes": len(data), "crc": crc32c(data.data), **_tuned(engine, index, sample)}
    _write(engine, name, data)
    old = record(engine)

    def put() -> None:
        text = json.dumps(found, sort_keys=True)
        row = (text, text_crc("accelerator", text))
        engine.db.execute("INSERT OR REPLACE INTO accelerator VALUES(1, ?, ?)", row)

    changed = engine.maps["changed"]
    before = changed.copy()
    changed.clear()
    try:
        engine.publish({column: [] for column in COLUMNS}, engine.generation, also=put)
    except BaseException:
        engine.maps["changed"] = before
        (engine.path / name).unlink(missing_ok=True)
        raise
    engine.index = (name, index)
    if old is not None:
        (engine.path / old["file"]).unlink(missing_ok=True)
    if found["recall"] < GOOD:
        warnings.warn(
            f"build_index: {description} finds {found['recall']:.2f} of the nearest slots of its own keys; "
            "the exact search may be the better one for them",
            stacklevel=4,
        )
    return found


def _live_runs(engine: Engine, packed: np.ndarray):
    for run in _rows.stream(engine, ("keys",), pages_with_bits(packed, engine.page_slots)):
        keep = _rows.mask(packed, run.pages, engine.page_slots)
        size = len(run.pages) * engine.page_slots
        yield run, torch.arange(size) if keep is None else keep.nonzero().squeeze(1)


def _write(engine: Writer, name: str, data: np.ndarray) -> None:
    with _io.writing(name):
        fd = os.open(engine.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _io.write_all(fd, data, 0)
            os.fsync(fd)
        except BaseException:
            (engine.path / name).unlink()
            raise
        finally:
            os.close(fd)
        _io.sync_directory(engine.path)


def _tuned(engine: Engine, index, sample: np.ndarray) -> dict[str, Any]:
    """How many lists to look into, and the share of the 10 nearest slots of its own keys that are then proposed."""
    chosen = sample[:: max(1, len(sample) // SAMPLE)][:SAMPLE]
    query = _rows.gather(engine, "keys", chosen)
    k = min(10, len(sample))
    _, wanted = _search.topk(engine, query, k, 1.0, engine.maps["live"].bytes)
    probes, most = 1, min(PROBES, getattr(index, "nlist", 1))
    while True:
        found = _propose(index, query, k, probes)
        recall = float((wanted.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean())
        if recall >= ENOUGH or probes >= most:
            return {"recall": recall, "probes": probes}
        probes *= 2


def _propose(index, query: Tensor, k: int, probes: int) -> Tensor:
    if hasattr(index, "nprobe"):
        index.nprobe = probes
    return torch.from_numpy(index.search(query.float().numpy(), OFTEN * k)[1])


def loaded(engine: Engine, found: dict):
    """The index that the database names, read and checked once."""
    if engine.index is None or engine.index[0] != found["file"]:
        data, why = _read(engine, found)
        if why:
            raise StoreDamaged(f"{found['file']}: {why}; build_index makes it again")
        engine.index = (found["file"], library().deserialize_index(data))
    return engine.index[1]


def _read(engine: Engine, found: dict) -> tuple[np.ndarray, str]:
    try:
        data = np.fromfile(engine.path / found["file"], dtype=np.uint8)
    except FileNotFoundError:
        return np.zeros(0, np.uint8), "is missing"
    if len(data) != found["bytes"]:
        return data, f"has {len(data)} bytes, not {found['bytes']}"
    return data, "" if crc32c(data.data) == found["crc"] else "crc32c is wrong"


def faults(engine: Engine) -> list[tuple[str, str]]:
    with contextlib.suppress(StoreDamaged, sqlite3.Error):
        if found := record(engine):
            why = _read(engine, found)[1]
            return [(found["file"], why)] if why else []
        return []
    return [("index.db", "accelerator: crc32c is wrong")]


def drop(engine: Writer) -> None:
    found = record(engine)
    if found is None:
        raise StoreError("drop_index: there is no index")
    empty: dict[str, list[int]] = {column: [] for column in COLUMNS}
    engine.publish(empty, engine.generation, also=lambda: engine.db.execute("DELETE FROM accelerator"))
    engine.index = None
    (engine.path / found["file"]).unlink(missing_ok=True)


def search(engine: Engine, op: str, query: Tensor, k: int, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    """As :func:`_search.topk`, approximately; the candidates are found and scored on the CPU."""
    device = query.device
    query, scale = _search.moved(CPU, query, scale)
    if not bool((scale > 0).all() if isinstance(scale, Tensor) else scale > 0):
        raise ValueError(f"{op}: scale must be positive with index='approximate'")
    changed, live = engine.maps["changed"], engine.maps["live"]
    found = record(engine)
    if isinstance(engine, Writer) and engine.staged is None and found and changed.count > STALE * max(live.count, 1):
        build(engine, found["description"])
        found = record(engine)
    if found is None:
        raise StoreError(f"{op}: there is no index; build_index makes one")
    slots = _propose(loaded(engine, found), query, k, found["probes"])
    usable = Bits(packed & ~changed.bytes)
    slots = torch.where(usable.has(slots), slots, -1)
    some = slots >= 0
    used, at = torch.unique(slots.clamp(min=0), return_inverse=True)
    keep = usable.has(used).numpy()
    rows = torch.zeros(len(used), engine.columns["keys"].dim, dtype=engine.columns["keys"].read_dtype)
    rows[torch.from_numpy(keep)] = _rows.gather(engine, "keys", used.numpy()[keep])
    scores = _search.rescored(query, rows[at], scale).masked_fill(~some, -torch.inf)
    best = _search.merged([(scores, slots), _recent(engine, query, k, scale, packed)], k)
    lacking = (best[1] < 0).any(1)
    short = lacking & ((best[1] >= 0).sum(1) < min(k, ones(packed))) if lacking.any() else lacking
    if short.any():
        factor = scale[short] if isinstance(scale, Tensor) else scale
        for whole, part in zip(best, _search.topk(engine, query[short], k, factor, packed)):
            whole[short] = part
    return _search.moved(device, *best)


@dataclass
class Recent:
    """Live slots that changed since the index was built, in order, and their keys side by side: scattered over all
    pages they would cost a search of a twentieth of the slots the time of one of all."""

    of: tuple  # generation, the bitmap of what changed, how often it did
    slots: Tensor  # int64 [n]
    keys: Tensor  # [n, K], float32 or float64


def _recent(engine: Engine, query: Tensor, k: int, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    """The exact search over what changed since the index was built."""
    changed, column = engine.maps["changed"], engine.columns["keys"]
    dtype = _search.exact(column.read_dtype)
    # What a transaction has staged has no generation yet.
    if engine.staged is not None or changed.count * column.dim * dtype.itemsize > RECENT_BYTES:
        return _search.topk(engine, query, k, scale, packed & changed.bytes)
    # A transaction that is undone leaves its slots changed, without a generation.
    recent, of = engine.recent, (engine.generation, changed, changed.changes)
    if recent is None or recent.of != of:
        slots = numbers(engine.maps["live"].bytes & changed.bytes)
        keys = _rows.gather(engine, "keys", slots).to(dtype)
        recent = engine.recent = Recent(of, torch.from_numpy(slots), keys)
    if len(recent.slots) == 0:
        return _search.nothing(query, k)
    mask = None if packed is engine.maps["live"].bytes else Bits(packed).has(recent.slots)
    factor = scale.to(dtype) if isinstance(scale, Tensor) else scale
    scores, at = ops.topk_search(query.to(dtype), recent.keys, k, scale=factor, slot_mask=mask)
    found = recent.slots[at.clamp(min=0)].masked_fill(at < 0, -1)
    return scores.to(_search.exact(query.dtype)), found


class Bits:
    """Membership in a packed bitmap, for tensors of slot numbers; -1 is in none."""

    def __init__(self, packed: np.ndarray):
        self.packed = packed

    def has(self, slots: Tensor) -> Tensor:
        at = slots.numpy()
        inside = (at >= 0) & (at < 8 * len(self.packed))
        at = np.where(inside, at, 0)
        if len(self.packed) == 0:
            return torch.zeros(slots.shape, dtype=torch.bool)
        return torch.from_numpy(inside & ((self.packed[at >> 3] >> (at & 7).astype(np.uint8)) & 1 != 0))
