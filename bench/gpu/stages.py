"""The stages of a check. Each takes what time it is given, and leaves a row for whatever it did."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import rows
from .jobs import Crew, Job
from .processes import ROOT, OutOfTime, Stop, ask, ending, lines, start
from .rows import FAILED, PASSED, Rows

SANITIZER = "compute-sanitizer"
SLOWER = {"speed": 3, "sanitize": 10}  # times longer that a row may take: peers are compiled, each access is looked at
# Memory that torch keeps for later is valid to memcheck: without it, a read beyond a tensor shows.
TOOLS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+)", re.MULTILINE)
FINDING = re.compile(r"^========= (?!COMPUTE-SANITIZER|\w+ SUMMARY|\s)(.*)", re.MULTILINE)


@dataclass
class Check:
    """One run of the program over one folder. ``patience``: seconds that a row may take."""

    device: str
    folder: Path
    rows: Rows
    stop: Stop
    patience: float
    ops: Sequence[str]
    backends: Sequence[str]

    @functools.cached_property
    def plan(self) -> dict:
        """What there is to do. RuntimeError where this cannot be found out; ValueError: an op or backend is unknown."""
        names = (json.dumps(list(self.ops)), json.dumps(list(self.backends)))
        found = ask(self.stop, self.log("plan"), math.inf, "plan", self.device, *names)
        if "wrong" in found:
            raise ValueError(found["wrong"])
        return found

    def crew(self, slower: float = 1) -> Crew:
        return Crew(self.device, self.folder, self.stop, slower * self.patience)

    @property
    def cache(self) -> dict[str, str]:
        """Triton's compiled kernels lie beside the results: the next run in the same folder finds them."""
        return {"TRITON_CACHE_DIR": str(self.folder / "triton-cache")}

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace(' ', '-')}.log"

    def jobs(self, stage: str, tasks: Sequence[dict], environment: Mapping[str, str] | None = None) -> list[Job]:
        """A job for each op on each backend."""
        groups: dict[str, list[dict]] = {}
        for task in tasks:
            groups.setdefault(f"{stage}-{task['op']}-{task['backend']}", []).append(task)
        environment = {**self.cache, **(environment or {})}
        return [Job(stage, "contract", name, group, environment=environment) for name, group in groups.items()]

    def note(self, stage: str, case: str, why: str | None, message: str = "", **where: str) -> None:
        """A row of what is no case of an op; ``why`` it failed."""
        row = {name: where.get(name, "-") for name in rows.KEY} | {"case": case}
        self.rows.add({"stage": stage, **row, "status": FAILED if why else PASSED, "message": why or message})

    def has(self, stage: str, case: str, **where: str) -> bool:
        return rows.key({"stage": stage, **dict.fromkeys(rows.KEY, "-"), "case": case, **where}) in self.rows

    def program(
        self, stage: str, name: str, until: float, command: Sequence[str], each: Callable, **environment
    ) -> bool:
        """Run a program, ``each`` line of it heard, unless an earlier run has; note how it ended, and whether well."""
        if self.has(stage, name):
            return True
        log = self.log(name)
        log.unlink(missing_ok=True)
        process = start(command, log, environment)
        try:
            with self.stop.watches(process), log.open("a") as file:
                for line in lines(process, math.inf, until):
                    print(line, file=file, flush=True)
                    each(line)
                why = ending(process, log)
        except OutOfTime:
            print(f"{stage}: {name}: the time was over before the end")
            return False
        if not self.stop.asked:
            self.note(stage, name, why)
        return not why


def build(check: Check, until: float) -> None:
    """The native libraries, with the CUDA kernels where nvcc is; then the Triton kernels, on all cores."""
    built = ("native libraries", until, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], lambda line: None)
    cuda = check.device == "cuda"
    if not check.program("build", *built, MEMKERNELS_CUDA=str(int(cuda))) and cuda:
        name, *rest = built  # what stands without nvcc still serves
        check.program("build", f"{name} without CUDA", *rest, MEMKERNELS_CUDA="0")
    check.program("build", "info", until, [sys.executable, "-m", "memkernels", "info"], print)
    vars(check).pop("plan", None)  # it was made before the build
    missing = check.plan["missing"]
    if cuda and "cuda" in missing and (ROOT / "memkernels" / "_lib" / "libmemkernels_cuda.so").exists():
        check.note("build", "the CUDA library loads", missing["cuda"], backend="cuda")
    if cuda and "triton" not in missing and not check.has("build", "precompile", backend="triton"):
        _precompile(check, until)


