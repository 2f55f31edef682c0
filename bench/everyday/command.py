"""Run the everyday grid, print every ratio and their summary, write the result file. Exit status 1 for a wrong result
of an op."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import results
from ..contests.command import result_path
from . import grid, summary
from .measure import measure
from .row import Row


def chosen(only: Sequence[str], earlier: Sequence[dict] | None = None, below: float = summary.LOSS) -> list[Row]:
    """The rows that one of ``only`` names, an op or a part of ``op direction dtype sizes``; with ``earlier`` results,
    those that lost there or had no right result. ValueError for a word that names nothing."""
    rows = grid.rows()
    for word in only:
        if not any(_named(row, word) for row in rows):
            raise ValueError(f"no case is named by {word!r}; ops are {', '.join(grid.GRID)}")
    found = [row for row in rows if not only or any(_named(row, word) for word in only)]
    if earlier is None:
        return found
    again = {row["key"] for row in earlier if row["why"] or (row["ratio"] is not None and row["ratio"] < below)}
    return [row for row in found if row.key in again]


def _named(row: Row, word: str) -> bool:
    return row.op == word if word in grid.GRID else word in row.key


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench --everyday", description=__doc__)
    made.add_argument("--only", nargs="+", metavar="WORD", default=[], help="an op, or a part of a printed case")
    made.add_argument("--quick", action="store_true", help="tiny sizes, whose ratios say nothing; no file is written")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: those torch would use")
    made.add_argument("--out", type=Path, help="result file; by default a run of all cases is written to bench/results")
    made.add_argument("--losses", type=Path, metavar="OLD", help="only cases that lost in this earlier result file")
    made.add_argument(
        "--below", type=float, default=summary.LOSS, help="what counts as lost there, default %(default)s"
    )
    return made


def main(words: list[str]) -> int:
    made = parser()
    options = made.parse_args(words)
    earlier = None if options.losses is None else results.load(options.losses)
    try:
        rows = chosen(options.only, earlier, options.below)
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(options.threads)
    where = results.environment("cpu", options.threads)
    whole = not (options.only or options.losses or options.quick)
    path = options.out or (result_path("everyday", where) if whole else None)
    before = {row["key"]: row["ratio"] for row in earlier or ()}
    found: list[dict] = []
    begin = time.perf_counter()
    for row in rows:
        found.append({**measure(row, options.quick), **where})
        old = before.get(row.key)
        print(summary.line(found[-1]) + (f", before {old:.2f}x" if old is not None else ""), flush=True)
        if path is not None:  # after each row, so that what breaks a later one loses nothing
            results.save(found, path)
    print(f"\n{summary.Summary.of(found).line()}  [{time.perf_counter() - begin:.0f} s]")
    for row in summary.Summary.of(found).losses:
        print(f"  {summary.line(row)}")
    if path is not None:
        print(f"written to {path}")
    return int(any(row["why"] for row in found))
