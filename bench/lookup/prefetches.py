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
from ..contests.finding import Finding, Goal, lacking, most
from .cold import THREADS, Draw
from .setting import OUT, Setting

TIERS = ("direct", "mmap")
COUNT, FEW = 8_192, 32  # rows of a step
STEPS = 4  # of a call
SIDE = 256  # of the matrices of a step
ALONE, AFTER = "the step alone", "gather, then the step"
SHARE = Goal(unit="share")


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
    """``RowTable.prefetch`` one layer ahead of a step that takes as long as the fetch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for tier in TIERS:
            yield from _of(setting, tier)
    finally:
        torch.set_num_threads(threads)


def _of(setting: Setting, tier: str) -> Iterator[Finding]:
    cold, what = Cold(setting, tier), f"prefetch one layer ahead, tier {tier}"
    try:
        cold()
    except StoreFormat as error:
        yield lacking(what, ALONE, most(0.03, "share"), f"no O_DIRECT here ({error})")
        return
    step = Step(statistics.median(_fetch(cold) for _ in range(3)))

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

    what = f"{what}: time of {STEPS} steps, each as long as the fetch of {len(cold.slots[0])} cold rows, beyond"
    contest = Contest(what, ahead, lambda rows: same(rows, setting.content.rows(cold.slots[-1])), cold)
    contest.enter(AFTER, after)
    contest.enter(ALONE, alone, lambda found: None)
    contest.run(setting.seconds)
    cold.close()
    yield contest.beyond(f"{what} that of the steps alone", ALONE, most(0.03, "share"))
    yield contest.beyond(f"{what} that of the steps alone, without prefetch", ALONE, SHARE, AFTER)


def _fetch(cold: Cold) -> float:
    """Seconds of a step's rows."""
    cold()
    return statistics.median(_timed(lambda slots=slots: cold.table.prefetch(slots).wait()) for slots in cold.slots)


ROWS = {"prefetch": prefetch}
