"""Tiers that the processor gathers from: memory, a mapped file, or a file that is read past the page cache.

The native table (csrc/table) does all of it; a call from Python is one operator. Tickets are numbers there.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _torch
from ._errors import StoreBusy, StoreError
from ._table_layout import Layout
from ._table_slots import CPU, in_range, out_of_range, result, slots_of

COUNTS = (
    *("rows", "hits", "misses", "awaited", "reads", "bytes_read"),
    *("tickets", "outstanding", "outstanding_bytes", "resident", "evictions"),
)


def _operator(name: str) -> Any:
    return None if _native.missing() else _torch.bare(getattr(torch.ops.memkernels_cpu, f"row_table_{name}").default)


_gather, _prefetch = _operator("gather"), _operator("prefetch")
_wait, _done, _drop = _operator("wait"), _operator("done"), _operator("drop")
_close, _counts = _operator("close"), _operator("counts")
_memory, _file = _operator("memory"), _operator("file")


class HostTicket:
    """Rows on their way. :meth:`wait` returns them, as often as it is called; a ticket may also be dropped."""

    def __init__(self, tier: Host, number: int, rows: Tensor, device: torch.device):
        self._tier, self._number, self._rows, self._device = tier, number, rows, device
        self._error: str | None = None
        tier.tickets.add(self)

    def wait(self) -> Tensor:
        """The rows ``[..., V]``, those of ``gather``. Raises StoreError where they cannot be read."""
        self._settle()
        if self._error is not None:
            raise StoreError(self._error)
        return self._rows if self._device == CPU else self._rows.to(self._device)

    def done(self) -> bool:
        """Would :meth:`wait` return at once?"""
        return not self._number or _done(self._tier.handle, self._number)

    def _settle(self) -> None:
        if self._number:
            try:
                _wait(self._tier.handle, self._number)
            except RuntimeError as error:
                self._error = self._tier.why("wait", error)
            self._number = 0

    def __del__(self):
        if getattr(self, "_number", 0) and self._tier.process == os.getpid():
            with contextlib.suppress(Exception):
                _drop(self._tier.handle, self._number)


class Host:
    """A native table, and what belongs to it: ``memory`` that it points into, ``release`` for when it is closed."""

    def __init__(self, name: str, t: Layout, out_dtype: torch.dtype, handle: int, release: Callable[[], None]):
        self.name, self.layout, self.out_dtype, self.handle = name, t, out_dtype, handle
        self.width = (t.width,)
        self.release = release
        self.process = os.getpid()
        self.tickets: weakref.WeakSet[HostTicket] = weakref.WeakSet()
        self.closed = False

    def gather(self, slots: Any, out: Any) -> Tensor:
        if type(slots) is Tensor and slots.dtype == torch.int64:
            try:
                rows = out
                if rows is None:
                    rows = torch.empty(slots.shape + self.width, dtype=self.out_dtype, device=CPU)
                wrong = _gather(self.handle, slots, rows)
            except RuntimeError as error:
                if "cannot read: " in str(error):
                    raise StoreError(self.why("gather", error)) from None
            else:
                if wrong == -1:
                    return rows
                raise out_of_range("gather", wrong, self.layout.rows)
        return self._checked_gather(slots, out)

    def _checked_gather(self, slots: Any, out: Any) -> Tensor:
        """What the operator does not take: other integers, other devices, and everything that is wrong."""
        at = slots_of("gather", slots)
        rows = result("gather", out, at, self.layout, self.out_dtype, CPU)
        try:
            wrong = _gather(self.handle, at.to(CPU).contiguous(), rows)
        except RuntimeError as error:
            raise StoreError(self.why("gather", error)) from None
        if wrong != -1:
            raise out_of_range("gather", wrong, self.layout.rows)
        return rows if out is not None else rows.to(at.device)

    def prefetch(self, slots: Any, out: Any) -> HostTicket:
        at = slots_of("prefetch", slots)
        near = at.to(CPU).contiguous()
        rows = result("prefetch", out, at, self.layout, self.out_dtype, CPU)
        try:
            number = _prefetch(self.handle, near, rows)
        except RuntimeError as error:
            raise StoreError(self.why("prefetch", error)) from None
        if number < 0:
            in_range("prefetch", near, self.layout.rows)
        if number <= 0:
            now = self.counts()
            held = f"{now['outstanding']} tickets of {now['outstanding_bytes']} bytes are outstanding"
            raise StoreBusy(f"prefetch: {self.name}: {held}; wait for one, drop one, or open it with more")
        return HostTicket(self, number, rows, CPU if out is not None else at.device)

    def counts(self) -> dict[str, int]:
        counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=CPU)
        _counts(self.handle, counts)
        return dict(zip(COUNTS, counts.tolist()))

    def why(self, op: str, error: RuntimeError) -> str:
        """What the native table says, as a sentence about this one."""
        first = str(error).partition("\n")[0]
        reason = first.partition("cannot read: ")[2] or first
        if self.closed or "there is no open table" in first:
            reason = "is closed; open it again"
        return f"{op}: {self.name}: {reason}"

    def close(self) -> None:
        """Wait for what has begun, and let everything go. Nothing in another process than that which opened it."""
        if self.closed or self.process != os.getpid():
            return
        for ticket in list(self.tickets):
            ticket._settle()
        self.closed = True
        _close(self.handle)
        self.release()


def _scales(scales: Tensor | None) -> Tensor | None:
    """As the operators take them: torch's stable interface does not know float8_e8m0fnu."""
    if scales is None or scales.dtype == torch.float32:
        return scales
    return scales.view(torch.uint8)


def in_memory(
    name: str,
    t: Layout,
    values: Tensor,
    scales: Tensor | None,
    out_dtype,
    bounds: tuple[int, int, int],
    release,
    paged: bool = False,
) -> Host:
    """Rows ``[N, V]`` and scales where they lie. ``bounds``: threads, tickets, bytes of tickets."""
    return Host(name, t, out_dtype, _memory(values, _scales(scales), t.block, paged, *bounds), release)


def in_file(
    name: str,
    t: Layout,
    fd: int,
    scales: Tensor | None,
    out_dtype,
    cache_rows: int,
    bounds: tuple[int, int, int],
    release,
) -> Host:
    """Rows of a file that is open with O_DIRECT, and scales in memory."""
    like = torch.empty((0, t.width), dtype=t.dtype, device=CPU)
    handle = _file(fd, t.offsets[0], t.rows, like, _scales(scales), t.block, cache_rows, *bounds)
    return Host(name, t, out_dtype, handle, release)
