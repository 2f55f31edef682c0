"""``make gpu-rehearsal``: what a check on a GPU will meet, met without one.

    python -m bench.gpu.rehearsal            # all of it
    python -m bench.gpu.rehearsal --quick    # what CI runs: no Triton kernel is compiled, nothing is timed

The real CUDA builds of torch are fetched (once; they stay in a cache) and the CUDA library is compiled and linked
against the oldest and the newest that matter. Under the newest, over stand-ins for NVIDIA's libraries
(``stand_in.py``), every launcher of every op, backend and dtype goes its real way down to the driver, which checks and
records what it is asked to run. Compilations are counted, host times measured, and the time that the check will take
on a machine with ``CORES`` processors is added up: beyond ``MOST_SECONDS`` the rehearsal fails. Numbers are not looked
at: nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import cuda_check
from . import stand_in
from .processes import ROOT, Stop
from .rows import FAILED, Rows
from .stages import Check
from .wheels import torch_folder

OLDEST, NEWEST = "2.10.0", "2.11.0"
CORES, MOST_SECONDS = 16, 480
# Kernels that Triton compiles for the telling cases, for those of the second round too, and for the whole grid. Each is
# about a second: more of them, and the minutes on a GPU go to the compiler. An op has about ten of the first and
# eighteen of the first two. In the whole grid ops on chosen slots and the indexer have 1100, cases of slot ranges 850.
MOST_BUILDS = (380, 630, 6100)
HOST_GOAL = {"triton": 25.0, "cuda": 8.0}  # microseconds a launch
SPEED_SECONDS = 5.0  # of one case on one backend: its timing takes two, the rest is inputs, checks and peers
RESULT = ROOT / "bench" / "results" / "gpu" / "rehearsal.json"
# Kernels that spill where rows are no multiple of 16 columns: loaded number by number, a row takes an address each, and
# these hold tiles of rows whose addresses are more than the registers there are. Right, and slow; rows that are a
# multiple of 16 columns do not spill in any kernel.
ODD_ROWS_SPILL = (
    *("additive_slot_kernel", "cell_gates_kernel", "delta_kernel", "memory_gate_gradient_kernel"),
    *("query_gradient_kernel", "segment_kernel", "slot_gradient_kernel", "write_carry_kernel", "write_slot_kernel"),
)
SHIM = re.compile(r"^(aoti_torch|torch)_\w+$")


class Failed(Exception):
    """What went wrong, in a sentence or with what a tool said."""


def said(*command: str, **environment: str) -> str:
    """What this interpreter prints; it must succeed."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(done.stderr.strip()[-2000:] or f"status {done.returncode}")
    return done.stdout


# --- the library and the torch that loads it --------------------------------------------------------------------------


def symbols(which: str, *files: Path) -> set[str]:
    """Dynamic symbols of libraries: ``--undefined-only`` or ``--defined-only``."""
    text = subprocess.run(["nm", "-D", which, *files], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in text.splitlines() if line.strip() and not line.endswith(":")}


def kernel_objects() -> list[Path]:
    """The objects of the CUDA kernels for every target, compiled where they are not yet. They know no torch."""
    folder = cuda_check.build().parent
    return sorted((folder / "CMakeFiles" / "memkernels_cuda.dir").rglob("*.cu.o"))


def linked(version: str, objects: Sequence[Path], *options: str) -> Path:
    """The library of those kernels, its bindings compiled against the headers of torch ``version``."""
    folder = ROOT / "build" / f"rehearsal-{version}"
    given = [
        f"-DTORCH_DIR={torch_folder(version) / 'torch'}",
        f"-DMEMKERNELS_CUDA_OBJECTS={';'.join(map(str, objects))}",
    ]
    cuda_check.cmake(ROOT, folder, "memkernels_cuda", "-DMEMKERNELS_CUDA=ON", *given, *options)
    return folder / "libmemkernels_cuda.so"


def unresolved(library: Path, version: str) -> list[str]:
    """What the library wants of torch, and this torch does not have."""
    folder = torch_folder(version) / "torch" / "lib"
    offered = symbols("--defined-only", *(folder / f"lib{name}.so" for name in ("torch_cpu", "torch_cuda", "c10")))
    wanted = {name for name in symbols("--undefined-only", library) if SHIM.match(name)}
    if not wanted:
        raise Failed(f"{library.name} takes nothing from torch: it is the wrong file")
    return sorted(wanted - offered)


