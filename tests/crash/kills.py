"""Kills: a writer gets SIGKILL at a random moment, or in the middle of a counted system call, again and again.

Afterwards everything that it acknowledged is there, and the operation in flight is there whole or not at all.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

from memkernels.store import MemoryStore, _writer

from .history import Model, after, choose, create, perform, tune
from .judge import Broken, forked, judge, judge_copies, status_of
from .shim import Shim

LONGEST = 0.06  # seconds that a writer lives, of those killed by the clock
CALLS = 600  # system calls that it lives, of the others
WRITE, RENEW = "s", 100  # the store's name; kills after which it begins anew


def write(shim: Shim, path: Path, model: Model, seed: str, stamp: int, told: int, nth: int) -> None:
    """Operations until the end, one byte for each that was acknowledged."""
    _writer.FOLD_COMMITS = 30  # folds in the background too
    shim.watch(path.parent)
    shim.kill(nth)
    store = tune(MemoryStore.open(path, mode="w"))
    os.write(told, b"o")
    while True:
        operation = choose(model, seed, stamp)
        store = perform(store, model, operation)
        os.write(told, b"a")
        model, stamp = after(model, operation), stamp + 1


def until_killed(work, seconds: float | None) -> int:
    """Run ``work(descriptor)`` in a process and kill it; returns how many operations it acknowledged."""
    out, in_ = os.pipe()
    child = forked(lambda: work(in_))
    os.close(in_)
    told = os.read(out, 1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    while part := os.read(out, 4096):
        told += part
    os.close(out)
    if (status := status_of(child)) != -signal.SIGKILL:
        raise Broken(f"the writer ended with {status}")
    return told.count(b"a")


def run(shim: Shim, folder: Path, count: int, seed: str) -> dict:
    told = {"kills": count, "acknowledged": 0, "in flight and there": 0, "in flight and not there": 0}
    told |= {"lost": 0, "torn": 0}
    draw, path = random.Random(seed), folder / WRITE
    for kill in range(count):
        if kill % RENEW == 0:
            for old in folder.iterdir():
                shutil.rmtree(old)
            create(path).close()
            model, stamp = Model(), 1
        by_call = draw.random() < 0.5
        nth = draw.randrange(1, CALLS) if by_call else 0
        here, first = model, stamp
        done = until_killed(
            lambda told, here=here, first=first, nth=nth: write(shim, path, here, seed, first, told, nth),
            None if by_call else draw.uniform(0, LONGEST),
        )
        for _ in range(done):
            model, stamp = after(model, choose(model, seed, stamp)), stamp + 1
        operation = choose(model, seed, stamp)
        what = f"kill {kill} of seed {seed}, in operation {stamp}, {operation.kind}"
        allowed = [model, after(model, operation)]
        there = judge(path, allowed, what)
        if operation.kind == "backup":  # one in flight is there whole or not at all, and others were removed for it
            kept = allowed[1] if (folder / operation.name).exists() else Model()
        else:
            kept = allowed[there]
        judge_copies(folder, kept, what)
        model, stamp = allowed[there], stamp + there
        model.copies = dict(kept.copies)
        for rest in folder.glob(".*"):  # what a killed backup left
            shutil.rmtree(rest)
        told["acknowledged"] += done
        told["in flight and there" if there else "in flight and not there"] += 1
    return told
