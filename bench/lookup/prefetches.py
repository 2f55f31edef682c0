"""Rows fetched while a layer runs: how much of the fetch the layer after it sees."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memkernels.store import RowTable, StoreFormat

from ..contests.contest import Contest, same
from ..contests.disk import forget
from ..contests.finding import TOLD, Finding, Goal, lacking, most
from .cold import THREADS, Draw
from .setting import OUT, Setting

TIERS = ("direct", "mmap")
COUNT, FEW = 8_192, 32  # rows of a step
STEPS = 4  # of a call
SIDE = 256  # of the matrices of a step
ALONE, AFTER, FETCH = "the steps alone", "gather, then the step", "the fetches alone"
SHARE = Goal(unit="share")
GOALS = {"as long as": most(0.03, "share"), "twice as long as": SHARE}


class Step:
    """A stand-in for a layer: products of matrices on one thread, as many as take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        generator = torch.Generator().manual_seed(35)
        self.a, self.b = torch.randn(2, SIDE, SIDE, generator=generator)
        self.out, self.count = torch.empty(SIDE, SIDE), 64
        once = statistics.median(_timed(self) for _ in range(5)) / self.count
        self.count = max(1, round(seconds / once))

    def __call__(self) -> None:
        for _ in range(self.count):
            torch.mm(self.a, self.b, out=self.out)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Cold:
    """A table that has no row in memory, again and again, and the slots of the steps of a call."""

    def __init__(self, setting: Setting, tier: str) -> None:
        self.path, self.tier = setting.file, tier
        self.draw = Draw(setting.content, setting.size(COUNT, FEW))
        self.table: RowTable | None = None

    def __call__(self) -> None:
        """Let go of the table, of what the system has of its file, and take other blocks."""
        self.close()
        forget(self.path)
        self.table = RowTable.open(self.path, tier=self.tier, threads=THREADS, out_dtype=OUT)
        self.slots = []
        for _ in range(STEPS):
            self.draw.next()
            self.slots.append(self.draw.slots)
        self.table.prefetch(self.draw.slots[:1]).wait()  # starts the threads

    def close(self) -> None:
        if self.table is not None:
            self.table.close()


def prefetch(setting: Setting) -> Iterator[Finding]:
    """``RowTable.prefetch`` one layer ahead of a step that takes as long as the fetch, and of one twice as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for tier in TIERS:
            yield from _of(setting, tier)
    finally:
        torch.set_num_threads(threads)


def _of(setting: Setting, tier: str) -> Iterator[Finding]:
    cold = Cold(setting, tier)
    try:
        cold()
    except StoreFormat as error:
        what = f"prefetch one layer ahead, tier {tier}"
        yield lacking(what, ALONE, GOALS["as long as"], f"no O_DIRECT here ({error})")
        return
    fetch = statistics.median(_timed(lambda: fetched(cold)) / STEPS for _ in range(3) if cold() is None)
    for times, (words, goal) in enumerate(GOALS.items(), 1):
        yield from _ahead(setting, cold, Step(times * fetch), words, goal)
    cold.close()


def _ahead(setting: Setting, cold: Cold, step: Step, words: str, goal: Goal) -> Iterator[Finding]:
    def ahead() -> Tensor:
        for slots in cold.slots:
            ticket = cold.table.prefetch(slots)
            step()
            rows = ticket.wait()
        return rows

    def after() -> Tensor:
        for slots in cold.slots:
            rows = cold.table.gather(slots)
            step()
        return rows

    def alone() -> None:
        for _ in cold.slots:
            step()

    def check(rows: Tensor) -> None:
        same(rows, setting.content.rows(cold.slots[-1]))

    what = f"{STEPS} steps, each {words} its fetch of {len(cold.slots[0])} cold rows, tier {cold.tier}"
    contest = Contest(what, ahead, check, cold)
    contest.enter(AFTER, after)
    contest.enter(FETCH, lambda: fetched(cold), check)
    contest.enter(ALONE, alone, lambda found: None)
    contest.run(setting.seconds)
    yield contest.beyond(f"{what}: what shows of a prefetch one layer ahead", ALONE, goal)
    yield contest.beyond(f"{what}: what shows of a gather before each step", ALONE, SHARE, AFTER)
    yield contest.between(f"{what}: the fetches alone", FETCH, ALONE, TOLD, ALONE)


def fetched(cold: Cold) -> Tensor:
    """The rows of all steps, one fetch after the other."""
    for slots in cold.slots:
        rows = cold.table.prefetch(slots).wait()
    return rows


ROWS = {"prefetch": prefetch}
