"""Compiles the Triton kernels of the contract grid on all processors, the most telling cases first.

    python -m bench.precompile --capability 90 --count   # how many compilations the grid is; needs no GPU
    python -m bench.precompile --capability 90           # makes them; fails on spills and on serialised products

The launchers run on meta tensors with the shapes, strides and options of each case (``triton_kernels/replay.py``), and
what they note is compiled into Triton's cache on disk, where a check on a GPU finds it. Without this the check would
wait for the compiler, one kernel after the other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memkernels import _triton
from memkernels._extras import optional, require
from memkernels.registration import OPS
from memkernels.spec import several
from memkernels.testing import CASES, Subject

from .cuda_check import ROOT
from .gpu.telling import rounds
from .launches import backward_tensors, plain

with optional("triton"):
    from .compilation import Build
    from .compile import configs, replay

_CASES = {case.name: case for case in CASES}


def launched(subject: Subject, capability: int) -> Iterator:
    """What the Triton backend compiles for one case of the grid: forward, backward, in place."""
    op, inputs, found = subject.op, subject.inputs, []

    def run(name: str, tensors: Sequence[Tensor | None], more: Sequence) -> tuple:
        given = [x for x in tensors if isinstance(x, Tensor)]
        aligned = tuple(x.storage_offset() * x.itemsize % 16 == 0 for x in given)
        recording = replay.Recording(configs.nearest(capability), capability, torch.device("cuda", 0), aligned)
        stand_ins = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in given]
        for x in stand_ins:
            recording.place(x)
        left = iter(stand_ins)
        with recording:
            results = plain(name)(*(next(left) if isinstance(x, Tensor) else x for x in tensors), *more)
        found.extend(build for *_, build in recording.launches)
        return several(results)

    outputs = run(op.name, inputs.tensors, inputs.params)
    directions = subject.directions()
    if "backward" in directions:
        wants = [i in subject.wanting for i, arg in enumerate(op.args) if arg.is_float]
        given = backward_tensors(op, inputs.tensors, outputs, subject.case.cotangents)
        run(f"{op.name}_backward", given, [*inputs.params, wants])
    if "in place" in directions:
        run(f"{op.name}_", inputs.tensors, inputs.params)
    yield from found


def builds(capability: int, until: int = 3) -> list[dict]:
    """The distinct compilations of each of the first ``until`` rounds of the grid, none twice."""
    known: set[tuple] = set()
    result = []
    for subjects in rounds(op for op in OPS.values() if op.name in _triton.kernels().operators())[:until]:
        fresh = {}
        for op, case, dtype in subjects:
            if dtype == "float64":  # which a GPU has no kernels for
                continue
            for build in launched(Subject(OPS[op], _CASES[case], getattr(torch, dtype), "cpu"), capability):
                if build.identity not in known:
                    known.add(build.identity)
                    fresh[build.identity] = build
        result.append(fresh)
    return result


def precompile(jobs: int, deadline: float) -> dict:
    """Compile the telling cases for the GPU of this machine with ``jobs`` processes, until ``deadline`` of the
    monotonic clock.

    Returns:
        ``faults``: a sentence for each kernel that does not compile, spills registers or has serialised products.
    """
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "bench.precompile", "--capability", str(10 * major + minor)]
    command += ["--rounds", "2", "--of", str(jobs)]
    start = time.monotonic()
    parts = [
        subprocess.Popen([*command, "--part", str(part)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for part in range(jobs)
    ]
    late, faults = 0, []
    for part in parts:
        try:
            faults += part.communicate(timeout=max(0.1, deadline - time.monotonic()))[0].splitlines()
        except subprocess.TimeoutExpired:
            late += 1
            part.kill()
            part.communicate()
    return {"processes": jobs, "stopped": late, "faults": faults, "seconds": round(time.monotonic() - start, 1)}


def fault(build) -> str:
    """Compile one kernel, and what launches it where there is a GPU; what is wrong with it, or nothing."""
    params = build.function.params
    sizes = {params[path[0]].name: x for path, x in build.constants.items() if len(path) == 1 and x is not None}
    name = f"{build.function.__name__} {build.options} {sizes}"
    try:
        needs = Build(build).compile()
        if torch.cuda.is_available():
            build.prepare()
    except Exception as error:
        return f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}"
    name += " for odd rows" if build.odd else ""
    found = [f"{needs.spills} bytes spilled beside {needs.registers} registers"] if needs.spills else []
    found += ["warp-group products are serialised"] if needs.serialised else []
    return f"{name}: {', '.join(found)}" if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precompile", description=__doc__)
    parser.add_argument("--capability", type=int, required=True, help="of the GPU, 9.0 as 90")
    parser.add_argument("--count", action="store_true", help="only count")
    parser.add_argument("--rounds", type=int, default=3, help="1 and 2 are the telling cases, 3 is all")
    parser.add_argument("--part", type=int, default=0, help="every so many-th build, from this one on")
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args()
    require(parser.prog, "triton")
    found = builds(options.capability, options.rounds)
    if options.count:
        for i, fresh in enumerate(found):
            # Triton compiles a C function for every list of types.
            types = {build.types for build in fresh.values()}
            print(f"round {i + 1}: {len(fresh)} kernels, {len(types)} launch signatures")
        return 0
    os.nice(1)  # the rows go first
    faults = 0
    for build in [build for fresh in found for build in fresh.values()][options.part :: options.of]:
        if why := fault(build):
            faults += 1
            print(why, flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