def compile_and_resolve() -> Path:
    """The library under both versions; the one of the newest, linked to the stand-in of the runtime."""
    objects = kernel_objects()
    runtime = stand_in.build(NEWEST) / stand_in.RUNTIME
    for version, options in ((OLDEST, ()), (NEWEST, (f"-DMEMKERNELS_CUDART={runtime}",))):
        library = linked(version, objects, *options)
        if missing := unresolved(library, version):
            raise Failed(f"torch {version} does not have {', '.join(missing)}")
        print(f"  torch {version}: compiled, linked, every symbol is there")
    return library


LOADED = """
import json
from memkernels.backends import BACKENDS
from memkernels.registration import OPS
found = {b.name: b.missing() for b in BACKENDS if "cuda" in b.devices}
print(json.dumps([found, {n: sum(b.gap(op, "cuda") is None for op in OPS) for b in BACKENDS for n in [b.name]}]))
"""


def load() -> str:
    """Both backends for a GPU are there, with operators, under the newest torch."""
    missing, kernels = json.loads(said("-c", LOADED).splitlines()[-1])
    if whys := [f"{name}: {why}" for name, why in missing.items() if why]:
        raise Failed("; ".join(whys))
    return ", ".join(f"{name} has {kernels[name]} ops" for name in missing)


# --- launches ---------------------------------------------------------------------------------------------------------


def counted(rounds: int) -> list[int]:
    """Kernels that Triton compiles up to each round of the contract grid, none counted twice."""
    text = said("-m", "bench.precompile", "--capability", "90", "--count", "--rounds", str(rounds))
    print(text, end="")
    numbers = [int(number) for number in re.findall(r": (\d+) kernels", text)]
    totals = [sum(numbers[: i + 1]) for i in range(len(numbers))]
    for total, most in zip(totals, MOST_BUILDS):
        if total > most:
            raise Failed(f"{total} kernels are compiled, at most {most}: what is specialised that need not be?")
    return totals


def launched(check: Check, rounds: int) -> list[dict]:
    """Rows of the grid whose launches reached the driver; raises where one did not."""
    tasks = [task for found in check.plan["rounds"][:rounds] for task in found]
    jobs = [dataclasses.replace(job, mode="launch") for job in check.jobs("rehearsal", tasks)]
    crew = check.crew()
    crew.run(jobs, check.rows, time.monotonic() + 24 * 3600, crew.size)
    rows = [row for row in check.rows if row["stage"] == "rehearsal"]
    if failed := [row for row in rows if row["status"] == FAILED]:
        names = ("op", "backend", "dtype", "case", "direction", "message")
        words = [" ".join(str(row[name]) for name in names) for row in failed[:20]]
        raise Failed("\n    ".join([f"{len(failed)} of {len(rows)} rows:", *words]))
    return rows


