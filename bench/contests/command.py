"""Run rows, print what they find, write it to the result file of this machine. Exit status 1 for a wrong result."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from memkernels.store import _io

from .. import results
from . import finding
from .finding import Finding, Wrong

Row = Callable[[Any], Iterator[Finding]]


def rows_of(groups: Iterable) -> dict[str, Row]:
    """The rows of several modules."""
    return {name: row for group in groups for name, row in group.ROWS.items()}


def measure(name: str, row: Row, setting: Any, where: dict) -> list[dict]:
    """What a row finds, as it stands in the result file. A row that is wrong says so and has no numbers."""
    found = []
    begin = time.perf_counter()
    try:
        for one in row(setting):
            found.append(_entry(name, one, where, setting.quick))
            print(finding.summary(found[-1]), flush=True)
    except Wrong as error:
        wrong = Finding(what=row.__doc__.splitlines()[0], peer="", goal=finding.TOLD, why=f"wrong: {error}")
        found = [_entry(name, wrong, where, setting.quick)]
        print(finding.summary(found[-1]), flush=True)
    print(f"[{name}: {time.perf_counter() - begin:.0f} s]", flush=True)
    return found


def _entry(name: str, one: Finding, where: dict, quick: bool) -> dict:
    entry = {"row": name, **one.row(), **where}
    return {**entry, "reached": None} if quick else entry


def failed(rows: Iterable[dict]) -> bool:
    return any(row["why"].startswith("wrong") for row in rows)


def renewed(rows: list[dict], path: Path, names: Iterable[str]) -> list[dict]:
    """Rows of an earlier run that this one did not run, and ``rows``, in the order of ``names``."""
    before = results.load(path) if path.exists() else []
    ran, order = {row["row"] for row in rows}, list(names)
    return sorted([row for row in before if row["row"] not in ran] + rows, key=lambda row: order.index(row["row"]))


def result_path(subject: str, where: dict) -> Path:
    """One file per machine, thread count and instruction set."""
    return results.DIRECTORY / f"{subject}-{results.default_path(where, quick=False).name}"


def parser_of(subject: str, rows: Iterable[str]) -> argparse.ArgumentParser:
    """The options that every subject has."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {subject}", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=rows, default=[], help=f"of {', '.join(rows)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; goals are not judged, no file is written")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: those torch would use")
    parser.add_argument("--out", type=Path, help="result file, whose rows of other names stay; default: bench/results")
    return parser


def run(
    subject: str,
    rows: Mapping[str, Row],
    make: Callable[..., Any],
    options: argparse.Namespace,
    versions: dict[str, str],
    names: Iterable[str],
) -> int:
    """Run ``rows`` as the options say. ``make``: a setting out of folder, quick, threads. ``names``: of all rows."""
    torch.set_num_threads(options.threads)
    where = {**results.environment("cpu", options.threads), "versions": versions}
    where["filesystem"] = _io.filesystem(options.folder)
    path = options.out or (None if options.quick else result_path(subject, where))
    folder = Path(tempfile.mkdtemp(prefix="memkernels-bench-", dir=options.folder))
    setting, found = make(folder, options.quick, options.threads), []
    try:
        for name, row in rows.items():
            found += measure(name, row, setting, where)
            if path is not None:  # after each row, so that what breaks a later one loses nothing
                results.save(renewed(found, path, names), path)
    finally:
        shutil.rmtree(folder)
    if path is not None:
        print(f"written to {path}")
    return int(failed(found))
