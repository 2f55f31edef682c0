"""Histories of a store: a model of what it should hold, a seeded choice of what is done next, and the comparison.

A history is a seed. Both the process that writes and the one that judges draw the same operations from it, so nothing
but the number of operations that were acknowledged has to survive a crash.
"""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from memkernels.store import MemoryStore, _writer

K, V, PAGE = 8, 4, 16
SMALL = 2048  # bytes of a commit that goes to the log, in place of 1 MiB
MOST = 160  # live slots
LOTS = 5  # values of the field of metadata that filters name


class Aborted(Exception):
    """Ends a transaction that is to leave nothing."""


@dataclass
class Model:
    """What a store holds. A slot's rows are made from its number and the stamps of the operations that wrote them."""

    generation: int = 0
    capacity: int = 0
    live: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # slot -> stamps of key, value, metadata
    free: list[int] = field(default_factory=list)  # numbers that a compaction gave back
    snapshots: dict[str, Model] = field(default_factory=dict)
    copies: dict[str, Model] = field(default_factory=dict)  # backups

    def copy(self) -> Model:
        new = copy.copy(self)
        new.live, new.free = dict(self.live), list(self.free)
        new.snapshots, new.copies = dict(self.snapshots), dict(self.copies)
        return new


@dataclass(frozen=True)
class Operation:
    """``kind`` with what it needs; a commit is a list of changes, several of which are one transaction."""

    kind: str
    stamp: int
    changes: tuple[tuple, ...] = ()  # ("append", count) | ("write", slots, parts) | ("delete", slots) | ("sweep", lot)
    name: str = ""
    count: int = 0


def rows(slots: list[int], stamps: list[int], width: int) -> Tensor:
    """[n, width]: numbers that tell slot and stamp, exact in float32."""
    slot, stamp = torch.tensor(slots).view(-1, 1), torch.tensor(stamps).view(-1, 1)
    return ((stamp * 8191 + slot * 127 + torch.arange(width) * 31) % (1 << 22)).float()


def document(stamp: int) -> dict:
    return {"lot": stamp % LOTS, "stamp": stamp}


# --- what is done next ---


def choose(model: Model, seed: str, stamp: int) -> Operation:
    """The operation of that number; the same for the same model and seed."""
    draw = random.Random(f"{seed} {stamp}")
    kinds = {
        "commit": 60,
        "aborted": 4,
        "fold": 8,
        "checkpoint": 4,
        "compact": 4,
        "reopen": 3,
        "snapshot": 6,
        "drop": 5,
    }
    kind = draw.choices([*kinds, "backup"], [*kinds.values(), 2])[0]
    name = f"{kind}-{stamp}"
    if kind == "drop":
        name = draw.choice(sorted(model.snapshots)) if model.snapshots else ""
    if (kind == "snapshot" and len(model.snapshots) > 1) or (kind == "drop" and not name):
        kind = "commit"
    if kind not in ("commit", "aborted"):
        return Operation(kind, stamp, name=name, count=draw.choice([1, 3, 64]))
    changes, now = [], model.copy()
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        changes.append(_change(now, draw))
        now = after(now, Operation("commit", stamp, (changes[-1],)))
    return Operation(kind, stamp, tuple(changes))


def _change(model: Model, draw: random.Random) -> tuple:
    live = sorted(model.live)
    action = draw.random()
    if len(live) < 8 or (action < 0.35 and len(live) < MOST):
        return "append", draw.choice([1, 2, 5, 60])
    if action < 0.75:
        slots = draw.sample(live, min(len(live), draw.choice([1, 3, 10, 100])))
        return "write", tuple(slots), draw.choice(["k", "v", "m", "kv", "kvm", "kvm"])
    if action < 0.9 or len(live) < 40:
        return "delete", tuple(draw.sample(live, min(len(live), draw.choice([1, 4, 30]))))
    return "sweep", draw.randrange(LOTS)


def after(model: Model, operation: Operation) -> Model:
    """The model once the operation is done."""
    new, stamp = model.copy(), operation.stamp
    if operation.kind == "commit":
        for change in operation.changes:
            _apply(new, change, stamp)
        new.generation += new.live != model.live or _writes(operation)
    elif operation.kind == "compact":
        new.capacity = max(model.live, default=-1) + 1
        new.free = [slot for slot in range(new.capacity) if slot not in model.live]
    elif operation.kind == "snapshot":
        new.snapshots[operation.name] = model
    elif operation.kind == "drop":
        del new.snapshots[operation.name]
    elif operation.kind == "backup":
        new.copies = {operation.name: model}
    return new


def _writes(operation: Operation) -> bool:
    return any(change[0] in ("append", "write") for change in operation.changes)


def numbers(model: Model, count: int) -> list[int]:
    """The numbers of the next slots: those given back, then new ones."""
    back = model.free[:count]
    return [*back, *range(model.capacity, model.capacity + count - len(back))]


def swept(model: Model, lot: int) -> list[int]:
    return [slot for slot, (_, _, meta) in model.live.items() if meta % LOTS == lot]


