"""``make gpu-check``: on a machine with a GPU, build, prove every backend there is, and measure, within minutes.

    python -m bench.gpu_check --out results                     # as far as nine minutes go
    python -m bench.gpu_check --out results --resume            # what is left
    python -m bench.gpu_check --out results --resume --stage sanitize --op softmax_read

Every result is a line of ``rows.jsonl`` as soon as it is there; kernels run in processes of their own, so a fault
spoils one row. No network: the interpreter's own torch, setuptools, CMake, Ninja and pybind11. Exit status 1 when a row
ran and was wrong, raised or died; 0 also with gaps, and when the time was over before the end; 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu import summary
from .gpu.processes import ROOT, Stop, ask
from .gpu.rows import Rows
from .gpu.stages import STAGES, USUAL, Check

FILE = "rows.jsonl"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, metavar="DIR", help="for rows, logs, Triton's cache (default: a new one)")
    result.add_argument("--minutes", type=float, default=9.0, help="for everything together (default: 9)")
    result.add_argument("--resume", action="store_true", help="go on with the rows of --out: those there stay")
    result.add_argument(
        "--stage", action="append", choices=tuple(STAGES), help=f"repeatable (default: {', '.join(USUAL)})"
    )
    result.add_argument("--op", action="append", default=[], help="only this op, repeatable")
    result.add_argument("--backend", action="append", default=[], help="only this backend, repeatable")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same with its kernels")
    result.add_argument("--row-seconds", type=float, default=60.0, help="a row that takes longer failed (default: 60)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    began, start = summary.now(), time.monotonic()
    options = parser().parse_args(arguments)
    if options.resume and options.out is None:
        parser().error("--resume needs the folder of --out")
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.now())
    name = "cpu"
    if options.device == "cuda" and not (name := _gpu(stop)):
        return 2
    folder = options.out or _new_folder(name)
    if (folder / FILE).exists() and not options.resume:
        print(f"gpu-check: {folder / FILE} has rows of an earlier run; --resume goes on with them", file=sys.stderr)
        return 2
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    rows = Rows(folder / FILE)
    check = Check(options.device, folder, rows, stop, options.row_seconds, options.op, options.backend)
    return _run(check, [s for s in STAGES if s in (options.stage or USUAL)], start + 60 * options.minutes, began)


def _gpu(stop: Stop) -> str:
    """The name of the GPU; empty where there is none, and the reason is printed."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = ask(stop, Path(scratch) / "look.log", math.inf, "look")
        except RuntimeError as error:
            print(f"gpu-check: torch does not start here: {error}", file=sys.stderr)
            return ""
    if not found["gpu"]:
        print(f"gpu-check: no GPU that torch {found['torch']} can use is here", file=sys.stderr)
    return found["gpu"] or ""


def _new_folder(name: str) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "bench" / "results" / f"gpu-check-{device}-{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}"


def _run(check: Check, stages: Sequence[str], deadline: float, began: str) -> int:
    for i, stage in enumerate(stages):
        run, share = STAGES[stage]
        left = deadline - time.monotonic()
        if check.stop.asked or left <= 0:
            break
        print(f"{stage}: {left / 60:.1f} minutes are left", flush=True)
        try:
            run(check, time.monotonic() + left * (share if i + 1 < len(stages) else 1.0))
        except ValueError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            if not check.stop.asked:
                check.note(stage, "plan", str(error))
            break
        summary.save(check, summary.facts(check, began))
    facts = summary.facts(check, began)
    summary.save(check, facts)
    print("", summary.render(check), "", summary.line(check, facts), sep="\n")
    return facts["status"]


if __name__ == "__main__":
    sys.exit(main())
