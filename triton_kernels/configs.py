"""Launch configurations: the table ``configs.json`` by kernel, architecture, bits of an element and row width.

Nothing is tuned when a kernel is called. Each row says how it was chosen: ``measured`` by ``python -m bench.tune`` on a
device of that architecture, or ``arithmetic``, from registers and shared memory (docs/triton.md). The rows of
``interpreter`` are small blocks, so that tests on small tensors cross block borders.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("configs.json")
ARCHITECTURES = ("80", "90", "100")
# SMs of the largest device of each: what a split must fill.
PROCESSORS = {"80": 108, "90": 132, "100": 148, "interpreter": 4}
# The smallest listed width >= the row; 512 means several blocks: of 32 bits that is above 128 columns, above 64 where
# products are exact (launch.width).
WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Config:
    """Tokens and slots of a block, warps of a program, stages of the software pipeline; how they were chosen.

    registers: the limit of a thread, where ptxas by itself would rather spill a few bytes to fit one more block on an
    SM; 0 leaves it to ptxas.
    """

    block_t: int
    block_n: int
    warps: int
    stages: int
    source: str
    registers: int = 0


@functools.cache
def table() -> dict[tuple[str, str, int, int], Config]:
    """(kernel, architecture, bits, width) -> configuration."""
    rows = json.loads(TABLE.read_text())
    key = ("kernel", "arch", "bits", "width")
    return {tuple(r[k] for k in key): Config(**{k: v for k, v in r.items() if k not in key}) for r in rows}


def nearest(capability: int) -> str:
    """The newest architecture of the table that is not newer than ``capability`` (8.0 as 80)."""
    older = [a for a in ARCHITECTURES if int(a) <= capability]
    if not older:
        raise RuntimeError(f"the kernels need compute capability 8.0, this device has {capability / 10}")
    return older[-1]


def reach(width) -> int:
    """Which of WIDTHS serves ``width`` (of ``launch.width``)."""
    return next((w for w in WIDTHS[:-1] if width.steps == 1 and width.block <= w), WIDTHS[-1])


def row(kernel: str, arch: str, bits: int, width) -> tuple[str, str, int, int]:
    """The key of the row for one kernel and ``width`` (of ``launch.width``)."""
    return (kernel, arch, 32, 64) if arch == "interpreter" else (kernel, arch, bits, reach(width))
