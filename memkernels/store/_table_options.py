"""The options with which a table is opened, and where a new one may lie."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .. import _native
from ._columns import dtype_name
from ._errors import StoreError
from ._io import refuse_network, writing
from ._layout import whole
from ._table_layout import MOST_ROWS, Layout
from ._table_slots import readable

TIERS = ("ram", "shared", "mmap", "direct", "pinned", "device")
DEVICES = ("pinned", "device")
MOST_THREADS = 4096
MOST_BYTES = 1 << 62


class Options:
    """The options of :meth:`RowTable.open`, checked."""

    def __init__(
        self,
        op: str,
        tier="ram",
        cache_rows=0,
        threads=16,
        device=None,
        out_dtype=None,
        tickets=64,
        ticket_bytes=1 << 30,
    ):
        if tier not in TIERS:
            raise ValueError(f"{op}: tier must be {', '.join(map(repr, TIERS))}, got {tier!r}")
        self.tier, self.device, self.out_dtype = tier, device, out_dtype
        self.cache_rows = whole(op, "cache_rows", cache_rows, 0, MOST_ROWS)
        if self.cache_rows and tier != "direct":
            raise ValueError(f"{op}: cache_rows must be 0 beside tier={tier!r}, got {cache_rows}")
        if device is not None and tier not in DEVICES:
            raise ValueError(f"{op}: device must be None beside tier={tier!r}, got {device!r}")
        self.bounds = (
            whole(op, "threads", threads, 1, MOST_THREADS),
            whole(op, "tickets", tickets, 1, MOST_ROWS),
            whole(op, "ticket_bytes", ticket_bytes, 0, MOST_BYTES),
        )
        if tier not in DEVICES and (reason := _native.missing()):
            raise StoreError(f"{op}: tier={tier!r} needs the native library; {reason}")

    def dtype(self, op: str, t: Layout) -> torch.dtype:
        if self.out_dtype is None:
            return t.read_dtype
        if self.out_dtype not in readable(t):
            names = " or ".join(dtype_name(d) for d in readable(t))
            got = dtype_name(self.out_dtype) if isinstance(self.out_dtype, torch.dtype) else repr(self.out_dtype)
            raise TypeError(f"{op}: out_dtype must be {names} beside rows of {dtype_name(t.dtype)}, got {got}")
        return self.out_dtype


def new_place(path: Path) -> None:
    """Room for a new file at ``path``."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path}: there is something already; a table is made where nothing is")
    refuse_network(path.parent)
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
