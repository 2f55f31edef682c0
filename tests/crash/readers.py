"""Readers beside a writer: each call of a reader sees one generation, whole, and none before the last that it saw."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from memkernels.store import MemoryStore, _writer

from .history import PAGE, K, V, create
from .judge import Broken, forked, status_of
from .shim import Shim

READERS = 8
SLOTS = 10 * PAGE
BUDGET = 3 * PAGE * 4 * (K + V)  # bytes of pages in memory: three pages, so that most reads go to the disk


def write(path: Path, over: Path) -> None:
    """Commits that change every slot, by way of the log and of pages, with folds and compactions; until ``over`` is."""
    step = 0
    with MemoryStore.open(path, mode="w") as store:
        while not over.exists():
            step += 1
            _writer.SMALL = 20_000 if step % 2 else 1_000
            full = torch.full((SLOTS, 1), float(step))
            store.write(torch.arange(SLOTS), full.expand(-1, K), full.expand(-1, V), [{"step": step}] * SLOTS)
            if step % 4 == 1:
                store._engine.fold(3)
            if step % 50 == 0:
                store.compact()


def follow(path: Path, told: int, end: float) -> None:
    """Reads until the end, and three generations at least; tells how many, and of how many generations."""
    reads = seen = last = 0
    with MemoryStore.open(path, ram_bytes=BUDGET) as store:
        while time.monotonic() < end or seen < 3:
            keys, values = store.read(torch.arange(SLOTS))
            step = int(keys[0, 0])
            if not bool((keys == step).all() and (values == step).all()):
                raise Broken(f"a mixture: keys {keys[:, 0].unique().tolist()}, values {values[:, 0].unique().tolist()}")
            if {one["step"] for one in store.meta(torch.arange(PAGE))} != {step} and store.generation == step + 1:
                raise Broken(f"metadata is not of step {step}")
            later = float(store.softmax_read(torch.zeros(1, K))[0, 0])  # the mean of all values
            if step < last or later < step * (1 - 1e-5):
                raise Broken(f"went back: {last}, {step}, {later}")
            reads, seen, last = reads + 1, seen + (step > last), step
    os.write(told, f"{reads} {seen}\n".encode())


def run(shim: Shim, folder: Path, seconds: float) -> dict:
    path = folder / "s"
    with create(path) as store:
        store.append(torch.zeros(SLOTS, K), torch.zeros(SLOTS, V), [{"step": 0}] * SLOTS)
    end = time.monotonic() + seconds
    out, in_ = os.pipe()
    over = folder / "over"
    writer = forked(lambda: write(path, over))
    children = [forked(lambda: follow(path, in_, end)) for _ in range(READERS)]
    os.close(in_)
    broken = [child for child in children if status_of(child)]
    over.touch()
    if status_of(writer) or broken:
        raise Broken("a reader or the writer broke off")
    told = [[int(n) for n in line.split()] for line in os.read(out, 4096).splitlines()]
    os.close(out)
    with MemoryStore.open(path, mode="w") as store:
        if faults := store.verify():
            raise Broken(f"verify() finds {faults[0]}")
    return {
        "readers": READERS,
        "calls": 3 * sum(reads for reads, _ in told),
        "generations seen": sum(seen for _, seen in told),
        "mixed": 0,
        "going back": 0,
    }
