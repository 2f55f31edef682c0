"""``make gpu-check``: on a machine with a GPU, build, prove every backend there is, measure the goals for a GPU, and
write one dated file for the device.

No network: the interpreter's own torch, setuptools, CMake, Ninja and pybind11. Exit status 1 when there is no GPU,
when the build fails or when any row of the contract grid does. Run as ``python -m bench.gpu_check`` from the checkout.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu-check: no GPU that torch {torch.__version__} can use is here", file=sys.stderr)
        return 1
    # The CUDA library too, where nvcc is.
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "MEMKERNELS_CUDA": "1"})
    subprocess.run([sys.executable, "-m", "memkernels", "info"], cwd=ROOT, check=True)

    from memkernels import testing

    from . import cases
    from .__main__ import measure
    from .harness import Settings
    from .results import DIRECTORY, environment
    from .text import plain

    # The native library was built for this interpreter's torch: the CPU grid proves that too.
    rows = testing.check(device="cuda") + testing.check(device="cpu", quick=True)
    print(testing.report(rows))
    correct = bool(rows) and all(row.passed for row in rows)
    # Speed is told of what is right alone.
    speeds = measure(cases.select([], "cuda"), Settings("cuda", torch.get_num_threads())) if correct else []
    print(plain(speeds) if speeds else "nothing was timed: the grid is not green")
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower()
    path = DIRECTORY / f"gpu-check-{name}-{datetime.date.today()}.json"
    result = {
        "environment": environment("cuda", torch.get_num_threads()),
        "grid": [dataclasses.asdict(r) for r in rows],
        "speed": speeds,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0 if correct and not any(row["why"] for row in speeds) else 1


if __name__ == "__main__":
    sys.exit(main())
