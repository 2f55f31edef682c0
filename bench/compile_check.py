"""Compiles every Triton kernel and shipped configuration ahead of time and reads the report. Needs no GPU.

    python -m bench.compile_check                   # every architecture, dtype and width; about an hour on one core
    python -m bench.compile_check --arch 90 --dtype bfloat16 --width 64 128

A kernel fails that spills registers, asks for more shared memory than a block may have, or has no matrix instruction
where it multiplies 16-bit (or TF32) matrices. Exit status 1 when one does. Triton keeps what it compiled by the hash of
its source (TRITON_CACHE_DIR), so a second run is short.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .compile import TARGETS, compiled

DTYPES = ("bfloat16", "float16", "float32", "tf32")
WIDTHS = (64, 128, 256, 512)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_check", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--width", nargs="+", type=int, choices=WIDTHS, default=WIDTHS)
    options = parser.parse_args(arguments)
    count = failed = 0
    for dtype in options.dtype:
        for width in options.width:
            for arch in options.arch:
                for one in compiled(arch, dtype, width):
                    count += 1
                    faults = one.faults()
                    failed += bool(faults)
                    print(f"{one}" + (f"  FAILED: {', '.join(faults)}" if faults else ""), flush=True)
    print(f"{count} kernels compiled, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
