"""RowTable: the rows of a lookup memory, wherever they lie.

    rows[j] = scale_{i, c} * values[i],    i = slots[j],    c the block of the column        (slot -1 gives zeros)

as :func:`memkernels.gather_rows` defines it, with the same bits on every tier.

Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup (Engram, arXiv 2601.07372): addresses are known before
the model runs, so rows can lie in RAM or on disk and be fetched ahead.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _table_file, _table_open, _table_safetensors, _table_write
from ._columns import dtype_name
from ._copies import Copies, usable
from ._errors import StoreError
from ._layout import absolute
from ._memory import zeros
from ._table_device import DeviceTicket
from ._table_file import Head
from ._table_host import HostTicket
from ._table_layout import Layout, layout
from ._table_options import Options, new_place
from ._table_shared import SharedCopy
from ._verify import Fault

_capturing = torch.cuda.is_current_stream_capturing if torch.backends.cuda.is_built() else lambda: False


class RowTable:
    """N rows of V numbers in a file, gathered by number. Made by :meth:`create` and :meth:`from_safetensors`, opened by
    :meth:`open`.

    Any number of threads may call it. A gather beside an update sees each number old or new. Every error is one
    sentence; see :class:`StoreError` and its kinds.
    """

    def __init__(self, path: Path | None, head: Head, tier: str, made: Any, memory: Any = None, copy: Any = None):
        self._path, self._head, self._tier, self._made = path, head, tier, made
        self._memory: Any = memory  # uint8 rows and scales, where update() may write
        self._copy: SharedCopy | None = copy
        self._lock = threading.RLock()
        self._dirty = False
        self._base: dict[str, int] = {}
        self._process = os.getpid()
        self._finish = weakref.finalize(self, made.close)

    # --- opening and closing ---

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        rows: int,
        width: int,
        *,
        dtype: torch.dtype,
        scale: str | None = None,
        scale_dtype: torch.dtype = torch.float32,
        values: Tensor | Iterable[Tensor] | None = None,
        tier: str = "ram",
        **options: Any,
    ) -> RowTable:
        """A new table in a file, opened.

        Args:
            path: a file that is not there yet, on a local file system.
            rows, width: N and V.
            dtype: float32, float64, bfloat16, float16, or, with a scale, int8 or float8_e4m3fn.
            scale: "row", or "block:B" for a scale for each B columns of a row; None for floats.
            scale_dtype: float32 or float8_e8m0fnu.
            values: rows ``[N, V]`` in float, or chunks ``[M, V]`` of them one after the other. None: zeros, which take
                no room on the disk.
            tier, options: as for :meth:`open`.

        Raises:
            FileExistsError: there is something at ``path``. ValueError, TypeError: an argument does not fit.
            StoreFormat: a network file system. StoreFull: no room.
        """
        place = absolute("create", path)
        t = layout("create", rows, width, dtype, scale, scale_dtype)
        new_place(place)
        if values is None:
            _table_file.write_zeros(place, t)
        else:
            _table_file.write(place, t, uuid.uuid4(), 0, _table_write.encoded(t, values))
        return cls.open(place, tier=tier, **options)

    @classmethod
    def from_safetensors(
        cls,
        files: Any,
        names: Any,
        path: str | os.PathLike | None = None,
        *,
        block: int | None = None,
        tier: str = "ram",
        **options: Any,
    ) -> RowTable:
        """A table out of the files of a model.

        Args:
            files: one file or several; a tensor may lie in any of them.
            names: of the tensor ``[N, V]`` of rows, or of several, in the order of their rows. The scale of
                ``X.weight`` is ``X.scale``, ``X.weight_scale``, ``X.weight_scale_inv`` or the like; a pair
                ``(rows, scale)`` names another.
            path: the file to write. None: the table lies in RAM and has no file.
            block: columns of a scale, where their number does not tell.
            tier, options: as for :meth:`open`.

        Raises:
            ImportError: safetensors is not installed. KeyError: no file has the tensor. FileNotFoundError,
                FileExistsError. ValueError, TypeError: a shape, dtype or scale does not fit, or a scale is missing.
        """
        op = "from_safetensors"
        with _table_safetensors.Tensors(op, files) as tensors:
            t, found = _table_safetensors.sources(tensors, names, block)
            chunks = (chunk for source in found for chunk in source.chunks(t))
            if path is not None:
                place = absolute(op, path)
                new_place(place)
                _table_file.write(place, t, uuid.uuid4(), 0, chunks)
                return cls.open(place, tier=tier, **options)
            if tier != "ram":
                raise ValueError(f"{op}: tier must be 'ram' where path is None, got {tier!r}")
            chosen = Options(op, tier, **options)
            memory = torch.from_numpy(zeros(t.sizes[0])), torch.from_numpy(zeros(t.sizes[1]))
            at = 0
            for rows, scales in chunks:
                for part, new in ((t.rows_of(memory[0]), rows), (t.scales_of(memory[1]), scales)):
                    if part is not None and new is not None:
                        part[at : at + len(new)].view(torch.uint8).copy_(new.view(torch.uint8))
                at += len(rows)
        head = Head(t, uuid.uuid4(), 0)
        made = _table_open.host("the table in RAM", head, memory, chosen.dtype(op, t), chosen.bounds)
        return cls(None, head, "ram", made, memory)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        tier: str = "ram",
        cache_rows: int = 0,
        threads: int = 16,
        device: torch.device | str | None = None,
        out_dtype: torch.dtype | None = None,
        tickets: int = 64,
        ticket_bytes: int = 1 << 30,
    ) -> RowTable:
        """Open a table.

        Args:
            path: the file that :meth:`create` made.
            tier: where its rows lie. "ram": memory of this process. "shared": one copy in memory for all processes of
                the machine. "mmap": the page cache. "direct": on the disk, read past the page cache. "pinned":
                page-locked memory that the device reads. "device": memory of the device.
            cache_rows: rows that tier "direct" keeps in memory.
            threads: that read and prefetch, and so how many reads of a disk are under way.
            device: for "pinned" and "device"; None: the current CUDA device.
            out_dtype: of the rows that a gather returns, any float; float64 beside float64 alone. None: the dtype of
                the table, float32 where it has 8 bits.
            tickets, ticket_bytes: most prefetches that nobody has waited for, and most bytes that they hold.

        Raises:
            FileNotFoundError: there is no table. StoreDamaged: bytes are not those that were written. StoreFormat: no
                table, one of a newer layout, or a file system without O_DIRECT. StoreFull: the shared memory has no
                room. ValueError, TypeError: an option does not fit.
        """
        place = absolute("open", path)
        chosen = Options("open", tier, cache_rows, threads, device, out_dtype, tickets, ticket_bytes)
        try:
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(f"open: {place}: there is no table; RowTable.create makes one") from None
        except OSError as error:
            raise StoreError(f"open: {place}: the system refused to open it ({error.strerror})") from error
        try:
            return cls._opened(place, fd, chosen)
        except OSError as error:
            raise StoreError(f"open: {place}: the system refused to read it ({error.strerror})") from error
        finally:
            os.close(fd)

    @classmethod
    def _opened(cls, path: Path, fd: int, chosen: Options) -> RowTable:
        head = _table_file.read_head(path, fd)
        out_dtype, tier = chosen.dtype("open", head.layout), chosen.tier
        memory: Any = None
        if tier == "ram":
            memory = _table_open.in_ram(path, fd, head)
            return cls(path, head, tier, _table_open.host(str(path), head, memory, out_dtype, chosen.bounds), memory)
        if tier == "shared":
            copy = _table_open.shared(path, head)
            head = copy.head
            size = head.layout.sizes[0]
            memory = copy.memory[:size], copy.memory[size:]
            made = _table_open.host(str(path), head, memory, out_dtype, chosen.bounds, copy.release)
            return cls(path, head, tier, made, memory, copy)
        if tier == "mmap":
            return cls(path, head, tier, _table_open.mapped(path, fd, head, out_dtype, chosen.bounds))
        if tier == "direct":
            made = _table_open.direct(path, fd, head, out_dtype, chosen.cache_rows, chosen.bounds)
            return cls(path, head, tier, made)
        copies = Copies(usable("cuda" if chosen.device is None else chosen.device))
        return cls(path, head, tier, _table_open.on_device(path, fd, head, tier, copies, out_dtype, chosen.bounds))

    def close(self, *, write: bool = True) -> None:
        """Write what :meth:`update` changed to the file, wait for what has begun, and let the rows go.

        The file is replaced as a whole, durably; where that fails, the table stays open. ``write=False`` gives the
        updates up. A second call does nothing.
        """
        with self._lock:
            if self._made is None or self._process != os.getpid():
                return
            if self._dirty and write and self._path is not None:
                self._head = _table_write.write_back(self._path, self._head, self._memory, self._copy)
            made, self._made, self._memory = self._made, None, None
            self._finish.detach()
            made.close()

    def __enter__(self) -> RowTable:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __reduce__(self):
        raise TypeError(f"{self._name}: a RowTable is not pickled; open it by its path in the other process")

    def _ready(self, op: str) -> Any:
        """The tier, where it can be called now."""
        made = self._made
        if made is None:
            raise StoreError(f"{op}: {self._name} is closed; open it again")
        if os.getpid() != self._process:
            raise StoreError(f"{op}: {self._name} was opened in another process, before a fork; open it in this one")
        if _capturing():
            raise StoreError(
                f"{op}: {self._name}: a CUDA graph is being captured, which would keep these rows for ever"
            )
        return made

    # --- what it is ---

    @property
    def _name(self) -> str:
        return "the table in RAM" if self._path is None else str(self._path)

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def tier(self) -> str:
        return self._tier

    @property
    def layout(self) -> Layout:
        """rows, width, dtype, scale, scale_dtype."""
        return self._head.layout

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the rows that a gather returns."""
        return self._ready("out_dtype").out_dtype

    def __len__(self) -> int:
        return self._head.layout.rows

    def __repr__(self) -> str:
        t = self._head.layout
        scale = f", scale {t.scale} in {dtype_name(t.scale_dtype)}" if t.scale else ""
        return f"RowTable({self._name!r}, [{t.rows}, {t.width}] {dtype_name(t.dtype)}{scale}, tier {self._tier})"

    # --- reading ---

    def gather(self, slots: Any, out: Tensor | None = None) -> Tensor:
        """The rows of slots, the same bits on every tier.

        Args:
            slots: int64 or int32 ``[...]`` in ``[-1, N)``; -1 gives zeros.
            out: ``[..., V]``, contiguous, to be filled; its dtype decides. None: a new tensor of ``out_dtype``.

        Returns:
            rows ``[..., V]`` on the device of ``slots``; tiers "pinned" and "device": on theirs.

        Raises:
            IndexError: a slot is out of range, and nothing was read. ValueError, TypeError: an argument does not fit.
            StoreError: the rows cannot be read, the table is closed, or a CUDA graph is being captured.
        """
        return self._ready("gather").gather(slots, out)

    def prefetch(self, slots: Any, out: Tensor | None = None) -> HostTicket | DeviceTicket:
        """Begin a gather and return at once. ``ticket.wait()`` returns the rows, or raises what kept them.

        A row that is named twice is read once, and one that another ticket is reading is awaited. A ticket that is
        dropped costs nothing more. The rows are those of some time between the two calls.

        Raises:
            StoreBusy: more tickets or bytes are outstanding than ``tickets`` and ``ticket_bytes`` of :meth:`open`; one
                ticket alone may hold more. Others as for :meth:`gather`.
        """
        return self._ready("prefetch").prefetch(slots, out)

    # --- writing ---

    def update(self, slots: Any, rows: Tensor) -> None:
        """Replace rows in memory, quantised as the table is; :meth:`close` writes them to the file.

        Every process that has the table open with tier "shared" sees them at once.

        Args:
            slots: integers ``[...]`` in ``[-1, N)``; of one that is named twice the last row stays, -1 names none.
            rows: ``[..., V]`` in the dtype of the table, in any float where it has 8 bits.

        Raises:
            StoreError: the tier is not "ram" or "shared". IndexError, ValueError, TypeError: as for :meth:`gather`;
                nothing was changed.
        """
        self._ready("update")
        with self._lock:
            self._ready("update")
            if self._memory is None:
                raise StoreError(
                    f"update: {self._name}: tier {self._tier!r} only reads; open it with tier='ram' or 'shared'"
                )
            if self._copy is None:
                self._dirty |= _table_write.put(self.layout, self._memory, slots, rows)
                return
            with self._copy.guard():
                self._dirty |= _table_write.put(self.layout, self._memory, slots, rows)

    # --- looking after it ---

    def verify(self) -> list[Fault]:
        """Read the file as a whole: what is not as it was written, block by block. Updates are not in it yet."""
        self._ready("verify")
        return [] if self._path is None else _table_file.verify(self._path)

    def stats(self) -> dict:
        """Counters since :meth:`reset_stats`, in rows, bytes and calls, and the bytes in memory now.

        ``rows`` that were asked for; of tier "direct", which looks at each row of a call once: ``hits`` in its cache,
        ``awaited`` of another call, ``misses``, and the ``reads`` that brought those.
        """
        now = self._ready("stats").counts()
        held = {name: now.pop(name) for name in ("outstanding", "outstanding_bytes")}
        resident, t = now.pop("resident"), self.layout
        bytes_now = {"mmap": 0, "direct": resident * t.row_bytes + t.sizes[1]}.get(self._tier, sum(t.sizes))
        return {k: now[k] - self._base.get(k, 0) for k in now} | held | {"resident_bytes": bytes_now}

    def reset_stats(self) -> None:
        self._base = self._ready("reset_stats").counts()
