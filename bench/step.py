"""What one step of optimisation bought: this checkout against another, in turns, in processes of their own.

    python -m bench.step ../before "what was changed" topk_read --kept yes

times the forward cases of the named ops (``--direction backward``, ``--quick``) with the installed library here and
with the one built in the other checkout, checks both against the float64 reference, prints the ratio of medians and,
with ``--kept``, adds one row per case to ``bench/results/ladder.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import cases, results
from .case import OWN, Case
from .check import Exact
from .harness import Settings, wrong
from .timers import SHORTEST_SAMPLE
from .variants import d_output, own, prepare
from .variants import results as outputs

HERE = Path(__file__).resolve().parent.parent
LADDER = results.DIRECTORY / "ladder.json"
# The library of that checkout, the benchmark of this one.
WORKER = """
import sys
library, bench = sys.argv[1:3]
sys.path.insert(0, library)
import memkernels
assert memkernels.__file__.startswith(library), memkernels.__file__
sys.path.insert(0, bench)
from bench.step import serve
serve(*sys.argv[3:])
"""


def serve(op: str, direction: str, index: str, threads: str, quick: str) -> None:
    """Prepare a case, answer why it is wrong or an empty line, then the seconds of a call for every line that comes."""
    settings = Settings(threads=int(threads), quick=quick == "True")
    torch.set_num_threads(settings.threads)
    case = chosen([op], direction)[int(index)]
    sets = case.inputs(case.quick if settings.quick else case.sizes, "cpu", settings.cache_bytes)
    d_out = d_output(case, sets[0])
    calls = [prepare(case, own(case), inputs, d_out) for inputs in sets]
    exact = Exact(case, sets[0], d_out)
    print(wrong(exact.error(outputs(case, calls[0])), exact.limit(), OWN), flush=True)
    del exact
    done = 0

    def run(count: int) -> float:
        nonlocal done
        begin = time.perf_counter()
        for _ in range(count):
            calls[done % len(calls)]()
            done += 1
        return (time.perf_counter() - begin) / count

    with torch.set_grad_enabled(case.autograd):
        count = max(1, int(SHORTEST_SAMPLE / run(2)))
        for _ in sys.stdin:
            run(1)
            print(run(count), flush=True)


def chosen(ops: list[str], direction: str) -> list[Case]:
    """The timed cases of the ops."""
    found = cases.select(ops, "cpu")
    return [case for case in found if case.direction == direction and case.measure == "time"]


def compare(other: Path, op: str, direction: str, index: int, seconds: float, quick: bool) -> tuple[float, float]:
    """Median seconds of the other library and of this one."""
    workers = []
    for library in (other, HERE):
        arguments = [str(library.resolve()), str(HERE), op, direction, str(index), str(torch.get_num_threads())]
        command = [sys.executable, "-c", WORKER, *arguments, str(quick)]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"))
    try:
        for worker, library in zip(workers, (other, HERE)):
            why = worker.stdout.readline()
            if worker.poll() is not None or why.strip():
                raise RuntimeError(f"{library}: {why.strip() or 'the process ended'}")
        samples: tuple[list[float], list[float]] = ([], [])
        order = random.Random(0)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[0]) < 5:
            for i in order.sample((0, 1), 2):
                time.sleep(2e-3)  # for the threads of the other process to stop spinning
                workers[i].stdin.write("\n")
                workers[i].stdin.flush()
                samples[i].append(float(workers[i].stdout.readline()))
        return statistics.median(samples[0]), statistics.median(samples[1])
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout with its library built (make dev)")
    parser.add_argument("step", help="what was changed, in words")
    parser.add_argument("ops", nargs="+", metavar="op")
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--kept", choices=("yes", "no"), help="record the rows, and whether the step was kept")
    options = parser.parse_args(arguments)
    where = results.environment("cpu", torch.get_num_threads())
    device = f"{where['processor']}, {where['threads']} threads, {where['isa']}"
    rows = []
    for op in options.ops:
        for index, case in enumerate(chosen([op], options.direction)):
            seconds = 1.0 if options.quick else 6.0
            before, after = compare(options.other, op, options.direction, index, seconds, options.quick)
            title = case.title(case.quick if options.quick else case.sizes)
            words = f"{op} {options.direction} {case.dtype} {title}"
            print(f"{words}: {before * 1e3:.3f} ms, now {after * 1e3:.3f} ms, {before / after:.2f}x", flush=True)
            rows.append(
                {
                    "step": options.step,
                    "case": words,
                    "gain": f"{before / after:.2f}x",
                    "kept": options.kept == "yes",
                    "before": before,
                    "after": after,
                    "device": device,
                    "commit": where["commit"],
                    "date": datetime.date.today().isoformat(),
                }
            )
    if options.kept:
        recorded = json.loads(LADDER.read_text())
        recorded["measured"] = recorded.get("measured", []) + rows
        LADDER.write_text(json.dumps(recorded, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
