"""Processes that may die: what they say is heard line by line, and what ended them is told in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
POISONED = 77  # exit status of a worker after a CUDA error: every later call of its process would fail too
START = 180.0  # seconds until a process must have said something: it imports torch and makes a CUDA context

ERROR = re.compile(r"(^|: )(fatal )?error: |^CMake Error")  # of a compiler, whose last line tells nothing


class OutOfTime(Exception):
    """The time of a stage is over."""


class Stop:
    """What is running, and whether somebody asked to stop it: at once then, and nothing more starts."""

    def __init__(self) -> None:
        self.asked = False
        self._running: set[subprocess.Popen] = set()

    def now(self) -> None:
        self.asked = True
        for process in tuple(self._running):
            kill(process)

    @contextlib.contextmanager
    def watches(self, process: subprocess.Popen) -> Iterator[None]:
        """``now`` ends ``process``, and so does the end of the block."""
        self._running.add(process)
        if self.asked:
            kill(process)
        try:
            yield
        finally:
            self._running.discard(process)
            kill(process)
            process.wait()
            process.stdout.close()


def kill(process: subprocess.Popen) -> None:
    """End a process and what it started: it leads a process group of its own."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def start(command: Sequence[str], log: Path, environment: Mapping[str, str], stdin: object = None) -> subprocess.Popen:
    """Start a process whose standard output is read here and whose standard error is appended to ``log``."""
    # Its input is a file: a pipe that nobody reads would block.
    with tempfile.TemporaryFile("w+") as given, log.open("a") as errors:
        json.dump(stdin, given)
        given.seek(0)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )


def lines(process: subprocess.Popen, patience: float, until: float) -> Iterator[str]:
    """What a process prints, line by line, as it comes.

    TimeoutError: nothing came for ``patience`` seconds (for ``START`` before the first). OutOfTime: it is ``until``.
    """
    pipe, rest, waits = process.stdout.fileno(), b"", max(START, patience)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise OutOfTime
            if not selector.select(min(waits, left)):
                raise TimeoutError if waits < left else OutOfTime
            if not (data := os.read(pipe, 1 << 16)):
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
                waits = patience


def messages(process: subprocess.Popen, patience: float, until: float) -> Iterator[dict]:
    """The same of a worker, whose lines are objects. NaN becomes None; what a program around it prints is skipped."""
    for line in lines(process, patience, until):
        with contextlib.suppress(ValueError):
            yield json.loads(line, parse_constant=lambda name: None)


def ending(process: subprocess.Popen, log: Path) -> str:
    """Why a process that says nothing more ended before its time, in a sentence; empty where it ended well."""
    try:
        status = process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        return "the process did not end"
    if status == 0:
        return ""
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = next(filter(ERROR.search, said), said[-1] if said else "")
    return f"the process ended with status {status}" + (f": {telling:.300}" if telling else "")


def worker(*words: str) -> list[str]:
    """The command of a worker: a fault of it prints where it was, to its log."""
    return [sys.executable, "-X", "faulthandler", "-m", "bench.gpu.worker", *words]


def ask(stop: Stop, log: Path, until: float, *words: str, environment: Mapping[str, str] | None = None) -> dict:
    """The answer of a worker. RuntimeError says why it gave none; OutOfTime: it is ``until``."""
    process = start(worker(*words), log, environment or {})
    with stop.watches(process):
        try:
            answers = list(messages(process, START, until))
        except TimeoutError:
            raise RuntimeError(f"no answer after {START:.0f} s") from None
        if why := ending(process, log):
            raise RuntimeError(why)
    return answers[0]
