"""Host time of calls: ``python -m bench.gpu.host``, over a driver that records launches instead of running them.

Prints one object a line: op, backend, direction, kernels launched, and microseconds of processor time that the operator
takes, median of several runs. With no device to wait for, what is left is what a call costs before a kernel runs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from memkernels.backends import BACKENDS
from memkernels.registration import OPS
from memkernels.testing import CASES, Subject

from .stand_in import Record
from .unjudged import unjudge

CALLS, RUNS = 200, 9


def microseconds(call: Callable[[], object]) -> float:
    """Processor time of this thread for one call: what else runs on the machine does not count."""
    samples = []
    for _ in range(RUNS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        samples.append((time.thread_time() - begin) / CALLS * 1e6)
    return statistics.median(samples)


def calls(subject: Subject, namespace: str) -> list[tuple[str, Callable[[], object]]]:
    """The operators of one op as autograd calls them, below its own layer."""
    op, inputs = subject.op, subject.inputs
    operators = getattr(torch.ops, namespace)
    arguments = (*inputs.tensors, *inputs.params)
    forward = getattr(operators, op.name).default
    outputs = forward(*arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    names = [out.name for out in op.outputs]
    saved = [outputs[names.index(name)] for name in op.saved]
    gradients = [torch.empty_like(x) for out, x in zip(op.outputs, outputs) if out.grad]
    wants = [i in subject.wanting for i, arg in enumerate(op.args) if arg.is_float]
    backward = getattr(operators, f"{op.name}_backward").default
    both = (*inputs.tensors, *saved, *gradients, *inputs.params, wants)
    return [("forward", lambda: forward(*arguments)), ("backward", lambda: backward(*both))]


def main() -> int:
    record = Record()
    unjudge()
    case = next(case for case in CASES if case.name == "usual")
    with torch.no_grad():
        for backend in BACKENDS:
            if "cuda" not in backend.devices:
                continue
            for op in OPS.values():
                if not case.fits(op):
                    continue
                for direction, call in calls(Subject(op, case, torch.bfloat16, "cuda"), backend.namespace):
                    if backend.gap(op.name, "cuda", torch.bfloat16, direction) is not None:
                        continue
                    call()
                    record.reset()
                    call()
                    launches = record.launches()
                    row = {"op": op.name, "backend": backend.name, "direction": direction, "launches": launches}
                    print(json.dumps({**row, "host_us": round(microseconds(call), 2)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
