"""A device on the CPU that is as late as a real one may be, and says so where somebody relies on luck.

Copies run when something waits for them and no earlier; until then their target holds 0xff, as a copy may begin at
once. Kernels count as running until a copy or the host waits for an event behind them. What PyTorch runs on the arenas
is seen by a dispatch mode, so that a read without an order, or a copy into what a kernel reads, is an error at once.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels.store._copies import Copies


class Disorder(AssertionError):
    """A kernel, a copy or the host did not wait for another."""


def span(x: Tensor) -> tuple[int, int]:
    """The addresses between which the numbers of ``x`` lie."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


class Late(Copies):
    """``only``: queues whose waits are left out, as a mutant. ``failing``: the copy of that number fails."""

    left_out: tuple = ()
    failing = -1

    def __init__(self, device):
        super().__init__(device)
        self.arenas: list[Tensor] = []
        self.staged: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # target, source, what the source held
        self.begun = self.done = 0  # copies
        self.kernels = self.waited_for = 0  # that ran, and that copies wait for
        self.reads: list[tuple[int, tuple[int, int]]] = []  # number of the kernel, what it read
        self.busy = False

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.arenas)

    def empty(self, *shape, dtype=torch.float32):
        memory = super().empty(*shape, dtype=dtype)
        memory.view(torch.uint8).fill_(255)
        self.arenas.append(memory)
        return memory

    def stage(self, target, source):
        self.reads = [read for read in self.reads if read[0] > self.waited_for]
        if any(overlap(span(target), where) for _, where in self.reads):
            raise Disorder("a copy writes to what a kernel reads")
        self.busy = True
        target.view(torch.uint8).fill_(255)
        self.staged.append((target, source, source.clone()))
        self.busy = False
        self.begun += 1

    def record(self, queue):
        return queue, self.begun if queue == "copy" else self.kernels

    def wait(self, queue, event):
        behind, number = event
        if queue in self.left_out:
            return
        if behind == "compute":
            self.waited_for = max(self.waited_for, number) if queue == "copy" else self.waited_for
            return
        while queue != "copy" and self.done < number:
            target, source, then = self.staged.popleft()
            self.done += 1
            if self.done - 1 == self.failing:
                raise RuntimeError("the copy failed")
            self.busy = True
            if not torch.equal(source.view(torch.uint8), then.view(torch.uint8)):
                raise Disorder("page-locked memory was filled again before its copy was done")
            target.copy_(source)
            self.busy = False

    def sees(self, x: Tensor) -> None:
        """A kernel reads ``x``."""
        where = span(x)
        if any(overlap(where, span(arena)) for arena in self.arenas):
            if any(overlap(where, span(target)) for target, _, _ in self.staged):
                raise Disorder("a kernel reads what a copy writes")
            self.reads.append((self.kernels + 1, where))


class Watched(TorchDispatchMode):
    """Shows a device every kernel that runs."""

    def __init__(self, device: Late):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        device = self.device
        if not device.busy and not function.is_view:
            for x in torch.utils._pytree.tree_leaves((args, kwargs or {})):
                if isinstance(x, Tensor):
                    device.sees(x)
            device.kernels += 1
        return function(*args, **(kwargs or {}))
