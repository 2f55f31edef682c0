"""A device on the CPU that is as late as a real one may be, and says so where somebody relies on luck.

Copies run when something waits for them and no earlier; until then their target holds 0xff, as a copy may begin at
once. Kernels count as running until a copy or the host waits for an event behind them. What PyTorch runs on the arenas
is seen by a dispatch mode, so that a read without an order, or a copy into what a kernel reads, is an error at once.
"""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from memkernels.store import MemoryStore, _engine
from memkernels.store._copies import Copies
from memkernels.store._memory import aligned


class Disorder(AssertionError):
    """A kernel, a copy or the host did not wait for another."""


def span(x: Tensor) -> tuple[int, int]:
    """The addresses between which the numbers of ``x`` lie."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


class Late(Copies):
    """A device "cpu", or one beside it: "meta", whose tensors are :class:`Far`.

    ``left_out``: queues whose waits are left out, as a mutant. ``failing``: the copy of that number fails.
    """

    left_out: tuple = ()
    failing = -1

    def __init__(self, device):
        super().__init__(torch.device("cpu"))
        self.device = device
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
        memory = torch.empty(shape, dtype=dtype)
        memory.view(torch.uint8).fill_(255)
        self.arenas.append(memory)
        return Far(memory) if self.device.type == "meta" else memory

    def locked(self, size):
        return aligned(size)

    def stage(self, target, source):
        target = near(target)
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


class Far(Tensor):
    """A tensor of the device "meta" with numbers after all, in ``near``; only copies go from it to the CPU and back."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device="meta", **layout)
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function}: outside of Watched")


def near(x):
    return x.near if isinstance(x, Far) else x


def run(function, args, kwargs):
    """``function`` on the numbers of far and near tensors, never of both."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = any(isinstance(x, Far) for x in tensors)
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if far and not copies and any(x.dim() and not isinstance(x, Far) for x in tensors):
        raise RuntimeError(f"{function}: tensors of two devices")
    if function is torch.ops.aten.copy_.default:
        far = isinstance(args[0], Far)
    args, kwargs = tree_map(near, (args, kwargs))
    if kwargs.get("device") is not None:
        far = torch.device(kwargs["device"]).type == "meta"
        kwargs["device"] = torch.device("cpu")
    return tree_map(lambda x: Far(x) if far and isinstance(x, Tensor) else x, function(*args, **kwargs))


def use(monkeypatch) -> type[Late]:
    """Let stores open devices of this kind; returns their class, of which a test may change what is left out."""
    kind = type("Device", (Late,), {})
    autocast = torch.is_autocast_enabled
    monkeypatch.setattr(_engine, "Copies", kind)
    monkeypatch.setattr(_engine, "usable", torch.device)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *of: of != ("meta",) and autocast(*of))
    return kind


def on_device(path, frames: int, ram_pages: int = 4, device: str = "cpu", **options) -> MemoryStore:
    """A store with so many frames of each column on the device, and in memory."""
    with MemoryStore.open(path) as store:
        page = sum(c.slots * c.stored_bytes for c in store.columns.values())
    return MemoryStore.open(path, device=device, device_bytes=frames * page, ram_bytes=ram_pages * page, **options)


class Watched(TorchDispatchMode):
    """Shows the device of a store every kernel that runs."""

    def __init__(self, store: MemoryStore):
        super().__init__()
        self.device = store._engine.copies

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        device = self.device
        if not device.busy and not function.is_view:
            for x in tree_leaves((args, kwargs or {})):
                if isinstance(x, Tensor):
                    device.sees(near(x))
            device.kernels += 1
        return run(function, args, kwargs or {})


def watched(store: MemoryStore) -> contextlib.AbstractContextManager:
    """Kernels in the block are shown to the device, where it is a late one."""
    return Watched(store) if isinstance(store._engine.copies, Late) else contextlib.nullcontext()
