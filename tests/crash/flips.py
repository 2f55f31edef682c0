"""Damage: bits that flip and files that are cut, in a store that was closed and in stores that were killed.

What is read is refused by a StoreError that names the file, and the page where there is one, or it is what was written.
What a read finds verify() finds too. Every bit of what counts as a header is tried, and any other at random.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from memkernels.store import MemoryStore, StoreDamaged, StoreError, _database, _engine, _writer
from memkernels.store._database import COLUMNS

from .history import LOTS, Model, Operation, after, choose, create, difference, filtered, perform, tune
from .judge import Broken, Faults, forked, status_of
from .shim import Shim

KINDS = ("closed", "killed", "killed after a checkpoint")
DATABASE, WAL = "index.db", "index.db-wal"
FILES = {"keys.pages": 30, "values.pages": 30, DATABASE: 30, WAL: 15, "generation.mark": 1}  # and how often each
LONG = 10  # operations of the history before its end
FEW = 24  # slots that are left then
BLOCK = 64  # pages of a blob of the page table, in place of 1,024: damage elsewhere is not rare
ROUND = 100  # changes of a store at a time
CUTS = 0.06  # share of cuts among changes at random


class Sound:
    """A store as it lies on disk, and what it holds; :meth:`changed` tries one change of one file."""

    def __init__(self, folder: Path, kind: str, seed: str, worker: int = 0):
        self.path, self.kind, self.draw = folder / kind / "s", kind, random.Random(f"{seed} {kind} {worker}")
        self.path.parent.mkdir()
        self.model = self._model(seed)
        if status_of(forked(lambda: self._write(seed))) != 0:
            raise Broken(f"{kind}: its history did not come to its end")
        self.files = {name: (self.path / name).read_bytes() for name in FILES if (self.path / name).exists()}
        if self.judge() != "no effect":
            raise Broken(f"{kind}: is not sound before the damage")

    def _operations(self, seed: str) -> Iterator[tuple[Model, Operation]]:
        """A history that ends with few slots, a snapshot, a large commit, and small ones in the log."""
        model, stamp = Model(), 0
        while stamp < LONG or len(model.live) < FEW:
            stamp += 1
            operation = choose(model, seed, stamp)
            if operation.kind in ("commit", "fold", "compact"):
                yield model, operation
                model = after(model, operation)
        live = sorted(model.live)
        few, rest = tuple(live[:FEW]), tuple(live[FEW:])
        for one in (
            Operation("commit", stamp + 1, (("write", few, "m"), ("append", 1), *[("delete", rest)] * bool(rest))),
            Operation("snapshot", stamp + 2, name="before"),
            Operation("commit", stamp + 3, (("write", few, "kv"),)),
            Operation("fold", stamp + 4, count=64),
            Operation("commit", stamp + 5, (("write", few[:3], "kvm"),)),
            Operation("commit", stamp + 6, (("append", 2), ("delete", few[3:4]))),
            Operation("commit", stamp + 7, (("write", few[5:9], "v"),)),
        ):
            yield model, one
            model = after(model, one)

    def _model(self, seed: str) -> Model:
        return after(*list(self._operations(seed))[-1])

    def _write(self, seed: str) -> None:
        store = tune(create(self.path))
        _writer.SMALL = 512
        for model, operation in self._operations(seed):
            if operation.kind == "snapshot":  # all that comes after it stays in the log of SQLite
                store._engine.db.execute("PRAGMA wal_autocheckpoint=0")
                store._engine.db.checkpoint()
            perform(store, model, operation)
        if self.kind == "closed":
            store.close()
        elif self.kind == "killed after a checkpoint":
            store._engine.db.checkpoint()
            (self.path / WAL).unlink()

    # --- one change ---

    def changed(self, name: str, bit: int = 0, size: int | None = None, store: MemoryStore | None = None) -> str:
        """ "refused" or "no effect" of a flipped bit, or of a cut; anything else breaks the law.

        ``store``: one that is open, for a change of a column, of which nothing is read before it is asked for.
        """
        data = bytearray(self.files[name])
        if size is None:
            data[bit // 8] ^= 1 << bit % 8
        (self.path / name).write_bytes(data[:size])
        try:
            return self.judge(name) if store is None else self.judge_open(name, store)
        except Exception as error:
            what = f"bit {bit}" if size is None else f"cut at {size}"
            raise Broken(f"{self.kind}, {name}, {what}: {type(error).__name__}: {error}") from error
        finally:
            (self.path / name).write_bytes(self.files[name])
            if store is None:
                self.restore()

    def restore(self) -> None:
        """What a reader may have changed: it brings the log of SQLite into index.db."""
        for name in (DATABASE, WAL):
            if name in self.files:
                (self.path / name).write_bytes(self.files[name])
            else:
                (self.path / name).unlink(missing_ok=True)
        (self.path / f"{DATABASE}-shm").unlink(missing_ok=True)

    def judge(self, name: str = "") -> str:
        try:
            store = MemoryStore.open(self.path)
        except StoreError as error:
            return self.refused(name, error)
        with store:
            return self.judge_open(name, store)

    def judge_open(self, name: str, store: MemoryStore) -> str:
        engine, faults = store._engine, store.verify()
        for column in COLUMNS:
            for page in range(len(self.files[f"{column}.pages"]) // engine.columns[column].extent_bytes):
                engine.drop(column, page)
        try:
            why = self.read(store, documents=not name.endswith(".pages"))
            if not faults:
                for snapshot, old in self.model.snapshots.items():
                    with MemoryStore.open(self.path, snapshot=snapshot) as one:
                        why = why or difference(one, old)
        except StoreError as error:
            if not faults:
                raise Broken(f"a read finds what verify() does not: {error}") from error
            return self.refused(name, error)
        if why and not (faults and why.startswith("lot ")):  # a filter trusts documents until the store was closed
            raise Broken(why)
        for fault in faults:
            self.refused(name, StoreDamaged(str(fault)))
        return "refused" if faults else "no effect"

    def read(self, store: MemoryStore, documents: bool) -> str:
        """What is wrong of all that can be read."""
        why = difference(store, self.model, documents)
        if why or not documents:
            return why
        if store.snapshots() != list(self.model.snapshots):
            return f"snapshots are {store.snapshots()}"
        return filtered(store, self.model, self.draw.randrange(LOTS))

    @staticmethod
    def refused(name: str, error: StoreError) -> str:
        """The error names the file, index.db for its log, and in a column the page."""
        text = str(error)
        if name.removesuffix("-wal") not in text and not (name == "generation.mark" and DATABASE in text):
            raise Broken(f"the error names another file: {text}")
        if name.endswith(".pages") and not re.search(r"page \d+", text):
            raise Broken(f"the error names no page: {text}")
        return "refused"

    # --- what is tried ---

    def headers(self) -> Iterator[tuple[str, int, int]]:
        """(file, first byte, bytes) of all that says how other bytes are read."""
        yield "generation.mark", 0, 24
        yield DATABASE, 0, 100
        size = int.from_bytes(self.files[DATABASE][16:18], "big")
        for first in range(0, len(self.files[DATABASE]), size):
            yield DATABASE, first + (100 if first == 0 else 0), 12
        if WAL in self.files:
            yield WAL, 0, 32
            for first in range(32, len(self.files[WAL]), 24 + size):
                yield WAL, first, 24
        for name in (DATABASE, WAL):
            data = self.files.get(name, b"")
            for piece in self.rows():
                if (at := data.rfind(piece)) >= 0:
                    yield name, at, len(piece)

    def rows(self) -> list[bytes]:
        """The texts of states, and how the rows of the log and the blobs of tables begin."""
        copy = self.path.parent / "rows.db"
        for suffix in ("", "-wal"):
            if f"{DATABASE}{suffix}" in self.files:
                copy.with_name(copy.name + suffix).write_bytes(self.files[f"{DATABASE}{suffix}"])
        sql = sqlite3.connect(copy)
        texts = [row[0].encode() for row in sql.execute("SELECT data FROM state UNION ALL SELECT data FROM snapshots")]
        blobs = [row[0][:16] for row in sql.execute("SELECT payload FROM log WHERE length(payload) > 16")]
        blobs += [row[0][:32] for row in sql.execute("SELECT blob FROM page_table UNION ALL SELECT blob FROM maps")]
        sql.close()
        return [piece for piece in (*texts, *blobs) if len(set(piece)) > 2]

    def every_bit(self) -> Iterator[tuple[str, int]]:
        for name, first, size in self.headers():
            for bit in range(8 * first, min(8 * (first + size), 8 * len(self.files[name]))):
                yield name, bit

    def any_changes(self, count: int, faults: Faults, told: Counter) -> None:
        """Some at random, counted by their kind and by what became of them."""
        names = [name for name in FILES if name in self.files]
        chosen = self.draw.choices(names, [FILES[name] for name in names], k=count)
        for name in names:
            column, size = name.endswith(".pages"), len(self.files[name])
            with MemoryStore.open(self.path) if column else contextlib.nullcontext() as store:
                for _ in range(chosen.count(name)):
                    cut = self.draw.random() < CUTS
                    bit, end = self.draw.randrange(8 * size), self.draw.randrange(size) if cut else None
                    with faults.trial():
                        kind = "cuts" if cut else "flips"
                        told[kind] += 1
                        told[f"{kind} {self.changed(name, bit, end, store)}"] += 1
            self.restore()


def run(
    shim: Shim,
    folder: Path,
    count: int,
    seed: str,
    headers: int | None = None,
    kinds: tuple[str, ...] = KINDS,
    worker: int = 0,
    workers: int = 1,
    seconds: float = math.inf,
) -> dict:
    """``count`` changes at random, and every bit of headers, or ``headers`` of them; of all a worker's share, and no
    longer than so many seconds."""
    for module in (_database, _engine, _writer):
        module.BLOCK = BLOCK
    told: Counter[str] = Counter()
    end, faults = time.monotonic() + seconds, Faults()
    stores = [Sound(folder, kind, seed, worker) for kind in kinds]
    for store in stores:
        bits = sorted(set(store.every_bit()))
        if headers is not None:
            bits = store.draw.sample(bits, headers // len(stores))
        for name, bit in bits[worker::workers]:
            with faults.trial():
                told["header flips"] += 1
                told[f"header flips {store.changed(name, bit)}"] += 1
    while told["flips"] + told["cuts"] < count / workers and time.monotonic() < end:
        for store in stores:
            store.any_changes(min(ROUND, count), faults, told)
    faults.tell()
    return {**told, "wrong numbers": 0}
