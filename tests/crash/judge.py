"""The law: what is found after a crash is one of the states that it may be, whole, with its snapshots and copies."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from memkernels.store import MemoryStore

from .history import LOTS, Model, difference, filtered


class Broken(AssertionError):
    """The store broke its word."""


def judge(path: Path, allowed: list[Model], what: str) -> int:
    """Open the store and compare; returns which of the allowed states it is in, of equal ones the last."""
    with _told(what), MemoryStore.open(path) as store:
        names, said = store.snapshots(), []
        for at in reversed(range(len(allowed))):
            model = allowed[at]
            why = difference(store, model) or ("" if list(model.snapshots) == names else f"snapshots {names}")
            why = why or filtered(store, model, at % LOTS)
            if not why:
                break
            said.append(f"{at}: {why}")
        else:
            raise Broken("; ".join(said[:3]))
        if faults := store.verify():
            raise Broken(f"verify() finds {faults[0]}")
        for name, old in model.snapshots.items():
            with MemoryStore.open(path, snapshot=name) as one:
                if why := difference(one, old):
                    raise Broken(f"snapshot {name}: {why}")
        return at


def judge_copies(folder: Path, model: Model, what: str) -> None:
    for name, old in model.copies.items():
        judge(folder / name, [old], f"{what}, {name}")


def goes_on(path: Path, model: Model, what: str) -> None:
    """What a crash left takes a commit, and is sound when it is closed."""
    with _told(what):
        with MemoryStore.open(path, mode="w") as store:
            store.append(torch.ones(1, 8), torch.ones(1, 4))
        with MemoryStore.open(path) as store:
            if (store.generation, len(store), store.verify()) != (model.generation + 1, len(model.live) + 1, []):
                raise Broken(f"after one more commit: {store.generation}, {len(store)}, {store.verify()[:1]}")


class Faults:
    """What trials that do not depend on each other found: all is told at the end, so that one run shows every fault."""

    def __init__(self) -> None:
        self.found: list[Broken] = []

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        try:
            yield
        except Broken as error:
            self.found.append(error)

    def tell(self) -> None:
        if self.found:
            raise Broken(f"{len(self.found)} faults:\n" + "\n".join(map(str, self.found[:20])))


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Any error in the block as a broken law that says where it was."""
    try:
        yield
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__}: {error}") from error


def forked(work: Callable[[], object]) -> int:
    """A process that runs ``work``; its exit status is 0 where that ends well."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
