"""Host time of calls: ``python -m bench.gpu.host``, over a driver that records launches instead of running them.

Prints one object a line: op, backend, direction, kernels launched, and microseconds of processor time that the operator
takes, least of several runs. With no device to wait for, what is left is what a call costs before a kernel runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch

from memkernels.backends import BACKENDS, DIRECTIONS, Backend
from memkernels.registration import OPS
from memkernels.spec import Op, several
from memkernels.testing import CASES, Subject

from .stand_in import Record
from .unjudged import unjudge

CALLS, RUNS = 200, 9


def microseconds(call: Callable[[], object]) -> float:
    """Processor time of this thread for one call, least of the runs: what else the machine does only adds to it."""
    samples = []
    for _ in range(RUNS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        samples.append((time.thread_time() - begin) / CALLS * 1e6)
    return min(samples)


def calls(subject: Subject, backend: Backend) -> Iterator[tuple[str, Callable[[], object]]]:
    """The operators of one op that have a kernel."""
    op, inputs = subject.op, subject.inputs
    operators = getattr(torch.ops, backend.namespace)
    has = {d for d in DIRECTIONS if backend.gap(op.name, "cuda", subject.dtype, d) is None}
    if "forward" not in has:
        return
    arguments = (*inputs.tensors, *inputs.params)
    forward = getattr(operators, op.name).default
    yield "forward", lambda: forward(*arguments)
    if "backward" not in has:
        return
    outputs = several(forward(*arguments))
    names = [out.name for out in op.outputs]
    saved = [outputs[names.index(name)] for name in op.saved]
    gradients = [torch.empty_like(x) for out, x in zip(op.outputs, outputs) if out.grad]
    wants = [i in subject.wanting for i, arg in enumerate(op.args) if arg.is_float]
    backward = getattr(operators, f"{op.name}_backward").default
    both = (*inputs.tensors, *saved, *gradients, *inputs.params, wants)
    yield "backward", lambda: backward(*both)


def _dtype(op: Op) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m bench.gpu.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    record = Record()
    unjudge()
    case = next(case for case in CASES if case.name == "usual")
    with torch._C._AutoDispatchBelowAutograd():  # as calls that eager mode makes
        for backend in (b for b in BACKENDS if "cuda" in b.devices):
            for op in (op for op in OPS.values() if case.fits(op)):
                for direction, call in calls(Subject(op, case, _dtype(op), "cuda"), backend):
                    call()
                    record.reset()
                    call()
                    launches = record.launches()
                    row = {"op": op.name, "backend": backend.name, "direction": direction, "launches": launches}
                    print(json.dumps({**row, "host_us": round(microseconds(call), 2)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
