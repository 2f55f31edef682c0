"""The rest of MemoryStore: snapshots, copies, checks, compaction, export, the approximate index, counters."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _compact, _export, _index, _layout, _snapshots, _verify
from ._calls import reading
from ._errors import StoreError

if TYPE_CHECKING:
    from ._store import MemoryStore


class Maintenance:
    _engine: Any  # an Engine, a Writer where the store is open for writing
    _base: dict
    _ready: Callable[..., None]
    open: Callable[..., MemoryStore]

    def _outside(self, op: str, write: bool = False):
        """The engine, ready, with no transaction open."""
        self._ready(op, write)
        if self._engine.staged is not None:
            raise StoreError(f"{op}: a transaction is open; end its block first")
        return self._engine

    def snapshot(self, name: str) -> str:
        """Keep the present under a name, until :meth:`drop_snapshot`; ``open(path, snapshot=name)`` reads it."""
        if not isinstance(name, str):
            raise TypeError(f"snapshot: name must be a text, got {type(name).__name__}")
        if not 0 < len(name) <= 200:
            raise ValueError(f"snapshot: name must have 1 to 200 characters, got {len(name)}")
        with self._engine.lock:
            _snapshots.create(self._outside("snapshot", write=True), name)
        return name

    @reading
    def snapshots(self) -> list[str]:
        """Their names, oldest first."""
        return _snapshots.names(self._engine)

    def drop_snapshot(self, name: str) -> None:
        """Forget a snapshot; its space is used again when no reader of it is left. KeyError where there is none."""
        with self._engine.lock:
            _snapshots.drop(self._outside("drop_snapshot", write=True), name)

    def backup(self, path: str | os.PathLike) -> None:
        """Copy the store, checked page by page, to a path where nothing is."""
        with self._engine.lock:
            _snapshots.backup(self._outside("backup"), _layout.absolute("backup", path))

    def verify(self) -> list[_verify.Fault]:
        """Read everything on disk and compare it with its checksums; returns what is wrong, [] where nothing is."""
        with self._engine.lock:
            return _verify.verify(self._outside("verify"))

    def compact(self) -> int:
        """Give back the space of deleted slots and old pages, and their numbers; returns the bytes that files lost."""
        with self._engine.lock:
            return _compact.compact(self._outside("compact", write=True))

    @reading
    def export(self, file: str | os.PathLike) -> None:
        """Write keys, values, numbers and metadata of the live slots to a file of the safetensors format."""
        _export.export(self._outside("export"), _layout.absolute("export", file))

    @classmethod
    def load(cls, path: str | os.PathLike, file: str | os.PathLike) -> MemoryStore:
        """A new store at ``path`` from an export, open for writing; slots keep their numbers."""
        path = _layout.absolute("load", path)
        _export.load(path, _layout.absolute("load", file))
        return cls.open(path, mode="w")

    def build_index(self, description: str) -> dict:
        """Build an index of faiss, e.g. "IVF1024,PQ16", for ``index="approximate"``.

        Returns what it is, with its recall; warns where that is low. The index is built again once more than a fifth
        of the slots changed.
        """
        if not isinstance(description, str):
            raise TypeError(f"build_index: description must be a text, got {type(description).__name__}")
        with self._engine.lock:
            return _index.build(self._outside("build_index", write=True), description)

    def drop_index(self) -> None:
        """Forget the index."""
        with self._engine.lock:
            _index.drop(self._outside("drop_index", write=True))

    # --- counters ---

    def stats(self) -> dict:
        """Counters since :meth:`reset_stats`, in slots, bytes and calls, and the bytes in memory now."""
        now = self._counters()
        counted = {k: now[k] - self._base.get(k, 0) for k in now}
        engine = self._engine
        tiers = {"ram": engine.tiers, **({"device": engine.device_tiers} if engine.device_tiers else {})}
        result = {name: counted[name] for name in ("reads", "commits", "bytes_read", "bytes_written")}
        for tier, columns in tiers.items():
            result[tier] = {
                "hits": sum(counted[tier, name, "hits"] for name in columns),
                "misses": sum(counted[tier, name, "misses"] for name in columns),
                "bytes_copied": sum(counted[tier, name, "bytes_copied"] for name in columns),
                "resident_bytes": sum(t.resident * t.page_bytes for t in columns.values()),
                "budget_bytes": sum(t.frames * t.page_bytes for t in columns.values()),
            }
        result["hits"] = sum(result[tier]["hits"] for tier in tiers)
        result["misses"] = result["ram"]["misses"]
        result["resident_bytes"] = sum(result[tier]["resident_bytes"] for tier in tiers)
        return result

    def reset_stats(self) -> None:
        self._base = self._counters()

    def _counters(self) -> dict:
        engine = self._engine
        found: dict = {"reads": engine.reads, "commits": engine.commits}
        found["bytes_read"] = sum(f.bytes_read for f in engine.files.values())
        found["bytes_written"] = sum(f.bytes_written for f in engine.files.values()) + engine.log_written
        for tier, columns in (("ram", engine.tiers), ("device", engine.device_tiers)):
            for name, t in columns.items():
                for what in ("hits", "misses", "bytes_copied"):
                    found[tier, name, what] = getattr(t, what)
        return found
