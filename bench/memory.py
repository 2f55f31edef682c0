"""Peak extra memory of a call, in a process of its own: ``python -m bench.memory OP DIRECTION DEVICE THREADS [quick]``.

Extra is what lies above the start at the highest point, less the results; for the backward it is that of forward and
backward together, as in training. On the CPU the mark is that of the resident set, which sees every allocation, also
those that do not go through torch.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from memkernels.spec import several

from .case import OWN, Case
from .check import Exact
from .peers import peers_of
from .variants import d_output, first, leaves, own

# glibc: every large allocation a mapping of its own, so that what is freed leaves the resident set at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(case: Case, device: str, threads: int, quick: bool) -> dict:
    """``{variant: (bytes, error), "tolerance": ...}``."""
    command = [sys.executable, "-m", "bench.memory", case.op, case.direction, device, str(threads)]
    done = subprocess.run(
        command + ["quick"] * quick,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def peak_extra(call: Callable[[], tuple[torch.Tensor, ...]], device: str) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Bytes, and the results of the call."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the current size
        before = _status("VmRSS")
        kept = call()
        peak = _status("VmHWM") - before
    return max(0, peak - sum(t.nbytes for t in kept)), kept


def step(case: Case, make_run: Callable, inputs: dict, d_out: torch.Tensor | None) -> Callable:
    """The call whose memory counts: the forward, or forward and backward."""
    inputs = leaves(case, inputs)
    run = make_run(**inputs, **case.options)

    def call():
        result = run()
        output = several(result)
        if d_out is None:
            return output
        return (*output, *torch.autograd.grad(first(result), [inputs[name] for name in case.grads], d_out))

    return call


def main() -> None:
    from .cases.memory import CASES

    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("op", choices=sorted({case.op for case in CASES}))
    parser.add_argument("direction", choices=("forward", "backward"))
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("threads", type=int)
    parser.add_argument("quick", nargs="?", choices=("quick",), help="small sizes")
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(options.direction == "backward")
    case = next((c for c in CASES if (c.op, c.direction) == (options.op, options.direction)), None)
    if case is None:
        parser.error(f"no case measures the {options.direction} of {options.op}")
    sizes = case.quick if options.quick else case.sizes
    variants = {OWN: own(case), **peers_of(case, quick=True)[0]}
    tiny = case.make({**sizes, "T": 4, "N": 64}, case.torch_dtype, device, seed=0)
    inputs = case.make(sizes, case.torch_dtype, device, seed=0)
    d_out = d_output(case, inputs)
    extra, got = {}, {}
    for name, make_run in variants.items():
        step(case, make_run, tiny, d_output(case, tiny))()  # loads the kernels, starts the threads
        extra[name], kept = peak_extra(step(case, make_run, inputs, d_out), device)
        got[name] = [t.detach() for t in (kept[-len(case.grads) :] if case.grads else kept[:1])]
        del kept
    exact = Exact(case, inputs, d_out)
    found = {name: (extra[name], exact.error(got[name])) for name in variants}
    print(json.dumps({**found, "tolerance": exact.limit()}))


if __name__ == "__main__":
    main()
