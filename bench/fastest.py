"""Times the backends of a GPU beside each other and writes which is the fastest, for ``auto`` to take it.

    python -m bench.fastest        # on a GPU: rewrites the rows of its compute capability in memkernels/fastest.json

A row is an op, bits of an element, and few or many tokens that share a memory. It is timed forward and, where the op
has gradients, backward: what training takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence

import torch

from memkernels.backends import BACKENDS, FASTEST
from memkernels.registration import OPS, call
from memkernels.spec import Op, several
from memkernels.testing.cases import Case
from memkernels.testing.inputs import make

from .timers import interleave

SIZES = {
    True: {"T": 4, "N": 65536, "K": 128, "V": 128, "k": 32},
    False: {"T": 1024, "N": 4096, "K": 128, "V": 128, "k": 32},
}
DTYPES = (torch.bfloat16, torch.float32)


def passes(op: Op, case: Case, dtype: torch.dtype, device: str, backend: str) -> Callable[[], object]:
    """Forward and backward of one call on ``backend``."""
    inputs = make(op, case, dtype, device)
    tensors = [t if t is None else t.detach() for t in inputs.tensors]
    leaves = [tensors[i].requires_grad_() for i in inputs.wanting(op, case)]

    def run():
        results = call(op, tensors, inputs.params, backend)
        results = [r for r in several(results) if r.requires_grad]
        if not results:
            return None
        given = [torch.ones((), dtype=r.dtype, device=r.device).expand_as(r) for r in results]
        return torch.autograd.grad(results, leaves, given, allow_unused=True)

    return run


def fastest(op: Op, few: bool, dtype: torch.dtype, device: str, names: Sequence[str], seconds: float = 0.3) -> str:
    """Which of the backends ``names`` takes the least time. One that cannot run the sizes is left out."""
    case = Case("few tokens" if few else "many tokens", sizes=SIZES[few])
    variants = {}
    for name in names:
        run = passes(op, case, dtype, device, name)
        try:
            run()
        except (RuntimeError, NotImplementedError) as error:
            print(f"{op.name} on {name}: {error}", file=sys.stderr)
        else:
            variants[name] = [run]
    spread = interleave(variants, device, seconds)
    told = ", ".join(f"{name} {s.median * 1e3:.3f} ms" for name, s in spread.items())
    print(f"{op.name} {8 * dtype.itemsize} bits, {case.name}: {told}", flush=True)
    return min(spread, key=lambda name: spread[name].median)


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m bench.fastest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if not torch.cuda.is_available():
        print(f"fastest: no GPU that torch {torch.__version__} can use is here", file=sys.stderr)
        return 1
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    rows = [row for row in json.loads(FASTEST.read_text()) if row["capability"] != capability]
    for op, dtype, few in itertools.product(OPS.values(), DTYPES, SIZES):
        names = [b.name for b in BACKENDS if b.gap(op.name, "cuda", dtype) is None]
        if len(names) > 1:
            name = fastest(op, few, dtype, "cuda", names)
            row = {"op": op.name, "capability": capability, "bits": 8 * dtype.itemsize, "few": few, "backend": name}
            rows.append({**row, "device": torch.cuda.get_device_name()})
    lines = ",\n".join(" " + json.dumps(row) for row in rows)
    FASTEST.write_text(f"[\n{lines}\n]\n" if rows else "[]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
