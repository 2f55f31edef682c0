"""From a call to kernels on a device: architecture, configuration, blocks, splits, and the launch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import configs
from .layout import Call, allows_tf32
from .replay import INTERPRETED, recording

# The widest row that one block holds, by bits of an element, and the blocks in which wider rows go. An exact float32
# product has no matrix instruction and keeps whole rows of both operands in registers, so its rows are shorter: at 128
# columns hardly any block fits without spills, and what is only summed over goes in short blocks.
WIDEST = {16: 256, 32: 128}
WIDEST_EXACT = 64
STEP = {16: 128, 32: 64}
SUMMED_EXACT = 16
# The most steps of a sum in one float32 accumulator. Ones stop at 2^24 of them, and the error of n equal terms grows as
# n 2^-25; longer loops are cut into parts, which are added as a tree.
LONGEST = 1 << 18


@functools.cache
def architecture(device: torch.device) -> tuple[str, int]:
    """The rows of the table that serve ``device``, and its compute capability, 9.0 as 90."""
    if INTERPRETED:
        return "interpreter", 0
    major, minor = torch.cuda.get_device_capability(device)
    return configs.nearest(10 * major + minor), 10 * major + minor


@dataclass(frozen=True)
class Width:
    """A row width in blocks."""

    size: int
    block: int
    steps: int

    @property
    def several(self) -> int:
        """1 for one block, 2 for more: as much of ``steps`` as most kernels are compiled for, one for all wide rows."""
        return min(self.steps, 2)


@functools.cache
def _width(size: int, bits: int, exact: bool) -> Width:
    if size <= (WIDEST_EXACT if exact else WIDEST[bits]):
        return Width(size, max(16, triton.next_power_of_2(size)), 1)
    return Width(size, STEP[bits], triton.cdiv(size, STEP[bits]))


def width(size: int, *tensors: Tensor | None) -> Width:
    """Rows of ``size`` columns in a kernel on ``tensors``: blocks of a power of two, at least 16 as matrix
    instructions need."""
    return _width(size, bits(*tensors), _exact(tensors))


def summed(size: int, *tensors: Tensor | None) -> Width:
    """The same for columns that a kernel sums over and does not write: every block costs no more than its loads."""
    if _exact(tensors):
        return Width(size, SUMMED_EXACT, max(1, triton.cdiv(size, SUMMED_EXACT)))
    return width(size, *tensors)


def narrowed(width: Width, most: int) -> Width:
    """The same columns in blocks of at most ``most``, a power of two."""
    return width if width.block <= most else Width(width.size, most, triton.cdiv(width.size, most))


def _exact(tensors: tuple) -> bool:
    return bits(*tensors) == 32 and not allows_tf32()


def bits(*tensors: Tensor | None) -> int:
    """Bits of an element, as the table of configurations has them."""
    return 32 if any(t is not None and t.dtype == torch.float32 for t in tensors) else 16


@dataclass(frozen=True)
class Plan:
    """What the launcher of one kernel needs to know. row: the key of ``config`` in the table."""

    row: tuple[str, str, int, int]
    config: configs.Config
    processors: int

    @property
    def options(self) -> dict[str, int]:
        limit = {"maxnreg": self.config.registers} if self.config.registers else {}
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, **limit}

    def cut(self, programs: int, size: int, block: int, least: int = 4, sums: bool = True) -> tuple[int, int]:
        """Parts of a loop over ``size`` in blocks so that ``programs`` fill the SMs, and of one that ``sums`` so that
        none is longer than LONGEST: their count and length.

        From shapes and the table alone, so that the same call adds in the same order on every run.
        """
        steps, parts = triton.cdiv(size, block), 1
        if 0 < programs < self.processors:
            parts = max(1, min(2 * self.processors // programs, steps // least, 128))
        if sums:
            parts = max(parts, triton.cdiv(size, LONGEST))
        span = max(1, triton.cdiv(steps, parts)) * block
        return max(1, triton.cdiv(size, span)), span


def plan(kernel: str, widest: int, *tensors: Tensor | None, compressed: bool = False) -> Plan:
    """The configuration of ``kernel`` for rows of ``widest`` columns and the dtypes of ``tensors``.

    compressed: of its variant that decodes 8-bit rows, which takes registers.
    """
    arch = recording().arch
    if compressed:
        kernel = f"{kernel}_compressed"
    row = configs.row(kernel, arch, bits(*tensors), width(widest, *tensors))
    return Plan(row, configs.table()[row], configs.PROCESSORS[arch])


def launch(kernel, programs: int, *arguments, plan: Plan, **constants) -> None:
    """Note a launch of ``programs`` programs. It does not synchronise or allocate: a CUDA graph can capture it."""
    if programs:
        recording().launch(kernel, programs, arguments, constants, plan.options, plan.row)


class _Parts:
    """Where a kernel with a split loop writes: into ``target`` itself, or float32 parts that ``add`` sums in order."""

    def __init__(self, call: Call, target: tuple | None, parts: int) -> None:
        self.target, self.out, self.step, self.buffer = target, target, 0, None
        if target is not None and parts > 1:
            self.buffer = call.scratch(parts, *target[0].shape)
            strides = self.buffer.stride()[1:5] if len(target) == 5 else target[1:]  # memory results are contiguous
            self.out, self.step = (self.buffer, *strides), self.buffer.stride(0)

    def add(self) -> None:
        if self.buffer is not None:
            self.target[0].copy_(self.buffer.sum(0))


def launch_in_parts(
    call: Call, kernel, programs: int, size: int, block: int, before: tuple, targets: Sequence[tuple | None],
    between: tuple, cut: Callable[..., tuple], *after: float, plan: Plan, **constants,
) -> None:  # fmt: skip
    """Run ``programs`` instances whose loop over ``size`` is cut into parts, and add what the parts give to targets.

    The kernel takes ``before``, a place for every target, ``between``, a ``cut`` and ``after``. cut: a named tuple of
    the count and the length of parts, and the step between the parts of every target.
    """
    parts, span = plan.cut(programs, size, block)
    outs = [_Parts(call, target, parts) for target in targets]
    launch(
        kernel, programs * parts, *before, *(o.out for o in outs), *between, cut(parts, span, *(o.step for o in outs)),
        *after, plan=plan, **constants,
    )  # fmt: skip
    for o in outs:
        o.add()