def hosts() -> list[dict]:
    """Host time of every op, backend and direction."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.host"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Failed(done.stderr.strip()[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def built_seconds() -> float:
    """Seconds of the native build on ``CORES`` processors, by what Ninja noted of each file: at least the longest."""
    log = cuda_check.build().parent / ".ninja_log"
    last = {f[3]: int(f[1]) - int(f[0]) for f in (line.split("\t") for line in log.read_text().splitlines()[1:])}
    return max(sum(last.values()) / CORES, max(last.values())) / 1e3


# --- all of it --------------------------------------------------------------------------------------------------------


def whole(check: Check) -> dict:
    """Everything that only the whole rehearsal does; the result."""
    jobs = len(os.sched_getaffinity(0))
    words = ("precompile", str(jobs), str(time.monotonic() + 24 * 3600))
    found = json.loads(said("-m", "bench.gpu.worker", *words, **check.cache).splitlines()[-1])
    spilled = [why for why in found["faults"] if "for odd rows" in why and why.split()[0] in ODD_ROWS_SPILL]
    if faults := [why for why in found["faults"] if why not in spilled]:
        raise Failed("\n    ".join([f"{len(faults)} kernels:", *faults[:40]]))
    rows = launched(check, 2)
    print(f"  {len(rows)} rows launched")
    host = hosts()
    smoke = {(t["op"], t["backend"], t["dtype"], t["case"]) for t in check.plan["rounds"][0]}
    of_smoke = [row["seconds"] for row in rows if (row["op"], row["backend"], row["dtype"], row["case"]) in smoke]
    groups = len({key[:2] for key in smoke})
    seconds = {
        "native build": built_seconds(),
        "Triton kernels": found["seconds"] * jobs / CORES,
        "smoke": (sum(of_smoke) + groups * start_seconds()) / check.crew().size,
        "speed": len(check.plan["speed"]) * SPEED_SECONDS,
    }
    return {"rows": len(rows), "seconds": {k: round(v, 1) for k, v in seconds.items()}, "host": host}


def start_seconds() -> float:
    """What a worker takes before its first row."""
    begin = time.monotonic()
    said("-c", "import memkernels.testing")
    return time.monotonic() - begin


def page(result: dict) -> str:
    """The result as a page shows it."""
    seconds = "; ".join(f"{name} {number:.0f} s" for name, number in result["seconds"].items())
    where = result["environment"]
    few, more, all_of_it = result["builds"]
    lines = [
        f"Rehearsed on {where['date']} with torch {where['torch']} on {where['processor']}, {result['rows']} rows.",
        f"Triton compiles {few} kernels for the smoke, {more} with the second round, {all_of_it} for the whole grid.",
        f"The check on {where['cores']} cores, added up: {seconds}.",
        "",
        "Host time is processor time of one operator below autograd, in bfloat16 on small tensors, over a driver that",
        "records. Kernels of torch that a call uses count as launches too.",
        "",
        "| op | direction | Triton, launches | us | CUDA, launches | us |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = {(row["op"], row["direction"], row["backend"]): row for row in result["host"]}
    for op, direction in sorted({key[:2] for key in found}):
        cells = []
        for backend in HOST_GOAL:
            row = found.get((op, direction, backend))
            cells += [str(row["launches"]), f"{row['host_us']:.0f}"] if row else ["", ""]
        lines.append(f"| `{op}` | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def told(host: Sequence[dict]) -> Iterator[str]:
    """Forward calls of one launch are what the goal is for; others are told by the launch."""
    for backend, goal in HOST_GOAL.items():
        own = [row for row in host if row["backend"] == backend]
        single = [row["host_us"] for row in own if row["launches"] == 1]
        a_launch = sorted(row["host_us"] / max(1, row["launches"]) for row in own)
        yield f"  {backend}: {min(single):.0f} to {max(single):.0f} us a call of one launch (goal {goal:.0f}),"
        yield f"    {a_launch[0]:.0f} to {a_launch[-1]:.0f} us a launch over all calls"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="what CI runs")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    folder = ROOT / "build" / "rehearsal-rows"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    state: dict = {}

    def step(name: str, do: Callable[[], object]) -> object:
        begin = time.monotonic()
        print(f"{name} ...", flush=True)
        result = do()
        print(f"{name}: done in {time.monotonic() - begin:.0f} s", flush=True)
        return result

    try:
        library = step("compile, link and resolve", compile_and_resolve)
        # From here on every process finds the CUDA build of torch, and a device that records.
        os.environ.update(stand_in.environment(NEWEST), MEMKERNELS_CUDA_LIBRARY=str(library))
        print("  " + step("load", load))
        state["builds"] = step("count compilations", lambda: counted(2 if options.quick else 3))
        backends = ["cuda"] if options.quick else []
        check = Check("cuda", folder, Rows(folder / "rows.jsonl"), Stop(), 600.0, [], backends)
        if options.quick:
            rows = step("launch", lambda: launched(check, 2))
            print(f"  {len(rows)} rows launched on cuda")
            return 0
        state |= step("launch and time", lambda: whole(check))
        print(*told(state["host"]), sep="\n")
        total = sum(state["seconds"].values())
        print(f"  the check on {CORES} processors: {total:.0f} s of at most {MOST_SECONDS}: {state['seconds']}")
        if options.write:
            state["environment"] = {
                "torch": NEWEST, "cores": CORES, "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "processor": check.plan["environment"]["processor"],
            }  # fmt: skip
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(state, indent=1) + "\n")
        if total > MOST_SECONDS:
            raise Failed(f"a check would take {total:.0f} s on {CORES} processors, at most {MOST_SECONDS} are wanted")
    except (Failed, RuntimeError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
