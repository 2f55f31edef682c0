"""What the tests of memkernels.store share: small stores, the same data in memory, and formulas written out."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.store import MemoryStore

K, V, PAGE = 8, 4, 16


def rows(count: int, seed: int = 0, dtype=torch.float32, k: int = K, v: int = V) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, dim, generator=generator).to(dtype) for dim in (k, v))


def new(path, count: int = 0, seed: int = 0, page_slots: int = PAGE, **options) -> MemoryStore:
    """A store with ``count`` slots of :func:`rows`, open for writing."""
    store = MemoryStore.create(path, K, V, page_slots=page_slots, **options)
    if count:
        store.append(*rows(count, seed))
    return store


def two_pages(page_slots: int = PAGE, bytes_of_slot: int = 4 * (K + V)) -> int:
    """The least ``ram_bytes``."""
    return 2 * page_slots * bytes_of_slot


def abandon(store: MemoryStore) -> None:
    """Leave a store as an object that nobody closes: nothing is folded, and its files and locks go."""
    if not store._engine.closed:
        store._engine.closed = True
        store._engine.release()


def scores(query: Tensor, keys: Tensor, scale=None) -> Tensor:
    return (query.double() @ keys.double().mT) * (keys.shape[-1] ** -0.5 if scale is None else scale)


def best(s: Tensor, slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``s [..., N]`` and whose they are, equal ones by smaller slot; -1 where there are fewer."""
    order = s.sort(dim=-1, descending=True, stable=True)
    chosen = torch.nn.functional.pad(order.values, (0, k), value=-torch.inf)[..., :k]
    numbers = torch.nn.functional.pad(slots[order.indices], (0, k), value=-1)[..., :k]
    return chosen, numbers
