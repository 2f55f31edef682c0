"""Memory that the system gives when it is first touched."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
HUGE = 1 << 24  # bytes from which huge pages are worth it: a map of a billion slots has 30,000 small ones to be touched


def aligned(size: int) -> Tensor:
    """uint8 [size] that begins a page of memory."""
    memory = mmap.mmap(-1, max(size, 1), flags=PRIVATE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def zeros(size: int) -> np.ndarray:
    """uint8 [size], in huge pages where it is large."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(size, dtype=np.uint8)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
