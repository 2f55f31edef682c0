"""python -m crash [part ...]: runs the laboratory, prints a line for each part, and fails where the store does.

``--quick`` is what ``make test`` runs; without it, the long form takes the better part of an hour on two cores, and
``--write FILE`` keeps what it found.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .shim import Shim, enter

if __name__ == "__main__":
    enter("crash")

import torch

from . import flips, kills, mutants, power, readers, refusals
from .judge import Broken, forked, status_of

PARTS = ("kills", "power", "flips", "refusals", "readers", "mutants")
Work = Callable[[Shim, Path], dict]


def works(part: str, quick: bool, seed: int, workers: int, minutes: float) -> list[Work]:
    """What the processes of a part run, each in a folder of its own."""
    names = [f"{seed}.{worker}" for worker in range(workers)]
    if part == "kills":
        count = -(-(30 if quick else 1000) // workers)
        return [functools.partial(kills.run, count=count, seed=name) for name in names]
    if part == "power":
        count = -(-(100 if quick else 2000) // workers)
        return [functools.partial(power.run, count=count, seed=name) for name in names]
    if part == "flips":
        some = {"count": 300, "headers": 300} if quick else {"count": 100_000}
        run = functools.partial(flips.run, seed=str(seed), workers=workers, seconds=60 * minutes, **some)
        return [functools.partial(run, worker=worker) for worker in range(workers)]
    if part == "refusals":
        run = functools.partial(refusals.run, count=60 if quick else None, seed=str(seed), workers=workers)
        return [functools.partial(run, worker=worker) for worker in range(workers)]
    if part == "readers":
        return [functools.partial(readers.run, seconds=2.0 if quick else 60.0)]
    return [mutants.run]


def told(part: str, options: argparse.Namespace) -> dict:
    """What the processes of a part counted, together."""
    begin = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        children = []
        for number, work in enumerate(works(part, options.quick, options.seed, options.workers, options.minutes)):
            folder = Path(name) / str(number)
            folder.mkdir()
            children.append(forked(functools.partial(_run, work, folder)))
        broken = [child for child in children if status_of(child) != 0]
        if broken:
            raise Broken(f"{part}: {len(broken)} of {len(children)} processes found a fault")
        found: Counter[str] = Counter()
        for number in range(len(children)):
            found.update(json.loads((Path(name) / f"{number}" / "told.json").read_text()))
    return {**found, "seconds": round(time.monotonic() - begin)}


def _run(work: Work, folder: Path) -> None:
    (folder / "work").mkdir()
    found = work(Shim(), folder / "work")
    (folder / "told.json").write_text(json.dumps(found))


def about() -> dict:
    """When, and on what, the laboratory ran."""
    return {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="crash", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all where none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes of a part")
    parser.add_argument("--minutes", type=float, default=math.inf, help="the most that changes at random may take")
    parser.add_argument("--write", type=Path, help="a file for the counts; parts that did not run stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for part in options.parts or PARTS:
        try:
            found = told(part, options)
        except Broken as error:
            print(error, flush=True)
            failed = True
            continue
        print(f"{part}: {', '.join(f'{count:,} {name}' for name, count in found.items())}", flush=True)
        if options.write is not None:
            old = json.loads(options.write.read_text()) if options.write.exists() else {}
            parts = {**old.get("parts", {}), part: {**found, **about()}}
            options.write.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