def _precompile(check: Check, until: float) -> None:
    """For half of the time at most: a kernel that is not there yet is compiled in its first row."""
    half = time.monotonic() + (until - time.monotonic()) / 2
    words = ("precompile", str(len(os.sched_getaffinity(0))), str(half))
    try:
        found = ask(check.stop, check.log("precompile"), until, *words, environment=check.cache)
        check.note("build", "precompile", None, json.dumps(found), backend="triton")
    except RuntimeError as error:
        if not check.stop.asked:
            check.note("build", "precompile", str(error), backend="triton")
    except OutOfTime:
        print("build: precompile: the time was over before the end")


def smoke(check: Check, until: float) -> None:
    """The telling cases of the contract grid."""
    _contract(check, "smoke", check.plan["rounds"][0], until)


def grid(check: Check, until: float) -> None:
    """The whole contract grid, what tells most first."""
    for tasks in check.plan["rounds"]:
        _contract(check, "grid", tasks, until)


def _contract(check: Check, stage: str, tasks: Sequence[dict], until: float) -> None:
    for row in check.plan["gaps"]:
        if rows.key(row) not in check.rows:
            check.rows.add(row)
    crew = check.crew()
    crew.run(check.jobs(stage, tasks), check.rows, until, crew.size)


def speed(check: Check, until: float) -> None:
    """One case after the other, alone on the machine; only what the smoke found right."""
    telling = {(t["op"], t["backend"], t["dtype"], t["case"]) for t in check.plan["rounds"][0]}
    smoke = [row for row in check.rows if rows.key(row)[0] == "grid" and rows.key(row)[1:-1] in telling]
    jobs: dict[str, list[dict]] = {}
    for task in check.plan["speed"]:
        if why := _why_not_timed(task, smoke):
            print(rows.describe({**task, "stage": "speed", "message": f"not timed, {why}"}))
        else:
            jobs.setdefault(task["op"], []).append(task)
    todo = [Job("speed", "speed", f"speed-{op}", tasks, environment=check.cache) for op, tasks in jobs.items()]
    check.crew(SLOWER["speed"]).run(todo, check.rows, until, at_once=1)


def _why_not_timed(task: dict, smoke: Sequence[dict]) -> str:
    """Forward is timed where forward is right, backward where both are."""
    own = [
        row["status"]
        for row in smoke
        if (row["op"], row["backend"]) == (task["op"], task["backend"])
        and row["direction"] in ("forward", task["direction"])
    ]
    return "as rows of its smoke failed" if FAILED in own else "" if PASSED in own else "as its smoke has not run"


def sanitize(check: Check, until: float) -> None:
    """The telling cases under compute-sanitizer."""
    if shutil.which(SANITIZER) is None:
        print(f"sanitize: {SANITIZER} is not on the path; it comes with the CUDA toolkit")
        return
    crew = check.crew(SLOWER["sanitize"])
    for tool, environment in TOOLS.items():
        jobs = []
        for job in check.jobs(tool, check.plan["rounds"][0], environment):
            around = (SANITIZER, "--tool", tool, "--report-api-errors", "no")
            around += ("--log-file", str(check.folder / "logs" / f"{job.name}.%p.txt"))
            jobs.append(dataclasses.replace(job, around=around))
        crew.run(jobs, check.rows, until, crew.size)
        for job in jobs:
            texts = [file.read_text(errors="replace") for file in check.folder.glob(f"logs/{job.name}.*.txt")]
            numbers = [int(number) for text in texts for number in SUMMARY.findall(text)]
            if numbers:
                found = next((line for text in texts for line in FINDING.findall(text)), "")
                why = f"{sum(numbers)} reports, the first: {found}" if any(numbers) else None
                check.note(tool, "report", why, op=job.tasks[0]["op"], backend=job.tasks[0]["backend"])


def tune(check: Check, until: float) -> None:
    """Launch configurations of the Triton kernels, measured; the table as it stands when the time is over."""
    if check.device != "cuda":
        print("tune: launch configurations are measured on a GPU")
        return

    def each(line: str) -> None:
        print(line)
        check.note("tune", line, None)

    check.program("tune", "bench.tune", until, [sys.executable, "-m", "bench.tune"], each, **check.cache)
    shutil.copy(ROOT / "triton_kernels" / "configs.json", check.folder)


# In this order, with the share of what time is left that each may take where others follow.
STAGES = {
    "build": (build, 0.6),
    "smoke": (smoke, 0.5),
    "sanitize": (sanitize, 0.5),
    "speed": (speed, 0.8),
    "tune": (tune, 0.5),
    "grid": (grid, 1.0),
}
USUAL = ("build", "smoke", "speed", "grid")
