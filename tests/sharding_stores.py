"""Checks of stores over ranks, called on every rank by tests/test_sharding_modules.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import refused
from support import close
from torch.distributed.device_mesh import DeviceMesh

from memkernels.integrations.distributed import ShardedStore
from memkernels.integrations.distributed._store import _dealt
from memkernels.store import MemoryStore, StoreError

M, K, V = 37, 8, 5


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(*s, generator=generator) for s in ((M, K), (M, V), (3, 4, K)))
    keys[20] = keys[3]  # equal scores on different ranks
    return keys, values, query


def same(many: ShardedStore, one: MemoryStore) -> None:
    """Searches, reads and rows are those of one store."""
    query = rows()[2]
    assert len(many) == len(one) and many.capacity == one.capacity
    for k in (7, 50):
        for a, b in zip(many.topk_search(query, k), one.topk_search(query, k)):
            assert torch.equal(a, b)
    where = ("i < ?", (10,))
    assert torch.equal(many.topk_search(query, 7, where=where)[1], one.topk_search(query, 7, where=where)[1])
    asked = [query.clone().requires_grad_() for _ in range(2)]
    for a, b in zip(*(s.softmax_read(q, return_lse=True) for s, q in zip((many, one), asked))):
        close(a.detach(), b.detach(), 1e-5)
    results = [s.topk_read(q, 5, return_slots=True, return_lse=True) for s, q in zip((many, one), asked)]
    for a, b in zip(*results):
        close(a.detach(), b.detach(), 1e-5)
    for result in results:
        result[0].square().sum().backward()
    close(asked[0].grad, asked[1].grad, 1e-5)
    slots = torch.tensor([[0, 5], [36, 7]])
    for a, b in zip(many.read(slots), one.read(slots)):
        assert torch.equal(a, b)


def stores(mesh: DeviceMesh) -> None:
    """One space of slot numbers: append, replace, delete, search and read as one store; then over 2 ranks."""
    rank, folder = mesh.get_rank(), Path(os.environ["TEST_FOLDER"])
    keys, values, _ = rows()
    one = MemoryStore.create(folder / f"one-{rank}", K, V)
    many = ShardedStore.create(folder / "many", mesh, K, V)
    refused(FileExistsError if rank == 0 else StoreError, lambda: ShardedStore.create(folder / "many", mesh, K, V), "")
    for store in (one, many):
        numbers = [
            store.append(keys[:30], values[:30], [{"i": i} for i in range(30)]),
            store.append(keys[30:], values[30:]),
        ]
        assert torch.equal(torch.cat(numbers), torch.arange(M))
    sizes: list = [None] * mesh.size()
    dist.all_gather_object(sizes, len(many.local))
    assert max(sizes) - min(sizes) <= 1, sizes
    same(many, one)
    for store in (one, many):
        assert store.delete(torch.tensor([4, 9, 10])) == 3
        store.write(torch.tensor([2, 7]), keys[:2] * 2, values[:2])
    same(many, one)
    before = len(many)
    bad = keys.clone()
    bad[M - 1] = torch.nan
    for call in (
        lambda: many.gather(torch.tensor([4])),
        lambda: many.delete(torch.tensor([0, 4])),
        lambda: many.gather(torch.tensor([M])),
        lambda: many.append(bad, values),
        lambda: many.append(keys[:3], values[:2]),
    ):
        refused(Exception, call, "")
    assert len(many) == before
    one.close()
    many.close()
    half = DeviceMesh("cpu", [0, 1], mesh_dim_names=("slots",))
    if rank < 2:
        refused(ValueError, lambda: ShardedStore(folder / "many", half), "mode='w'", "2 ranks", "4 ranks")
        again = MemoryStore.open(folder / f"one-{rank}", mode="w")
        with ShardedStore(folder / "many", half, mode="w") as dealt:
            same(dealt, again)
            assert torch.equal(dealt.append(keys[:3], values[:3]), again.append(keys[:3], values[:3]))
            same(dealt, again)
        again.close()
        assert len(list((folder / "many").iterdir())) == 3
    dist.barrier()
    assert _dealt([3, 1, 2], 5).tolist() == [1, 1, 2, 0, 1]
