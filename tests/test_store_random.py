"""Long random histories of a store against a dictionary, with readers, snapshots, folds and reopening between them."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from store_support import PAGE, K, V, abandon, best, scores, two_pages

from memkernels.store import MemoryStore, _writer


class Model:
    """What a store should hold: slot -> (key, value, metadata)."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple] = {}

    def copy(self) -> Model:
        other = Model()
        other.slots = dict(self.slots)
        return other

    def check(self, store: MemoryStore, draw: random.Random) -> None:
        assert len(store) == len(self.slots)
        live = sorted(self.slots)
        if not live:
            return
        slots = torch.tensor(draw.sample(live, min(len(live), 40)))
        keys, values = store.read(slots)
        for i, slot in enumerate(slots.tolist()):
            assert torch.equal(keys[i], self.slots[slot][0]) and torch.equal(values[i], self.slots[slot][1]), slot
        assert store.meta(slots) == [self.slots[slot][2] for slot in slots.tolist()]
        for dead in range(store.capacity):
            if dead not in self.slots:
                with pytest.raises(KeyError):
                    store.gather([dead])
                break
        table, query = torch.stack([self.slots[slot][0] for slot in live]), torch.randn(2, K)
        got = store.topk_search(query, 5)
        assert torch.equal(got[1], best(scores(query, table), torch.tensor(live), 5)[1])
        wanted = sorted(slot for slot in live if self.slots[slot][2].get("n", -1) >= 3)
        found = store.topk_search(query[:1], len(live), where=("n >= ?", [3]))[1][0]
        assert sorted(found[found >= 0].tolist()) == wanted


def step(store: MemoryStore, model: Model, draw: random.Random) -> None:
    """One change of both."""

    def rows(count: int) -> tuple:
        return torch.randn(count, K), torch.randn(count, V), [{"n": draw.randrange(6)} for _ in range(count)]

    live = sorted(model.slots)
    action = draw.random()
    if action < 0.35 or not live:
        keys, values, meta = rows(draw.choice([1, 2, 30]))
        slots = store.append(keys, values, meta).tolist()
        assert not set(slots) & set(live)
        model.slots |= {s: (k, v, m) for s, k, v, m in zip(slots, keys, values, meta)}
    elif action < 0.75:
        slots = draw.sample(live, min(len(live), draw.choice([1, 3, 60])))
        keys, values, meta = rows(len(slots))
        parts = draw.choice([("k",), ("v",), ("m",), ("k", "v", "m")])
        store.write(
            slots,
            keys if "k" in parts else None,
            values if "v" in parts else None,
            meta if "m" in parts else None,
        )
        for slot, k, v, m in zip(slots, keys, values, meta):
            old = model.slots[slot]
            new = (k if "k" in parts else old[0], v if "v" in parts else old[1], m if "m" in parts else old[2])
            model.slots[slot] = new
    elif action < 0.9:
        slots = draw.sample(live, min(len(live), draw.choice([1, 10])))
        store.delete(slots)
        for slot in slots:
            del model.slots[slot]
    else:
        number = draw.randrange(6)
        doomed = [slot for slot in live if model.slots[slot][2].get("n") == number][:1000]
        assert store.delete(where=("n = ?", [number])) == len(doomed)
        for slot in doomed:
            del model.slots[slot]


@pytest.mark.parametrize("seed", range(8))
def test_random_histories(memory_path, monkeypatch, seed):
    monkeypatch.setattr(_writer, "SMALL", 1200)
    monkeypatch.setattr(_writer, "FOLD_COMMITS", 10**9)  # folds come from the draw, so that a seed is a history
    torch.manual_seed(seed)
    draw, model, path = random.Random(seed), Model(), memory_path / "s"
    budget = {"ram_bytes": two_pages() * 2} if seed % 2 else {}
    store = MemoryStore.create(path, K, V, page_slots=PAGE)
    reader, snapshots = MemoryStore.open(path, **budget), {}
    for turn in range(120):
        action = draw.random()
        if action < 0.7:
            step(store, model, draw)
        elif action < 0.8:
            before = model.copy()
            if draw.random() < 0.5:
                with store.transaction():
                    for _ in range(3):
                        step(store, model, draw)
                    model.check(store, draw)
            else:
                with pytest.raises(ZeroDivisionError), store.transaction():
                    for _ in range(3):
                        step(store, model, draw)
                    raise ZeroDivisionError
                model = before
        elif action < 0.85:
            store._engine.fold(draw.choice([1, 4]))
        elif action < 0.88:
            store.compact()
        elif action < 0.91 and len(snapshots) < 3:
            snapshots[store.snapshot(str(turn))] = model.copy()
        elif action < 0.93 and snapshots:
            name = draw.choice(sorted(snapshots))
            store.drop_snapshot(name)
            del snapshots[name]
        elif action < 0.96:
            store.close() if draw.random() < 0.5 else abandon(store)
            store = MemoryStore.open(path, mode="w", **budget)
        elif action < 0.98:
            reader.close()
            reader = MemoryStore.open(path, **budget)
        if turn % 4 == 0:
            model.check(reader, draw)
        if turn % 6 == 0:
            model.check(store, draw)
    for name, old in snapshots.items():
        with MemoryStore.open(path, snapshot=name) as one:
            old.check(one, draw)
    assert store.verify() == [] and reader.generation == store.generation
    shutil.copytree(path, memory_path / "killed")  # what a process that ends here leaves behind
    with MemoryStore.open(memory_path / "killed") as one:
        model.check(one, draw)
    for column, file in store._engine.files.items():
        named = store._engine.tables[column]["extent"].astype(int)
        named = {e for e in named.tolist() if e != 0xFFFFFFFF} | set(file.pinned.tolist())
        rest = [*file.free, *(e for _, extents in file.waiting for e in extents.tolist())]
        assert sorted([*rest, *named]) == list(range(file.end)), column
    reader.close()
    store.close()
