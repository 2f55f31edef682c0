"""ShardedStore: one MemoryStore a rank, behind one space of slot numbers.

    slot = local * R + rank           of the slot ``local`` of the store of ``rank``, of R ranks

Every method is collective: all ranks call it with the same arguments, and all of them return, or raise, the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ... import _collectives, _over_ranks
from ...ops import merge_reads
from ...store import MemoryStore, StoreError
from ._reshard import FILE, folder, is_live, reshard
from ._tensors import flat_mesh

T = TypeVar("T")


class ShardedStore:
    """Slots over the stores of all ranks of a mesh, searched and read as one.

    An append deals its rows out so that the stores stay equally large. Searches merge the k best of every rank; reads
    are made where the slots lie and merged, so that queries, results and k numbers per token move, and no slot does.

    Args:
        store: the open :class:`~memkernels.store.MemoryStore` of this rank, or a directory that :meth:`create` made.
        mesh: of one dimension.
        mode, options: with a directory, as for ``MemoryStore.open``. With mode "w" a directory that was made by another
            number of ranks is dealt out anew first, by which slots keep their numbers; that needs a directory which all
            ranks share, and room for a second copy.

    Raises:
        TypeError: ``store`` is neither. ValueError: the mesh has several dimensions, or a directory of another number
            of ranks is opened to read. StoreError and its kinds: as ``MemoryStore.open``.
    """

    def __init__(self, store: MemoryStore | str | os.PathLike, mesh: DeviceMesh, *, mode: str = "r", **options: Any):
        mesh = flat_mesh("ShardedStore", mesh)
        self._on = _collectives.ranks("ShardedStore", mesh, 0)
        if not isinstance(store, (MemoryStore, str, os.PathLike)):
            raise TypeError(f"ShardedStore: store must be a MemoryStore or a path, got {type(store).__name__}")
        if isinstance(store, MemoryStore):
            self.local = store
        else:
            self.local = _open(Path(store), self._on, mode, options)

    @classmethod
    def create(
        cls, path: str | os.PathLike, mesh: DeviceMesh, key_dim: int, value_dim: int, **options: Any
    ) -> ShardedStore:
        """New, empty stores in the directory ``path``, one per rank, open for writing.

        path: a directory that is not there yet. options: as for ``MemoryStore.create``.

        Raises:
            FileExistsError: there is something at ``path``. ValueError, TypeError: as ``MemoryStore.create``.
        """
        on = _collectives.ranks("ShardedStore.create", flat_mesh("ShardedStore", mesh), 0)
        path = Path(path)

        def directory() -> None:
            if on.rank == 0:
                path.mkdir(parents=True)
                (path / FILE).write_text(json.dumps({"ranks": on.size}))

        together(on, directory)
        place = folder(path, on.size, on.rank)
        return cls(together(on, lambda: MemoryStore.create(place, key_dim, value_dim, **options)), mesh)

    def close(self) -> None:
        """Close the store of this rank."""
        self.local.close()

    def __enter__(self) -> ShardedStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ShardedStore(rank {self._on.rank} of {self._on.size}, {self.local!r})"

    # --- what it is ---

    def __len__(self) -> int:
        """Live slots of all ranks."""
        return sum(self._all(len(self.local)))

    @property
    def capacity(self) -> int:
        """Slot numbers are below this."""
        size = self._on.size
        return max(((n - 1) * size + rank + 1 if n else 0) for rank, n in enumerate(self._all(self.local.capacity)))

    # --- writing ---

    def append(self, keys: Tensor, values: Tensor, meta: list[dict] | None = None) -> Tensor:
        """New slots: keys ``[M, K]``, values ``[M, V]``, meta a dict per slot, the same on all ranks.

        Row by row goes to the store that has given out the fewest numbers. It is one commit on every rank or, where one
        of them refuses, on none. A rank that is killed while the others commit leaves theirs in place.

        Returns:
            their numbers, int64 ``[M]``, the same on every rank.

        Raises:
            ValueError, TypeError, StoreError: as ``MemoryStore.append``, on all ranks.
        """
        on = self._on
        rows = keys.shape[0] if isinstance(keys, Tensor) and keys.dim() else 0
        owners = _dealt(self._all(self.local.capacity), rows)
        own = owners == on.rank
        slots = torch.empty(rows, dtype=torch.int64)
        mine = None if meta is None else [doc for doc, is_own in zip(meta, own.tolist()) if is_own]
        with self._transaction():
            numbers = together(on, lambda: self._append_own(keys, values, meta, mine, own))
            for rank, local in enumerate(self._all(numbers.tolist())):
                slots[owners == rank] = torch.tensor(local, dtype=torch.int64) * on.size + rank
        return slots

    def _append_own(self, keys: Tensor, values: Tensor, meta: Any, mine: Any, own: Tensor) -> Tensor:
        if all(isinstance(x, Tensor) and x.dim() == 2 and len(x) == len(own) for x in (keys, values)):
            keys, values = (x[own.to(x.device)] for x in (keys, values))
        if meta is not None and len(meta) != len(own):
            mine = meta  # the store says what does not fit
        return self.local.append(keys, values, mine)

    def write(self, slots: Tensor, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Replace what is given of live slots, as ``MemoryStore.write``; one commit on every rank."""
        own, local = self._own("write", slots)
        rows = [None if x is None else x[own.to(x.device)] for x in (keys, values)]
        with self._transaction():
            together(self._on, lambda: self.local.write(local[own], *rows))

    def delete(self, slots: Tensor) -> int:
        """Delete slots by number; returns how many. KeyError on all ranks where one is not live."""
        own, local = self._own("delete", slots)
        with self._transaction():
            return sum(self._all(together(self._on, lambda: self.local.delete(local[own]))))

    @contextlib.contextmanager
    def _transaction(self):
        """A commit on every rank, or on none where one raises inside."""
        with contextlib.ExitStack() as stack:
            together(self._on, lambda: stack.enter_context(self.local.transaction()))
            yield

    # --- reading ---

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[..., K]`` and values ``[..., V]`` of slots of any shape ``[...]``."""
        own, local = self._own("read", slots)
        keys, values = together(self._on, lambda: self.local.read(local[own]))
        return self._spread(own, keys), self._spread(own, values)

    def gather(self, slots: Tensor) -> Tensor:
        """Values ``[..., V]`` of slots of any shape ``[...]``."""
        own, local = self._own("gather", slots)
        return self._spread(own, together(self._on, lambda: self.local.gather(local[own])))

    def topk_search(self, query: Tensor, k: int, *, scale: Any = None, where: Any = None) -> tuple[Tensor, Tensor]:
        """The k live slots of all ranks with the largest ``scale * <query_t, key_i>``, as ``MemoryStore.topk_search``.

        Equal scores go by smaller slot. Returns scores and slots ``[..., T, k]``, the same bits on every rank.
        """
        on = self._on
        asked = self._entered(query)
        scores, local = together(on, lambda: self.local.topk_search(asked, k, scale=scale, where=where))
        slots = torch.where(local < 0, local, local * on.size + on.rank)
        return _over_ranks.best(scores, slots, self._is_own, on, ordered=False)

    def topk_read(
        self, query: Tensor, k: int, *, scale: Any = None, where: Any = None, return_slots=False, return_lse=False
    ) -> Any:
        """Softmax over the k best slots of all ranks, the weighted sum of their values: as ``MemoryStore.topk_read``.

        Returns ``read [..., T, V]``, or a tuple of it and of what the flags add: slots and weights, then lse.
        """
        scores, slots = self.topk_search(query, k, scale=scale, where=where)
        exact = scores if scores.dtype == torch.float64 else scores.float()
        lse = exact.logsumexp(-1)
        weights = (exact - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp()
        read = self.sparse_read(slots, weights).to(query.dtype)
        asked = (read, *((slots, weights) if return_slots else ()), *((lse,) if return_lse else ()))
        return asked if len(asked) > 1 else read

    def softmax_read(self, query: Tensor, *, scale: Any = None, where: Any = None, return_lse: bool = False) -> Any:
        """Softmax over all live slots of all ranks, as ``MemoryStore.softmax_read``; reads merge by their lse."""
        asked = self._entered(query)
        read, lse = together(
            self._on, lambda: self.local.softmax_read(asked, scale=scale, where=where, return_lse=True)
        )
        read, lse = _over_ranks.merge(read, lse, merge_reads, self._on)
        return (read, lse) if return_lse else read

    def sparse_read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """``r_t = sum_j weights[t, j] * value[slots[t, j]]``, -1 ignored, pooled where the slots lie."""
        own, local = self._own("sparse_read", slots)
        entered = _over_ranks.enter(weights, self._on)
        read = together(self._on, lambda: self.local.sparse_read(torch.where(own, local, -1), entered))
        return _over_ranks.total(read, self._on)

    # --- over ranks ---

    def _all(self, thing: T) -> list[T]:
        return _collectives.all_objects(thing, self._on)

    def _entered(self, query: Tensor) -> Tensor:
        return _over_ranks.enter(query, self._on) if isinstance(query, Tensor) and query.requires_grad else query

    def _is_own(self, slots: Tensor) -> Tensor:
        return (slots >= 0) & (slots % self._on.size == self._on.rank)

    def _own(self, op: str, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots lie on this rank, and their numbers there."""
        if not isinstance(slots, Tensor) or slots.dtype not in (torch.int64, torch.int32):
            kind = slots.dtype if isinstance(slots, Tensor) else type(slots).__name__
            raise TypeError(f"ShardedStore.{op}: slots must be an int64 tensor, got {kind}")
        least = -1 if op == "sparse_read" else 0
        if slots.numel() and (slots.min() < least or slots.max() >= (end := self.capacity)):
            end = self.capacity if slots.min() < least else end
            raise IndexError(f"ShardedStore.{op}: slots must be in [{least}, {end}), got {slots.tolist()}")
        own, slots = self._is_own(slots), slots.long()
        local = torch.where(slots < 0, slots, slots // self._on.size)

        def check() -> None:
            dead = slots[own][~is_live(self.local, local[own])]
            if len(dead):
                raise KeyError(f"ShardedStore.{op}: slots must be live, got {dead[0].item()}, which is deleted")

        together(self._on, check)
        return own, local

    def _spread(self, own: Tensor, rows: Tensor) -> Tensor:
        """Rows of the own slots among those of all ranks, ``[..., D]``."""
        spread = rows.new_zeros((*own.shape, rows.shape[-1]))
        spread[own.to(rows.device)] = rows
        return _over_ranks.total(spread, self._on)


def together(on: _collectives.Ranks, do: Callable[[], T]) -> T:
    """``do()`` on every rank. Where it raises on one, it raises there and a StoreError on the others."""
    error: Exception | None = None
    result: Any = None
    try:
        result = do()
    except Exception as caught:
        error = caught
    sentences = _collectives.all_objects(None if error is None else f"{type(error).__name__}: {error}", on)
    if error is not None:
        raise error
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            raise StoreError(
                f"{on.op}: all ranks of group {on.dimension!r} must succeed, got on rank {rank} {sentence}"
            )
    return result


def _dealt(capacities: list[int], rows: int) -> Tensor:
    """The rank of each of ``rows`` rows: the one that has given out the fewest numbers, ties to the smaller rank."""
    counts = torch.tensor(capacities)
    if not rows:
        return counts[:0]
    lowest = int(counts.min())
    # Number l of rank r comes at l * R + r in the order in which stores fill; the stores take what they lack.
    room = torch.cat([torch.arange(c, lowest + rows + 1) * len(counts) + r for r, c in enumerate(capacities)])
    return room.sort().values[:rows] % len(counts)


def _open(path: Path, on: _collectives.Ranks, mode: str, options: dict) -> MemoryStore:
    def ranks() -> int:
        file = path / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{path}: there is no sharded store; ShardedStore.create makes one")
        return json.loads(file.read_text())["ranks"]

    before = together(on, ranks)
    if before != on.size:
        if mode != "w":
            raise ValueError(
                f"ShardedStore: {path} must be opened with mode='w' to be dealt out over {on.size} ranks, got "
                f"mode={mode!r} and stores of {before} ranks"
            )
        together(on, lambda: reshard(path, before, on.size, on.rank))

        def switch() -> None:
            if on.rank == 0:
                changed = path / f"{FILE}.new"
                changed.write_text(json.dumps({"ranks": on.size}))
                changed.replace(path / FILE)
                for rank in range(before):
                    shutil.rmtree(folder(path, before, rank))

        together(on, switch)
    return together(on, lambda: MemoryStore.open(folder(path, on.size, on.rank), mode=mode, **options))
