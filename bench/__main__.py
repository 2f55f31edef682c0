"""Run the cases, print the table, write a result file. Exit status 1 for a wrong result or a regression."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from . import cases, results, text
from .case import Case
from .ceilings import Ceilings
from .harness import Settings, run_case
from .variants import own_backends


def measure(chosen: list[Case], settings: Settings) -> list[dict]:
    """Run the cases one after the other, on a GPU on each backend that has a kernel; peaks are measured before each op
    and at the end, bandwidth around each case."""
    torch.set_num_threads(settings.threads)
    where = results.environment(settings.device, settings.threads)
    ceilings = Ceilings(settings.device, settings.threads, settings.quick, where["isa"])
    raw, bandwidths, op = [], [], ""
    runs = [(case, backend) for case in chosen for backend in own_backends(case, settings.device)]
    for case, backend in runs:
        if case.op != op and not (settings.quick and raw):
            ceilings.refresh()
        op = case.op
        begin = time.perf_counter()
        raw.append(run_case(case, settings, backend=backend))
        ceilings.look()
        bandwidths.append(ceilings.bandwidth)
        row = results.complete(raw[-1], case, ceilings, where)
        name, title, direction, dtype, median, _, _, ratio, *_ = text.columns(row)
        words = f"{name} {direction} {dtype} {title}: {median}  {ratio}"
        print(f"{words}  [{time.perf_counter() - begin:.0f} s]", flush=True)
    ceilings.refresh()
    rows = []
    for row, (case, _), bandwidth in zip(raw, runs, bandwidths):
        ceilings.bandwidth = bandwidth
        rows.append(results.complete(row, case, ceilings, where))
    return results.best_of_ours(rows)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] in (["store"], ["lookup"], ["sharding"], ["attention"]):
        return importlib.import_module(f".{words[0]}.command", __package__).main(words[1:])
    if "--everyday" in words:
        from .everyday import command  # here: most runs do without it

        return command.main([word for word in words if word != "--everyday"])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help="only these ops; or store, lookup, sharding or attention: with their own options",
    )
    parser.add_argument("--everyday", action="store_true", help="calls as people make them; with options of its own")
    parser.add_argument("--quick", action="store_true", help="small sizes, under two minutes; goals are not judged")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: those torch would use")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="result file; by default a run of all ops is written to bench/results")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an earlier result file, compared by ratio to a peer"
    )
    options = parser.parse_args(words)
    settings = Settings(options.device, options.threads, options.quick)
    try:
        chosen = cases.select(options.ops, options.device)
    except ValueError as error:
        parser.error(str(error))
    earlier = [] if options.compare is None else results.load(options.compare)  # before it may be written anew
    rows = measure(chosen, settings)

    print("\n" + text.plain(rows) + "\n")
    first = rows[0]
    dtypes = {r["dtype"]: r for r in rows if r["peak"]}
    peak = "  ".join(f"{dtype} {r['peak'] / 1e9:.0f} GFLOP/s" for dtype, r in dtypes.items())
    machine = ", ".join(filter(None, (first["processor"], f"{first['threads']} threads", first["isa"])))
    machine = machine if first["device"] == "cpu" else f"{first['device']}, {machine}"
    print(f"{machine}; multiply-add peak: {peak}; ", end="")
    print(f"{text.bandwidth_name(first)}: {text.bandwidths(rows)}")
    path = options.out or (None if options.ops else results.default_path(first, options.quick))
    if path is not None:
        results.save(rows, path)
        print(f"written to {path}")

    failed = False
    for row in rows:
        if row["why"] and row["backend"]:
            print(f"{text.op_name(row)} {row['case']} {row['direction']}: {row['why']}")
            failed = True
    for row, before, now in results.compare(rows, earlier):
        slower = now < results.GUARD * before
        failed |= slower
        words = f"{row['op']} {row['case']} {row['direction']} {row['dtype']}"
        print(f"{words}: {before:.2f}x before, {now:.2f}x now{', SLOWER' if slower else ''}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
