"""MemoryStore: what a caller sees. Checks, the order of calls, and one method per thing that a store does."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _arguments, _database, _index, _io, _layout, _rows, _search, _sparse, _verify, _where
from ._calls import reading, writing
from ._columns import Column, dtype_name
from ._database import COLUMNS, translated
from ._engine import Engine
from ._errors import StoreError
from ._log import ALIVE, DEAD, KEYS, VALUES, Change
from ._maintenance import Maintenance
from ._writer import Writer


class MemoryStore(Maintenance):
    """N slots on disk, each a key ``[K]``, a value ``[V]`` and JSON metadata, read by the library's operations.

    Made by :meth:`create`, opened by :meth:`open`. A slot number names one record for ever. Calls of one object run one
    at a time, whatever thread they come from. Every error is one sentence; see :class:`StoreError` and its kinds.
    """

    def __init__(self, engine: Engine):
        self._engine: Any = engine
        self._base: dict = {}
        self.reset_stats()

    # --- opening and closing ---

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        key_dim: int,
        value_dim: int,
        *,
        key_dtype: torch.dtype = torch.float32,
        value_dtype: torch.dtype = torch.float32,
        page_slots: int = 1024,
    ) -> MemoryStore:
        """A new, empty store, open for writing.

        Args:
            path: a directory that is not there yet, on a local file system.
            key_dim, value_dim: numbers per key and per value, K and V.
            key_dtype, value_dtype: float32, float64, bfloat16, float16, or, with a scale per row, int8 and
                float8_e4m3fn.
            page_slots: slots per page, the unit of reading, caching and checking.

        Raises:
            FileExistsError: there is something at ``path``. ValueError, TypeError: a size or dtype does not fit.
            StoreFormat: a network file system. StoreFull: no room.
        """
        path = _layout.absolute("create", path)
        with _io.new_directory(path) as making:
            _layout.lay_out(making, key_dim, value_dim, key_dtype, value_dtype, page_slots)
        return cls.open(path, mode="w")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        mode: str = "r",
        ram_bytes: int | None = None,
        device: torch.device | str | None = None,
        device_bytes: int = 0,
        snapshot: str | None = None,
        durability: str = "commit",
    ) -> MemoryStore:
        """Open a store to read ("r": any number of processes) or to write ("w": one).

        Args:
            path: the directory that :meth:`create` made.
            mode: "r" or "w".
            ram_bytes: most bytes of pages in memory; at least two pages of each column. None: a quarter of the memory.
            device, device_bytes: a device that keeps pages too, and how many bytes of them. Calls on tensors of that
                device run there.
            snapshot: open what :meth:`snapshot` kept under that name, to read.
            durability: "commit": what is acknowledged is durable. "batch": a power cut may take back the last commits,
                whole ones, in order; a killed process still loses none.

        Raises:
            FileNotFoundError: there is no store. StoreBusy: another process writes. StoreDamaged: bytes are not those
                that were written. StoreFormat: a newer format, or a network file system. ValueError: an option does not
                fit.
        """
        path = _layout.absolute("open", path)
        if mode not in ("r", "w"):
            raise ValueError(f"open: mode must be 'r' or 'w', got {mode!r}")
        if durability not in ("commit", "batch"):
            raise ValueError(f"open: durability must be 'commit' or 'batch', got {durability!r}")
        if snapshot is not None and mode == "w":
            raise ValueError("open: a snapshot must be opened with mode='r', got mode='w'")
        if not (path / _database.FILE).is_file():
            raise FileNotFoundError(f"{path}: there is no store; MemoryStore.create makes one")
        _io.refuse_network(path)
        try:
            engine = (Writer if mode == "w" else Engine)(path, mode, ram_bytes, snapshot, durability)
        except OSError as error:
            raise StoreError(f"{path}: the system refused to open it ({error})") from error
        store = cls(engine)
        try:
            engine.place(device, device_bytes)
        except BaseException:
            engine.release()
            raise
        return store

    def close(self) -> None:
        """Bring pages up to date and close. A second call does nothing."""
        engine = self._engine
        with engine.lock:
            if engine.closed:
                return
            if engine.process != os.getpid():
                return  # files and locks are those of the process that opened it, before a fork
            try:
                if isinstance(engine, Writer):
                    if engine.staged is not None:
                        raise StoreError("close: a transaction is open; end its block first")
                    engine.close_files()
            finally:
                if not isinstance(engine, Writer) or engine.staged is None:
                    engine.closed = True
                    engine.release()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __reduce__(self):
        raise TypeError(f"{self._engine.path}: a MemoryStore is not pickled; open it by its path in the other process")

    def _ready(self, op: str, write: bool = False) -> None:
        engine = self._engine
        if engine.closed:
            raise StoreError(f"{op}: {engine.path} is closed; open it again")
        engine.check_process()
        if write and engine.mode != "w":
            raise StoreError(f"{op}: {engine.path} is open with mode='r'; open it with mode='w'")

    # --- what it is ---

    @reading
    def __len__(self) -> int:
        return self._engine.maps["live"].count

    @property
    def generation(self) -> int:
        """How many commits there were."""
        return self._seen("generation")

    @property
    def capacity(self) -> int:
        """Slot numbers are below this."""
        return self._seen("capacity")

    @reading
    def _seen(self, name: str) -> int:
        return getattr(self._engine, name)

    @property
    def path(self) -> Path:
        return self._engine.path

    @property
    def columns(self) -> dict[str, Column]:
        """``keys`` and ``values``: widths, dtypes, bytes of a page."""
        return dict(self._engine.columns)

    def __repr__(self) -> str:
        parts = [f"{c.name} {c.dim} {dtype_name(c.dtype)}" for c in self._engine.columns.values()]
        return f"MemoryStore({str(self._engine.path)!r}, {', '.join(parts)})"

    # --- writing ---

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything that is written in the block becomes one durable commit, or, where it raises, none of it does."""
        engine = self._engine
        with engine.lock:
            self._ready("transaction", write=True)
            if engine.staged is not None:
                raise StoreError("transaction: one is open; they do not nest")
            engine.begin()
            try:
                yield
            except BaseException:
                engine.abort()
                raise
            if engine.doomed:
                engine.abort()
                raise StoreError("transaction: a call in it failed, so nothing of it was written; do all of it again")
            engine.commit()

    @writing
    def append(self, keys: Tensor, values: Tensor, meta: list[dict] | None = None) -> Tensor:
        """New slots: keys ``[M, K]``, values ``[M, V]``, meta a dict per slot. Returns their numbers, int64 ``[M]``."""
        engine = self._engine
        if not isinstance(keys, Tensor) or keys.dim() != 2:
            got = f"{list(keys.shape)}" if isinstance(keys, Tensor) else type(keys).__name__
            kind = ValueError if isinstance(keys, Tensor) else TypeError
            raise kind(f"append: keys must be a tensor [M, K={engine.columns['keys'].dim}], got {got}")
        count = len(keys)
        rows = {"keys": _arguments.rows("append", engine.columns["keys"], keys, count)}
        rows["values"] = _arguments.rows("append", engine.columns["values"], values, count)
        docs = None if meta is None else _arguments.documents("append", meta, count)
        slots = engine.numbers(count)
        if count:
            engine.stage(Change(ALIVE | KEYS | VALUES, slots, rows))
            if docs:
                engine.put_meta(slots, docs)
        return torch.from_numpy(slots.copy())

    @writing
    def write(self, slots, keys: Tensor | None = None, values: Tensor | None = None, meta=None) -> None:
        """Replace what is given of live slots, as one commit; what is None stays as it is.

        Args:
            slots: integers ``[M]``; of a slot that is named twice, the last row stays.
            keys, values: rows ``[M, K]`` and ``[M, V]``. meta: a dict per slot, which replaces the old one.

        Raises:
            IndexError: a number out of range. KeyError: a deleted slot. ValueError, TypeError: a shape, dtype or NaN in
                keys. StoreFull: no room, and nothing was written.
        """
        engine = self._engine
        at, _ = _arguments.numbers("write", slots)
        _arguments.live("write", engine, at)
        given = [(n, x) for n, x in zip(COLUMNS, (keys, values)) if x is not None]
        rows = {n: _arguments.rows("write", engine.columns[n], x, len(at)) for n, x in given}
        docs = None if meta is None else _arguments.documents("write", meta, len(at))
        if len(at) == 0:
            return
        if rows:
            flags = (KEYS if "keys" in rows else 0) | (VALUES if "values" in rows else 0)
            engine.stage(Change(flags, at.copy(), rows))
        if docs:
            engine.put_meta(at, docs)

    @writing
    def delete(self, slots=None, *, where=None) -> int:
        """Delete slots by number, or all that satisfy a condition. Returns how many."""
        engine = self._engine
        if (slots is None) == (where is None):
            raise ValueError("delete: give slots or where, one of the two")
        if where is not None:
            packed = _where.matching(engine, "delete", where)
            at = np.flatnonzero(np.unpackbits(packed, bitorder="little")).astype(np.int64)
        else:
            at, _ = _arguments.numbers("delete", slots)
            at = at.copy()
            _arguments.live("delete", engine, at)
            if len(np.unique(at)) != len(at):
                raise KeyError("delete: a slot is named twice")
        if len(at):
            engine.stage(Change(DEAD, at, {}))
            engine.drop_meta(at)
        return len(at)

    # --- reading by number ---

    @reading
    def read(self, slots) -> tuple[Tensor, Tensor]:
        """Keys ``[..., K]`` and values ``[..., V]`` of slots of any shape ``[...]``."""
        return self._rows("read", "keys", slots), self._rows("read", "values", slots)

    @reading
    def gather(self, slots) -> Tensor:
        """Values ``[..., V]`` of slots of any shape ``[...]``."""
        return self._rows("gather", "values", slots)

    def _rows(self, op: str, name: str, slots) -> Tensor:
        engine = self._engine
        home = engine.home(slots) if isinstance(slots, Tensor) else engine.default
        if isinstance(slots, Tensor) and slots.device == home:
            tier = engine.tier(name, home)
            if (places := _rows.places(engine, tier, slots)) is not None:
                with tier.reading() as memory:
                    return _rows.at_places(memory, places.to(home))
        at, shape = _arguments.numbers(op, slots)
        _arguments.live(op, engine, at)
        rows = _rows.gather(engine, name, at, home).view(*shape, engine.columns[name].dim)
        return rows.to(slots.device) if isinstance(slots, Tensor) else rows

    @reading
    def meta(self, slots) -> list[dict]:
        """Metadata of slots; {} where there is none."""
        engine = self._engine
        at, _ = _arguments.numbers("meta", slots)
        _arguments.live("meta", engine, at)
        with translated():
            return [json.loads(_verify.document(engine, slot) or "{}") for slot in at.tolist()]

    # --- searches and reads ---

    @reading
    def topk_search(self, query: Tensor, k: int, *, scale=None, where=None, index=None) -> tuple[Tensor, Tensor]:
        """The k live slots with the largest ``scale * <query_t, key_i>``: scores and slots ``[..., T, k]``, best first.

        Equal scores go by smaller slot; slot -1 and score -inf where fewer than k are live.

        Args:
            query: ``[..., T, K]`` in the dtype of the keys, any float beside 8 bits. k: at least 1.
            scale: a number or a tensor that broadcasts to ``[..., T]``; default ``K ** -0.5``.
            where: ``(condition, values)``, a condition of SQL over metadata: only slots that satisfy it.
            index: "approximate" takes candidates from :meth:`build_index` and scores them exactly; None: exact.

        Returns:
            ``(scores [..., T, k] in the dtype of query, slots [..., T, k] int64)``. Scores are differentiable in query
            and in a scale that is a tensor.

        Raises:
            ValueError, TypeError: an argument does not fit. StoreDamaged: a page is not what was written.
        """
        scores, slots = self._topk("topk_search", query, k, scale, where, index)
        lead = (*query.shape[:-1], scores.shape[-1])
        return scores.to(query.dtype).view(lead).to(query.device), slots.view(lead).to(query.device)

    @reading
    def topk_read(
        self, query: Tensor, k: int, *, scale=None, where=None, index=None, return_slots=False, return_lse=False
    ) -> Any:
        """Softmax over the k best slots and the weighted sum of their values.

        ``r_t = sum_j softmax_j(scores[t, j]) * value[slots[t, j]]`` with scores and slots of :meth:`topk_search`.

        Args:
            query, k, scale, where, index: as in :meth:`topk_search`.
            return_slots: also slots ``[..., T, k]`` and weights ``[..., T, k]``.
            return_lse: also lse ``[..., T]``, the log-sum-exp of the k scores.

        Returns:
            ``read [..., T, V]`` in the dtype of query, or a tuple of it and of what the flags add. Differentiable in
            query and in a scale that is a tensor; never in what lies on the disk.

        Raises:
            ValueError, TypeError: an argument does not fit. StoreDamaged: a page is not what was written.
        """
        scores, slots = self._topk("topk_read", query, k, scale, where, index)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp()
        read = _sparse.read_in_place(self._engine, slots, weights)
        read = (_sparse.read(self._engine, slots, weights) if read is None else read).to(query.dtype)
        lead, home = query.shape[:-1], query.device
        results = [read.view(*lead, -1).to(home)]
        if return_slots:
            results += [slots.view(*lead, -1).to(home), weights.view(*lead, -1).to(home)]
        if return_lse:
            results.append(lse.view(lead).to(home))
        return results[0] if len(results) == 1 else tuple(results)

    @reading
    def softmax_read(self, query: Tensor, *, scale=None, where=None, return_lse=False) -> Any:
        """Softmax over all live slots and the weighted sum of their values.

        ``r_t = sum_i softmax_i(scale * <query_t, key_i>) * value_i``, over the pages in runs that merge by their lse.

        Args:
            query, scale, where: as in :meth:`topk_search`. return_lse: also lse ``[..., T]``.

        Returns:
            ``read [..., T, V]`` in the dtype of query, zeros where no slot is live, or ``(read, lse)``. Differentiable
            in query and in a scale that is a tensor; the backward goes over the pages again.

        Raises:
            ValueError, TypeError: an argument does not fit. StoreDamaged: a page is not what was written. RuntimeError,
                in a backward: the store changed or was closed since the read.
        """
        engine = self._engine
        taken = _arguments.query("softmax_read", engine, query)
        factor = _arguments.scaling("softmax_read", scale, taken)
        flat = taken.reshape(-1, query.shape[-1])
        read, lse = _search.softmax(engine, flat, factor, self._candidates("softmax_read", where))
        read = read.view(*query.shape[:-1], -1).to(query.device, query.dtype)
        return (read, lse.view(query.shape[:-1]).to(query.device)) if return_lse else read

    @reading
    def sparse_read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """``r_t = sum_j weights[t, j] * value[slots[t, j]]``, -1 ignored. ``[..., T, k]`` each -> ``[..., T, V]``."""
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError("sparse_read: weights must be a float tensor like slots")
        if isinstance(slots, Tensor) and slots.dim() >= 2 and slots.shape == weights.shape:
            read = _sparse.read_in_place(self._engine, slots, weights)
            if read is not None:
                return read
        at, shape = _arguments.numbers("sparse_read", slots)
        if weights.shape != shape or len(shape) < 2:
            raise ValueError(
                f"sparse_read: weights and slots must be [..., T, k], got {list(weights.shape)}, {list(shape)}"
            )
        _arguments.live("sparse_read", self._engine, at[at != -1])
        flat = torch.from_numpy(at).view(-1, shape[-1])
        read = _sparse.read(self._engine, flat, weights.to(self._engine.home(weights)).reshape(-1, shape[-1]))
        return read.to(weights.dtype).view(*shape[:-1], -1).to(weights.device)

    def _candidates(self, op: str, where) -> np.ndarray:
        return self._engine.maps["live"].bytes if where is None else _where.matching(self._engine, op, where)

    def _topk(self, op: str, query: Tensor, k: int, scale, where, index) -> tuple[Tensor, Tensor]:
        engine = self._engine
        taken = _arguments.query(op, engine, query)
        k, factor = _arguments.neighbours(op, k), _arguments.scaling(op, scale, taken)
        if index not in (None, "approximate"):
            raise ValueError(f"{op}: index must be None or 'approximate', got {index!r}")
        flat = taken.reshape(-1, query.shape[-1])
        packed = self._candidates(op, where)
        with torch.no_grad():
            if index is None:
                scores, slots = _search.topk(engine, flat, k, factor, packed)
            else:
                scores, slots = _index.search(engine, op, flat, k, factor, packed)
        if torch.is_grad_enabled() and (flat.requires_grad or isinstance(factor, Tensor) and factor.requires_grad):
            some = slots >= 0
            rows = flat.new_zeros(*slots.shape, flat.shape[-1], dtype=engine.columns["keys"].read_dtype)
            rows[some] = _rows.gather(engine, "keys", slots[some].cpu().numpy(), flat.device)
            scores = _search.rescored(flat, rows, factor).masked_fill(~some, -torch.inf)
        return scores, slots

    @reading
    def prefetch(self, slots) -> None:
        """Bring the pages of slots into memory and on to the device, as many as there is room for."""
        at, _ = _arguments.numbers("prefetch", slots)
        _arguments.live("prefetch", self._engine, at)
        pages = np.unique(at // self._engine.page_slots)
        for tiers in (self._engine.tiers, self._engine.device_tiers):
            for tier in tiers.values():
                missing = pages[tier.frame_of[pages] < 0][: tier.frames]
                if len(missing):
                    _rows.bring(self._engine, tier, missing)
