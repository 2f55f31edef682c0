"""Power cuts: a history is traced once, and cut at many points; of what was not synced any part may be left.

Afterwards everything that was acknowledged is there, whole; with durability="batch" all operations up to some point.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from memkernels.store import MemoryStore

from . import disk
from .history import Model, Operation, after, choose, create, perform, tune
from .judge import Broken, forked, goes_on, judge, judge_copies, status_of
from .shim import Shim

LONG = 40  # operations of a history
LIFE = 14  # operations of a process, which is killed after them
BEGIN = -1  # the note with which a process begins
CUTS = 50  # of a history
BATCH = 4  # one history in so many has durability="batch"


def write(shim: Shim, folder: Path, trace: Path, operations: list[tuple[Model, Operation]], durability: str) -> None:
    """A part of the history, as a process that is killed after it; a note of its number after each operation.

    The first part begins with the creation, which is number 0.
    """
    path = folder / "s"
    shim.watch(folder)
    shim.record(trace)
    shim.note(BEGIN)
    if not path.exists():
        store = create(path)
        shim.note(0)
        store.close()
    store = tune(MemoryStore.open(path, mode="w", durability=durability))
    for model, operation in operations:
        store = perform(store, model, operation, durability)
        shim.note(operation.stamp)
    os._exit(0)


def history(seed: str) -> tuple[list[tuple[Model, Operation]], list[Model]]:
    """The operations, each with the model before it; and the models after 0, 1, ... of them."""
    operations, models = [], [Model()]
    for stamp in range(1, LONG + 1):
        operations.append((models[-1], choose(models[-1], seed, stamp)))
        models.append(after(*operations[-1]))
    return operations, models


def run(shim: Shim, folder: Path, count: int, seed: str) -> dict:
    told = {"cuts": 0, "histories": 0, "calls traced": 0, "before the store was there": 0}
    told |= {"calls lost": 0, "writes torn": 0, "entries lost": 0, "acknowledged lost": 0}
    while told["cuts"] < count:
        durability = "batch" if told["histories"] % BATCH == BATCH - 1 else "commit"
        _one(shim, folder, f"{seed}.{told['histories']}", min(CUTS, count - told["cuts"]), durability, told)
        told["histories"] += 1
    return told


def _one(shim: Shim, folder: Path, seed: str, cuts: int, durability: str, told: dict) -> None:
    here, trace, there = folder / "here", folder / "trace", folder / "cut"
    here.mkdir()
    operations, models = history(seed)
    for first in range(0, LONG, LIFE):
        part = operations[first : first + LIFE]
        if status_of(forked(lambda part=part: write(shim, here, trace, part, durability))) != 0:
            raise Broken(f"history {seed} did not come to its end")
    shutil.rmtree(here)
    traced = list(disk.calls(trace))
    trace.unlink()
    draw, now, done = random.Random(seed), disk.Disk(here), -1
    points = sorted(draw.choices(range(len(traced) + 1), k=cuts))
    for at in range(len(traced) + 1):
        while points and points[0] == at:
            points.pop(0)
            there.mkdir()
            now.cut(draw, there, told)
            _check(there, models, operations, done, durability, f"{durability} history {seed}, cut at call {at}", told)
            shutil.rmtree(there)
            told["cuts"] += 1
        if at < len(traced):
            if traced[at].kind != disk.NOTE:
                now.take(traced[at])
            elif traced[at].offset == BEGIN:
                now.open.clear()
            else:
                done = traced[at].offset
    told["calls traced"] += len(traced)


def _check(
    there: Path, models: list[Model], operations: list, done: int, durability: str, what: str, told: dict
) -> None:
    """``done``: the last operation that was acknowledged, -1 before the creation was."""
    path = there / "s"
    if done < 0 and not path.exists():
        told["before the store was there"] += 1
        return
    last = min(max(done, 0) + 1, len(models) - 1)
    first = 0 if durability == "batch" else max(done, 0)
    what = f"{what}, in operation {last}, {operations[last - 1][1].kind}"
    found = first + judge(path, models[first : last + 1], what)
    if operations[last - 1][1].kind != "backup":  # it removes the old ones
        judge_copies(there, models[max(done, 0)], what)
    goes_on(path, models[found], what)
