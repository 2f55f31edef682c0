"""Power cuts: a history is traced once, and cut at many points; of what was not synced any part may be left.

Afterwards everything that was acknowledged is there, whole; with durability="batch" the operations up to some point are.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from memkernels.store import MemoryStore

from . import disk
from .history import Model, Operation, after, choose, create, perform, tune
from .judge import Broken, forked, goes_on, judge, judge_copies, status_of
from .shim import Shim

LONG = 40  # operations of a history
CUTS = 50  # of a history
BATCH = 4  # one history in so many has durability="batch"


def write(shim: Shim, folder: Path, trace: Path, operations: list[tuple[Model, Operation]], durability: str) -> None:
    """The history, with a note of its number after each operation; 0 is the creation."""
    shim.watch(folder)
    shim.record(trace)
    store = create(folder / "s")
    shim.note(0)
    if durability == "batch":
        store.close()
        store = MemoryStore.open(folder / "s", mode="w", durability=durability)
    store = tune(store)
    for model, operation in operations:
        store = perform(store, model, operation, durability)
        shim.note(operation.stamp)


def history(seed: str) -> tuple[list[tuple[Model, Operation]], list[Model]]:
    """The operations, each with the model before it; and the models after 0, 1, ... of them."""
    operations, models = [], [Model()]
    for stamp in range(1, LONG + 1):
        operations.append((models[-1], choose(models[-1], seed, stamp)))
        models.append(after(*operations[-1]))
    return operations, models


def run(shim: Shim, folder: Path, count: int, seed: str) -> dict:
    told = {"cuts": 0, "histories": 0, "calls traced": 0, "before the store was there": 0}
    told |= {"writes lost": 0, "torn": 0, "lost": 0, "entries lost": 0}
    while told["cuts"] < count:
        durability = "batch" if told["histories"] % BATCH == BATCH - 1 else "commit"
        _one(shim, folder, f"{seed}.{told['histories']}", min(CUTS, count - told["cuts"]), durability, told)
        told["histories"] += 1
    return told


def _one(shim: Shim, folder: Path, seed: str, cuts: int, durability: str, told: dict) -> None:
    here, trace, there = folder / "here", folder / "trace", folder / "cut"
    here.mkdir()
    operations, models = history(seed)
    if status_of(forked(lambda: write(shim, here, trace, operations, durability))) != 0:
        raise Broken(f"history {seed} did not come to its end")
    shutil.rmtree(here)
    traced = list(disk.calls(trace))
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
            if traced[at].kind == disk.NOTE:
                done = traced[at].offset
            else:
                now.take(traced[at])
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
