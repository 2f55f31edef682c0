"""Tiers that a device gathers from: its own memory, or page-locked memory that it reads by address.

A prefetch runs on the side stream of the copies. The wait of its ticket lets the current stream wait, not the host.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._copies import Copies
from ._errors import StoreBusy
from ._table_layout import Layout
from ._table_slots import in_range, result, slots_of


class DeviceTicket:
    """Rows on their way. :meth:`wait` returns them, in the order of the current stream."""

    def __init__(self, tier: OnDevice, rows: Tensor, event: Any):
        self._tier, self._rows, self._event, self._held = tier, rows, event, rows.nbytes
        tier.outstanding[id(self)] = self._held
        weakref.finalize(self, tier.outstanding.pop, id(self), None)

    def wait(self) -> Tensor:
        """The rows ``[..., V]``, those of ``gather``. The current stream waits for them."""
        if self._event is not None:
            self._tier.copies.wait("compute", self._event)
            self._event = None
            self._tier.outstanding.pop(id(self), None)
            if self._rows.is_cuda:
                self._rows.record_stream(torch.cuda.current_stream(self._rows.device))
        return self._rows

    def done(self) -> bool:
        """Has the device filled them?"""
        return self._event is None or self._event.query()


class OnDevice:
    """Rows ``[N, V]`` and scales as tensors of a device."""

    def __init__(
        self,
        name: str,
        t: Layout,
        values: Tensor,
        scales: Tensor | None,
        out_dtype: torch.dtype,
        copies: Copies,
        bounds: tuple[int, int, int],
    ):
        self.name, self.layout, self.out_dtype, self.copies = name, t, out_dtype, copies
        self.values: Any = values
        self.scales = scales
        self.most_tickets, self.most_bytes = bounds[1:]
        self.outstanding: dict[int, int] = {}  # tickets that nobody waited for, and their bytes
        self.rows = self.tickets = 0
        self.process = os.getpid()

    def gather(self, slots: Any, out: Any) -> Tensor:
        at = self._slots("gather", slots)
        rows = self._gather(at, self.out_dtype if out is None else self._into("gather", out, at).dtype)
        self.rows += at.numel()
        return rows if out is None else out.copy_(rows)

    def prefetch(self, slots: Any, out: Any) -> DeviceTicket:
        at = self._slots("prefetch", slots)
        into = None if out is None else self._into("prefetch", out, at)
        held = at.numel() * self.layout.width * self.out_dtype.itemsize
        full = sum(self.outstanding.values())
        if len(self.outstanding) >= self.most_tickets or (full and full + held > self.most_bytes):
            what = f"{len(self.outstanding)} tickets of {full} bytes are outstanding"
            raise StoreBusy(f"prefetch: {self.name}: {what}; wait for one, drop one, or open it with more")
        self.copies.wait("copy", self.copies.record("compute"))  # what made the slots
        with self.copies.aside():
            rows = self._gather(at, self.out_dtype if into is None else into.dtype)
            if into is not None:
                rows = into.copy_(rows)
        if at.is_cuda:
            at.record_stream(self.copies.stream)
        self.rows += at.numel()
        self.tickets += 1
        return DeviceTicket(self, rows, self.copies.record("copy"))

    def _gather(self, at: Tensor, dtype: torch.dtype) -> Tensor:
        block = self.layout.block if self.layout.scale else None
        rows = ops.gather_rows(self.values, at.view(-1), value_scale=self.scales, block=block, dtype=dtype)
        return rows.view(*at.shape, self.layout.width)

    def _slots(self, op: str, slots: Any) -> Tensor:
        """Slots on the device; those of the host are checked, those of the device by its kernel."""
        at = slots_of(op, slots)
        if at.device.type == "cpu":
            in_range(op, at, self.layout.rows)
        return at.to(self.values.device).contiguous()

    def _into(self, op: str, out: Any, at: Tensor) -> Tensor:
        return result(op, out, at, self.layout, self.out_dtype, self.values.device)

    def counts(self) -> dict[str, int]:
        held = {"outstanding": len(self.outstanding), "outstanding_bytes": sum(self.outstanding.values())}
        zero = dict.fromkeys(("misses", "awaited", "reads", "bytes_read", "resident", "evictions"), 0)
        return {"rows": self.rows, "hits": self.rows, "tickets": self.tickets, **held, **zero}

    def close(self) -> None:
        if self.process == os.getpid() and self.values is not None:
            self.copies.wait("host", self.copies.record("copy"))
            self.copies.wait("host", self.copies.record("compute"))
            self.values = self.scales = None
