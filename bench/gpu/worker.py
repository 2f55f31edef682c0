"""A process that does what may end it: ``python -m bench.gpu.worker MODE ...``, started by :mod:`bench.gpu.stages`.

It prints one object a line. ``look``, ``plan`` and ``precompile`` print one answer. ``contract`` and ``speed`` read
tasks from standard input; before each row they say which one begins, so that whoever listens knows which row ended the
process, and then what came of it. After a CUDA error the process ends itself with status ``POISONED``: a context that
has met an illegal address fails every later call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import torch

from .processes import POISONED
from .rows import FAILED, KEY, PASSED

# What torch, this library's own kernels and Triton say of an error that the driver reported.
CUDA_ERRORS = ("CUDA error", "CUDA says", "Triton Error [CUDA]")

Say = Callable[[dict], None]


def contract(say: Say, device: str, tasks: list[dict]) -> None:
    """Rows of the contract grid, one direction after the other."""
    from memkernels.registration import OPS
    from memkernels.testing import CASES, Subject

    named = {case.name: case for case in CASES}
    for task in tasks:
        row = {name: task[name] for name in ("op", "backend", "dtype", "case")} | {"direction": "forward"}
        say({"begin": row})
        begun = time.monotonic()
        try:
            subject = Subject(OPS[task["op"]], named[task["case"]], getattr(torch, task["dtype"]), device)
            row["directions"] = [d for d in subject.directions() if d not in task["without"]]
        except Exception as error:
            _report(say, {**row, "directions": ["forward"]}, _first_line(error), device, begun)
            continue
        for direction in (d for d in row["directions"] if d not in task["done"]):
            row["direction"] = direction
            say({"begin": row})
            begun = time.monotonic()
            found = subject.rows(task["backend"], [direction])[0]
            numbers = {"error": found.error, "tolerance": found.tolerance}
            _report(say, {**row, **numbers}, "" if found.passed else found.message, device, begun)


def launch(say: Say, device: str, tasks: list[dict]) -> None:
    """The same rows over a device that records instead of running."""
    from .unjudged import unjudge

    unjudge()
    contract(say, device, tasks)


def speed(say: Say, device: str, tasks: list[dict]) -> None:
    """Cases of the benchmark, each on one backend: whole on a GPU, small on a CPU, where they only prove this path."""
    from .. import cases, results
    from ..ceilings import Ceilings
    from ..harness import Settings, run_case
    from .plan import case_key, environment

    settings = Settings(device, torch.get_num_threads(), quick=device == "cpu")
    where = environment(device)
    ceilings = Ceilings(device, settings.threads, True, where["isa"])
    ceilings.refresh()
    known = {case_key(case, device): case for case in cases.all_cases(device)}
    for task in tasks:
        row = {name: task[name] for name in KEY}
        say({"begin": row})
        begun = time.monotonic()
        case = known[tuple(row[name] for name in KEY if name != "backend")]
        try:
            measured = run_case(case, settings, backend=task["backend"])
            ceilings.look()
            row["speed"] = results.complete(measured, case, ceilings, where)
            why = measured["why"]
        except Exception as error:
            why = _first_line(error)
        _report(say, row, why, device, begun)


def _report(say: Say, row: dict, why: str, device: str, begun: float) -> None:
    """Say what came of a row; end the process where later rows would only repeat its error."""
    error = _unsettled(device)
    why = why or error
    say({**row, "status": FAILED if why else PASSED, "message": why, "seconds": round(time.monotonic() - begun, 3)})
    if error or any(words in why for words in CUDA_ERRORS):
        os._exit(POISONED)  # what runs at exit would wait for the device


def _unsettled(device: str) -> str:
    """The error that the device has met; empty where it is well."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]:.300}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker", description=__doc__)
    parser.add_argument("mode", choices=("look", "plan", "precompile", "contract", "launch", "speed"))
    parser.add_argument("words", nargs="*", help="what the mode takes")
    options = parser.parse_args()
    mode, words = options.mode, options.words
    # Standard output belongs to the messages: what a library prints goes to the log.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: dict) -> None:
        output.write(json.dumps(message, default=str) + "\n")
        output.flush()

    if mode in ("contract", "launch", "speed"):
        globals()[mode](say, words[0], json.load(sys.stdin))
    elif mode == "look":
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        say({"torch": torch.__version__, "gpu": gpu})
    elif mode == "plan":
        from .plan import plan

        say(plan(words[0], json.loads(words[1]), json.loads(words[2])))
    elif mode == "precompile":
        from ..precompile import precompile

        say(precompile(jobs=int(words[0]), deadline=float(words[1])))
    output.close()
    os._exit(0)  # everything is said; threads of torch that end after this have aborted the process


if __name__ == "__main__":
    main()
