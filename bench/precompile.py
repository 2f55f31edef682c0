"""Compiles every Triton kernel that the contract grid launches, on all processors, before the first row runs.

    python -m bench.precompile --arch 90 --count   # how many compilations the grid is, without a GPU

The launchers run on meta tensors with the shapes, strides and options of each case (``triton_kernels/replay.py``), and
what they note is compiled into Triton's cache on disk, where the rows find it. Without this a check on a GPU would wait
for the compiler, one kernel after the other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memkernels.registration import OPS
from memkernels.testing.grid import Subject, subjects

from .compile import configs, replay
from .launches import plain

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launched(subject: Subject, arch: str, capability: int) -> Iterator[object]:
    """What the Triton backend compiles for one case of the grid: forward, backward, in place."""
    op, inputs = subject.op, subject.inputs

    def run(name: str, tensors: Sequence, more: Sequence) -> tuple:
        given = [x for x in tensors if isinstance(x, Tensor)]
        aligned = tuple(x.storage_offset() * x.itemsize % 16 == 0 for x in given)
        stand_ins = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in given]
        recording = replay.Recording(arch, capability, torch.device("cuda", 0), aligned)
        for x in stand_ins:
            recording.place(x)
        left = iter(stand_ins)
        with recording:
            results = plain(name)(*(next(left) if isinstance(x, Tensor) else x for x in tensors), *more)
        found.extend(build for _, _, build in recording.launches)
        return results if isinstance(results, (tuple, list)) else (results,)

    found: list = []
    outputs = run(op.name, inputs.tensors, inputs.params)
    if "backward" in subject.directions():
        names = [o.name for o in op.outputs]
        saved = [outputs[names.index(name)] for name in op.saved]
        given = subject.case.cotangents
        gradients = [
            x if given is None or o.name in given else None for o, x in zip(op.outputs, outputs) if o.grad
        ]  # fmt: skip
        wants = [i in subject.wanting for i, arg in enumerate(op.args) if arg.is_float]
        run(f"{op.name}_backward", [*inputs.tensors, *saved, *gradients], [*inputs.params, wants])
    if "in place" in subject.directions():
        run(f"{op.name}_", inputs.tensors, inputs.params)
    yield from found


def builds(arch: str, capability: int, quick: bool = False) -> dict[tuple, object]:
    """All distinct compilations of the grid."""
    found = {}
    for one in subjects(list(OPS.values()), list(DTYPES), "cpu", quick):
        for build in launched(Subject(*one), arch, capability):
            found.setdefault(build.identity, build)
    return found


def precompile(jobs: int, deadline: float) -> dict:
    """Compile for this machine's GPU with ``jobs`` processes until ``deadline`` (of ``time.monotonic``)."""
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "bench.precompile", "--capability", str(10 * major + minor), "--of", str(jobs)]
    start = time.monotonic()
    parts = [subprocess.Popen([*command, "--part", str(part)], cwd=ROOT) for part in range(jobs)]
    late = 0
    for part in parts:
        try:
            part.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late += 1
            part.kill()
            part.wait()
    return {"jobs": jobs, "late": late, "seconds": time.monotonic() - start}
