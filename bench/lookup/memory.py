"""Memory in huge pages, as a table that is gathered from should have it."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page


def huge(size: int) -> Tensor:
    """uint8 [size] of zeros that begins a huge page, where the system gives any."""
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE
    return whole[begin : begin + size]


def in_huge_pages(tensor: Tensor) -> float:
    """The share of a tensor's memory that lies in huge pages."""
    at, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(x, 16) for x in words[0].split("-"))
            found = first <= at < last
        elif found and words[0] == "AnonHugePages:":
            return min(1.0, int(words[1]) * 1024 / max(tensor.nbytes // HUGE * HUGE, 1))
    return 0.0


def available() -> int:
    """Bytes that the system would give without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
