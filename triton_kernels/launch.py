"""From a call to kernels on a device: architecture, configuration, blocks, splits, and the launch itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import configs

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from .interpreter import repair

    repair()
WIDEST = 256  # the widest row that one block holds
STEP = 128  # wider rows go in blocks of this


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> str:
    """The rows of the table that serve ``device``."""
    if INTERPRETED:
        return "interpreter"
    return configs.nearest(_capability(device.index or 0))


@dataclass(frozen=True)
class Width:
    """A row width in blocks."""

    size: int
    block: int
    steps: int


@functools.cache
def width(size: int) -> Width:
    """Blocks of a power of two, at least 16 as matrix instructions need."""
    if size <= WIDEST:
        return Width(size, max(16, triton.next_power_of_2(size)), 1)
    return Width(size, STEP, triton.cdiv(size, STEP))


@dataclass(frozen=True)
class Plan:
    """What the launcher of one kernel needs to know."""

    config: configs.Config
    processors: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.config.warps, "num_stages": self.config.stages}

    def splits(self, programs: int, steps: int, least: int = 4) -> int:
        """Into how many parts a loop of ``steps`` is cut so that ``programs`` fill the processors.

        From shapes and the table alone, so that the same call adds in the same order on every run.
        """
        if programs <= 0 or programs >= self.processors:
            return 1
        return max(1, min(2 * self.processors // programs, steps // least, 128))


def plan(kernel: str, device: torch.device, widest: int, *tensors: Tensor | None) -> Plan:
    """The configuration of ``kernel`` for rows of ``widest`` columns and the dtypes of ``tensors``."""
    bits = max(8 * t.element_size() for t in tensors if t is not None)
    arch = architecture(device)
    return Plan(configs.find(kernel, arch, bits, width(widest)), configs.PROCESSORS[arch])


def launch(kernel, programs: int, *arguments, plan: Plan, **constants) -> None:
    """Run ``programs`` instances. No synchronisation, no allocation: a CUDA graph can capture it."""
    if programs:
        kernel[(programs,)](*arguments, **constants, **plan.options)
