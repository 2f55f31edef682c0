"""Copies from host memory to a device, on a stream of their own, so that they overlap with reading and with compute.

Three queues run side by side: "copy", "compute" (the current stream of the device) and "host" (this thread). An event
that is recorded in one queue is behind all that was put there before, and another queue waits for it:

    compute waits for a copy         before a kernel reads what it wrote
    copy waits for compute           before it overwrites what a kernel reads
    host waits for a copy            before it fills the page-locked memory again that the copy reads

On the device "cpu", which has no streams, each is done when its call returns.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._io import ALIGN
from ._memory import aligned

Event = Any  # of the module of the device, such as torch.cuda.Event
Queue = Literal["copy", "compute", "host"]
KINDS = ("cuda", "cpu")


class Copies:
    def __init__(self, device: torch.device):
        self.device = device
        self.tiers: list = []  # that hold what is copied
        self.module = torch.get_device_module(device)
        self.stream = self.module.Stream(device) if device.type == "cuda" else self.module.Stream()

    def stage(self, target: Tensor, source: Tensor) -> None:
        """Put a copy behind those before it. ``source`` lies in :meth:`locked` memory, ``target`` on the device."""
        with self.module.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def record(self, queue: Literal["copy", "compute"]) -> Event:
        """An event behind all that the queue holds."""
        event = self.module.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: Queue, event: Event) -> None:
        """What is put in the queue from now on runs after the event."""
        if queue == "host":
            event.synchronize()
        else:
            event.wait(self._stream(queue))

    def _stream(self, queue: str) -> Any:
        return self.stream if queue == "copy" else self.module.current_stream(self.device)

    def locked(self, size: int) -> Tensor:
        """uint8 [size] of page-locked memory that begins a page of memory."""
        if self.device.type == "cpu":
            return aligned(size)
        memory = torch.empty(size + ALIGN, dtype=torch.uint8, device="cpu", pin_memory=True)
        begin = -memory.data_ptr() % ALIGN
        return memory[begin : begin + size]

    def visible(self, memory: Tensor) -> Tensor:
        """uint8 [size] of :meth:`locked` memory as a tensor of the device, which reads it by its address."""
        return memory if self.device.type == "cpu" else torch.as_tensor(_Visible(memory), device=self.device)

    def aside(self) -> Any:
        """What is called in the block goes behind the copies, beside what the device computes."""
        return self.module.stream(self.stream)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of the device, which goes back to its allocator only when copies into it are done."""
        memory = torch.empty(shape, dtype=dtype, device=self.device)
        if self.device.type == "cuda":
            memory.record_stream(self.stream)
        return memory


class _Visible:
    """Page-locked memory for :func:`torch.as_tensor`, which keeps this object with the tensor."""

    def __init__(self, memory: Tensor):
        self.memory = memory
        where = {"data": (memory.data_ptr(), False), "version": 3}
        self.__cuda_array_interface__ = {"shape": (len(memory),), "typestr": "|u1", "strides": None, **where}


def usable(device: torch.device | str) -> torch.device:
    """``device`` with its number, or a ValueError that says why it holds no tier."""
    wanted = f"open: device must be a CUDA device that this torch can use, or cpu, got {str(device)!r}"
    try:
        found = torch.device(device)
        if found.type not in KINDS:
            raise ValueError(wanted)
        return torch.empty(0, device=found).device
    except (RuntimeError, TypeError, AssertionError) as error:  # the last of these where torch is built without CUDA
        why = str(error).partition("\n")[0]
        raise ValueError(f"{wanted} ({why})") from None
