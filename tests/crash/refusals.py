"""Refusals: every system call of an operation fails in turn, with ENOSPC, EIO and EINTR, and with ENOSPC lastingly.

The operation is a StoreError, or succeeds; the store is as before or as after, goes on in the same process without
being opened again when the system does its work again, and is sound on disk.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from memkernels.store import MemoryStore, StoreError

from .history import Model, Operation, after, choose, create, difference, perform, tune
from .judge import Broken, Faults, forked, judge, judge_copies, status_of
from .shim import Shim

ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR)
KINDS = ("small commit", "bulk commit", "fold", "checkpoint", "snapshot", "drop", "compact", "backup", "reopen")
LONG = 10  # operations before the one that is refused


class Before:
    """A store with rows in its log, a snapshot and free extents, and one operation of each kind for it."""

    def __init__(self, folder: Path, seed: str):
        self.folder, self.seed = folder, seed
        operations, model, stamp = [], Model(), 0
        while len(operations) < LONG or not model.snapshots:
            stamp += 1
            operation = choose(model, seed, stamp)
            if operation.kind in ("commit", "fold", "snapshot", "compact"):
                operations.append((model, operation))
                model = after(model, operation)
        self.model, self.stamp = model, stamp + 1
        if status_of(forked(lambda: self._write(operations))) != 0:
            raise Broken("the history did not come to its end")

    def _write(self, operations: list[tuple[Model, Operation]]) -> None:
        store = tune(create(self.folder / "before" / "s"))
        for model, operation in operations:
            perform(store, model, operation)

    def operation(self, kind: str, stamp: int, model: Model) -> Operation:
        live = sorted(model.live)
        if kind == "small commit":
            changes = (("write", tuple(live[:3]), "kvm"), ("append", 2), ("delete", (live[-1],)))
            return Operation("commit", stamp, changes)
        if kind == "bulk commit":
            return Operation("commit", stamp, (("write", tuple(live[:40]), "kvm"), ("append", 40)))
        name = next(iter(model.snapshots)) if kind == "drop" else f"{kind}-{stamp}"
        return Operation(kind, stamp, name=name, count=64)

    def copy(self) -> Path:
        now = self.folder / "now"
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(self.folder / "before", now)
        return now


def trials(before: Before, shim: Shim) -> Iterator[tuple[str, int, int, bool]]:
    """(kind, call, errno, does it last) of all that is tried."""
    for kind in KINDS:
        store = tune(MemoryStore.open(before.copy() / "s", mode="w"))
        with shim.counting() as told:
            store = perform(store, before.model, before.operation(kind, before.stamp, before.model))
        store.close()
        for nth in range(1, told[0] + 1):
            for error in ERRORS:
                yield kind, nth, error, False
            yield kind, nth, errno.ENOSPC, True  # until there is room again


def tried(before: Before, shim: Shim, kind: str, nth: int, error: int, lasting: bool) -> str:
    """What became of an operation whose nth call fails: "refused" or "done"."""
    try:
        return _tried(before, shim, kind, nth, error, lasting)
    except Exception as broken:
        name = f"{errno.errorcode[error]} {'from' if lasting else 'at'} call {nth} of a {kind}"
        raise Broken(f"{name}: {type(broken).__name__}: {broken}") from broken


def _tried(before: Before, shim: Shim, kind: str, nth: int, error: int, lasting: bool) -> str:
    folder = before.copy()
    path, model = folder / "s", before.model
    operation = before.operation(kind, before.stamp, model)
    store, fate = tune(MemoryStore.open(path, mode="w")), "done"
    allowed = [model, after(model, operation)]
    with shim.refusing(nth, error, lasting):
        try:
            store = perform(store, model, operation)
        except StoreError:
            fate = "refused"
    if kind == "reopen" and store._engine.closed:
        store = tune(MemoryStore.open(path, mode="w"))
    model = allowed[_state(store, allowed, fate)]
    if kind == "backup":
        left = [old.name for old in folder.iterdir() if old.name != "s"]
        if left != ([operation.name] if fate == "done" else []):
            raise Broken(f"{fate}, and there is {left}")
        judge_copies(folder, allowed[fate == "done"], "copy")
    for stamp, again in enumerate(["small commit", "bulk commit", "compact"], before.stamp + 1):
        one = before.operation(again, stamp, model)
        store = perform(store, model, one)
        model = after(model, one)
        if why := difference(store, model):
            raise Broken(f"a {again} afterwards: {why}")
    if faults := store.verify():
        raise Broken(f"verify() finds {faults[0]}")
    store._engine.closed = True  # as a process that ends here
    store._engine.release()
    judge(path, [model], "on disk")
    return fate


def _state(store: MemoryStore, allowed: list[Model], fate: str) -> int:
    """In which of two states an open store is: as before where the call was refused and is all or nothing."""
    said = []
    for at in (1, 0) if fate == "done" else (0, 1):
        why = difference(store, allowed[at])
        if not why and store.snapshots() != list(allowed[at].snapshots):
            why = f"snapshots are {store.snapshots()}"
        if not why and at == 0 and fate == "done":
            why = "" if difference(store, allowed[1]) == "" else "done, and nothing changed"
        if not why and at == 1 and fate == "refused" and allowed[1].generation > allowed[0].generation:
            why = "refused, and committed"
        if not why:
            return at
        said.append(why)
    raise Broken(f"{fate}: {said}")


def run(shim: Shim, folder: Path, count: int | None, seed: str, worker: int = 0, workers: int = 1) -> dict:
    """``count`` trials, or of all of them a worker's share."""
    told: Counter[str] = Counter()
    (folder / "before").mkdir()
    before = Before(folder, seed)
    shim.watch(folder / "now")
    every, faults = list(trials(before, shim)), Faults()
    for one in every[worker::workers] if count is None else random.Random(seed).sample(every, count):
        with faults.trial():
            told["calls refused"] += 1
            told[f"operations {tried(before, shim, *one)}"] += 1
    faults.tell()
    return {**told, "wrong states": 0}