def _apply(model: Model, change: tuple, stamp: int) -> None:
    if change[0] == "append":
        slots = numbers(model, change[1])
        model.free = model.free[change[1] :]
        model.capacity = max(model.capacity, slots[-1] + 1)
        model.live |= dict.fromkeys(slots, (stamp, stamp, stamp))
    elif change[0] == "write":
        for slot in change[1]:
            old = model.live[slot]
            model.live[slot] = tuple(stamp if part in change[2] else old[i] for i, part in enumerate("kvm"))
    else:
        for slot in change[1] if change[0] == "delete" else swept(model, change[1]):
            del model.live[slot]


# --- the same to a store ---


def create(path: Path) -> MemoryStore:
    return MemoryStore.create(path, K, V, page_slots=PAGE)


def tune(store: MemoryStore) -> MemoryStore:
    """Small limits, so that a short history passes through every part of the store."""
    _writer.SMALL = SMALL
    store._engine.db.execute("PRAGMA wal_autocheckpoint=24")
    return store


def perform(store: MemoryStore, model: Model, operation: Operation, durability: str = "commit") -> MemoryStore:
    """Do it; returns the store, which is another object after "reopen"."""
    path, kind, name = store.path, operation.kind, operation.name
    if kind in ("commit", "aborted"):
        _commit(store, model, operation)
    elif kind == "fold":
        store._engine.fold(operation.count)
    elif kind == "checkpoint":
        store._engine.db.checkpoint()
    elif kind == "reopen":
        store.close()
        store = tune(MemoryStore.open(path, mode="w", durability=durability))
    elif kind == "backup":
        for old in path.parent.glob("backup-*"):
            shutil.rmtree(old)
        store.backup(path.parent / name)
    else:
        {"compact": lambda _: store.compact(), "snapshot": store.snapshot, "drop": store.drop_snapshot}[kind](name)
    return store


def _commit(store: MemoryStore, model: Model, operation: Operation) -> None:
    if operation.kind == "commit" and len(operation.changes) == 1:
        return _write(store, model.copy(), operation.changes[0], operation.stamp)
    now = model.copy()
    try:
        with store.transaction():
            for change in operation.changes:
                _write(store, now, change, operation.stamp)
            if operation.kind == "aborted":
                raise Aborted
    except Aborted:
        pass


def _write(store: MemoryStore, model: Model, change: tuple, stamp: int) -> None:
    """One call; ``model`` becomes what it leaves."""
    action, what = change[:2]
    if action == "append":
        slots, count = numbers(model, what), [stamp] * what
        got = store.append(rows(slots, count, K), rows(slots, count, V), [document(stamp)] * what)
        assert got.tolist() == slots
    elif action == "write":
        slots, count, parts = list(what), [stamp] * len(what), change[2]
        store.write(
            slots,
            rows(slots, count, K) if "k" in parts else None,
            rows(slots, count, V) if "v" in parts else None,
            [document(stamp)] * len(slots) if "m" in parts else None,
        )
    elif action == "delete":
        assert store.delete(list(what)) == len(what)
    else:
        assert store.delete(where=("lot = ?", [what])) == len(swept(model, what))
    _apply(model, change, stamp)


# --- the comparison ---


def difference(store: MemoryStore, model: Model, documents: bool = True) -> str:
    """What a store reads that its model does not say; "" where they agree. Snapshots and copies stand aside."""
    found = (store.generation, store.capacity, len(store))
    if found != (wanted := (model.generation, model.capacity, len(model.live))):
        return f"generation, capacity, live slots are {found}, not {wanted}"
    slots = sorted(model.live)
    if store._engine.maps["live"].slots().tolist() != slots:
        return "other slots live"
    if store._engine.maps["free"].slots().tolist() != model.free:
        return "other numbers given back"
    if not slots:
        return ""
    stamps = [model.live[slot] for slot in slots]
    by_page = [store.read(list(part)) for _, part in itertools.groupby(slots, lambda slot: slot // PAGE)]
    keys, values = (torch.cat(parts) for parts in zip(*by_page))  # a page at a time needs no threads
    for name, got, at, width in (("key", keys, 0, K), ("value", values, 1, V)):
        wrong = (got != rows(slots, [stamp[at] for stamp in stamps], width)).any(1).nonzero().flatten().tolist()
        if wrong:
            return f"{name} of slot {slots[wrong[0]]} is {got[wrong[0]].tolist()}"
    if documents and store.meta(slots) != [document(stamp[2]) for stamp in stamps]:
        return "other metadata"
    return ""


def filtered(store: MemoryStore, model: Model, lot: int) -> str:
    """:func:`difference` of a filter over metadata."""
    found = store.topk_search(torch.ones(1, K), max(1, len(model.live)), where=("lot = ?", [lot]))[1][0]
    return "" if sorted(found[found >= 0].tolist()) == sorted(swept(model, lot)) else f"lot {lot} has other slots"
