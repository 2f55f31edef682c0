"""Bytes on disk after many commits of overwrites, beside a reader and a snapshot."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from memkernels.store import MemoryStore
from memkernels.store._engine import named

from ..contests.contest import same
from ..contests.finding import TOLD, Finding, lacking, most
from ..contests.peers import Lmdb, missing
from .commits import Own, rows_of
from .setting import Memory, Setting, normal

NEEDED, LMDB = "live + pinned", "LMDB"
SCATTERED = 100  # slots of most commits
BULK = 4096  # consecutive slots of each tenth commit
LOOK = 0.01  # seconds after which a reader looks again, and so lets go of what it held


def overwrites(commits: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slots and rows of each commit, the same for everyone."""
    random = np.random.default_rng(5)
    for i in range(commits):
        if i % 10 == 9:
            first = int(random.integers(max(1, len(rows) - BULK)))
            slots = np.arange(first, min(first + BULK, len(rows)))
        else:
            slots = random.choice(len(rows), SCATTERED, replace=False)
        yield slots, rows[random.integers(len(rows), size=len(slots))]


def on_disk(path: Path) -> int:
    """Bytes that the files of a folder take, holes not counted."""
    return sum(512 * file.stat().st_blocks for file in path.rglob("*") if file.is_file())


def needed(store: MemoryStore) -> int:
    """Bytes of the pages that are live, and of those that only snapshots name."""
    engine, total = store._engine, 0
    for name, pinned in engine.pinned().items():
        total += len(np.union1d(named(engine.tables[name]), pinned)) * engine.columns[name].extent_bytes
    return total


@contextlib.contextmanager
def looking(look: Callable[[], object]) -> Iterator[None]:
    """A thread that calls ``look`` again and again."""
    done = threading.Event()

    def again() -> None:
        while not done.wait(LOOK):
            look()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def space(setting: Setting) -> Iterator[Finding]:
    """1,500 commits of overwrites beside a reader, a snapshot half-way; then without the snapshot, compacted."""
    commits = setting.size(1500, 30)
    memory = Memory.make(setting, "space", *normal(setting.size(1 << 19, 1 << 13), 64, 64, seed=6))
    rows = rows_of(memory)
    wanted = rows.copy()
    own = Own(memory)
    what = f"space after {commits} commits of overwrites beside a reader"
    with MemoryStore.open(memory.path) as reader, looking(lambda: len(reader)):
        for i, (slots, new) in enumerate(overwrites(commits, rows)):
            own.write(slots, new)
            wanted[slots] = new
            if i == commits // 2:
                own.store.snapshot("half-way")
        yield _finding(f"{what}, a snapshot half-way", on_disk(memory.path), needed(own.store))
    own.store.drop_snapshot("half-way")
    own.store.compact()
    compacted = on_disk(memory.path)
    yield _finding(f"{what}, compacted", compacted, needed(own.store))
    own.close()
    with MemoryStore.open(memory.path) as store:
        everything = torch.cat(store.read(torch.arange(len(rows))), 1).view(torch.uint8)
        same(everything, torch.from_numpy(wanted))
    yield _lmdb(setting, what, commits, rows, wanted, compacted)
    shutil.rmtree(memory.path)


def _finding(what: str, used: int, wanted: int) -> Finding:
    return Finding(what, NEEDED, most(1.3), used / wanted, used, wanted, "bytes")


def _lmdb(setting: Setting, what: str, commits: int, rows, wanted, compacted: int) -> Finding:
    """The same in LMDB, without syncs, which change nothing of its space."""
    if absent := missing(LMDB):
        return lacking(what, LMDB, TOLD, absent)
    folder = setting.folder / "lmdb"
    peer = Lmdb(folder, rows, sync=False)

    def look() -> None:
        with peer.env.begin():
            time.sleep(LOOK)

    with looking(look):
        for slots, new in overwrites(commits, rows):
            peer.write(slots, new)
    same(torch.from_numpy(peer.read(np.arange(len(rows)))), torch.from_numpy(wanted))
    peer.close()
    used = on_disk(folder)
    shutil.rmtree(folder)
    return Finding(f"{what}, compacted", LMDB, TOLD, compacted / used, compacted, used, "bytes")


ROWS = {"space": space}
