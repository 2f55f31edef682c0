"""Jobs: rows for one process. Where it dies, the row it was at is failed and a fresh process goes on behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import rows
from .processes import POISONED, OutOfTime, Stop, ending, messages, start, worker
from .rows import FAILED, PASSED, Rows

DIRECTIONS = ("forward", "backward", "in place")
GIVE_UP = 3  # processes in a row of which nothing passed: more would tell nothing new
MOST_AT_ONCE = 8  # processes: each has a context on the device and torch in memory
BEFORE = {"dtype": "-", "case": "before the first row", "direction": "-"}
REST = {"dtype": "-", "case": "the rest", "direction": "-"}


@dataclass(frozen=True)
class Job:
    """Tasks for one process. ``around``: a program that runs it."""

    stage: str
    mode: str
    name: str
    tasks: Sequence[dict]
    around: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def key(self, task: dict, direction: str) -> tuple:
        return rows.key({"stage": self.stage, **task, "direction": direction})

    def left(self, done: Rows) -> list[dict]:
        """The tasks of which rows are missing, each with the directions that are there."""
        found = []
        for task in self.tasks:
            possible = [task["direction"]] if "direction" in task else DIRECTIONS
            there = {d: row for d in possible if (row := done.get(self.key(task, d))) is not None}
            wanted = {d for row in there.values() for d in row.get("directions", [row["direction"]])}
            if not there or wanted - set(there):
                found.append({**task, "done": list(there)})
        return found


@dataclass(frozen=True)
class Ended:
    """How a process ended: the row that it was at, whether any row passed, and why it ended if not well."""

    began: dict | None
    passed: bool
    why: str


@dataclass
class Crew:
    """Runs jobs. ``patience``: seconds that one row may take."""

    device: str
    folder: Path
    stop: Stop
    patience: float

    @property
    def size(self) -> int:
        return min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)

    def run(self, jobs: Sequence[Job], done: Rows, until: float, at_once: int) -> None:
        """Run all jobs, ``at_once`` beside each other, until the time ``until`` of the monotonic clock."""
        threads = max(1, len(os.sched_getaffinity(0)) // at_once)
        with ThreadPoolExecutor(at_once) as pool:
            for finished in [pool.submit(self.survive, job, done, until, threads) for job in jobs]:
                finished.result()

    def survive(self, job: Job, done: Rows, until: float, threads: int) -> None:
        """Run the tasks of a job to the end, with as many processes as it takes."""
        in_vain = 0
        while (tasks := job.left(done)) and not self.stop.asked and time.monotonic() < until:
            if in_vain == GIVE_UP:
                self._fail(
                    job, done, {**tasks[0], **REST}, f"not run: {GIVE_UP} processes in a row died, nothing passed"
                )
                return
            ended = self._run(job, tasks, done, until, threads)
            if self.stop.asked:
                return
            if ended.why:
                self._fail(job, done, ended.began or {**tasks[0], **BEFORE}, ended.why)
                if ended.began is None:
                    return
            in_vain = 0 if ended.passed else in_vain + 1

    def _run(self, job: Job, tasks: Sequence[dict], done: Rows, until: float, threads: int) -> Ended:
        """One process, from its start to its end or to ``until``."""
        log = self.folder / "logs" / f"{job.name}.log"
        environment = {"OMP_NUM_THREADS": str(threads), **job.environment}
        process = start([*job.around, *worker(job.mode, self.device)], log, environment, tasks)
        began, passed = None, False
        with self.stop.watches(process):
            try:
                for message in messages(process, self.patience, until):
                    began = message.get("begin")
                    if began is None:
                        done.add({"stage": job.stage, **message})
                        passed |= message["status"] == PASSED
            except TimeoutError:
                return Ended(began, passed, f"no result after {self.patience:g} s")
            except OutOfTime:
                return Ended(None, passed, "")
            why = ending(process, log)
        if began is None and process.returncode == POISONED:  # it has told which row that was
            why = ""
        return Ended(began, passed, why)

    @staticmethod
    def _fail(job: Job, done: Rows, row: dict, why: str) -> None:
        where = {name: row[name] for name in (*rows.KEY, "directions") if name in row}
        done.add({"stage": job.stage, **where, "status": FAILED, "message": why})
