"""BoundedStore: use is counted as its equation says, and what is used least is evicted."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from store_support import K, V, abandon, best, new, rows, scores

from memkernels.store import BoundedStore, MemoryStore, StoreDamaged, StoreError
from memkernels.store._crc import crc32c


class Law:
    """The equation in plain Python, a dict of numbers."""

    def __init__(self, max_slots: int, decay: float):
        self.max_slots, self.decay, self.use = max_slots, decay, {}

    def append(self, slots: list[int]) -> None:
        while len(self.use) + len(slots) > self.max_slots:
            del self.use[min(self.use, key=lambda slot: (self.use[slot], slot))]
        self.use |= dict.fromkeys(slots, 1.0)

    def read(self, slots: list[list[int]], weights: list[list[float]]) -> None:
        for slot in self.use:
            self.use[slot] *= self.decay ** len(slots)
        for named, shares in zip(slots, weights):
            for slot, share in zip(named, shares):
                if slot >= 0:
                    self.use[slot] += share


def used(bounded: BoundedStore) -> dict[int, float]:
    """Use by live slot."""
    live = bounded.least_used(bounded.max_slots + 100)
    assert len(live) == len(bounded.store)
    return dict(zip(live.tolist(), bounded.use(live).tolist()))


def agree(bounded: BoundedStore, law: Law, tolerance: float = 1e-5) -> None:
    found = used(bounded)
    assert set(found) == set(law.use)
    assert found == pytest.approx(law.use, rel=tolerance, abs=0)


@pytest.mark.parametrize("decay", (1.0, 0.9, 1e-9))
def test_a_random_run_evicts_what_the_law_evicts(tmp_path, decay):
    choose, law = random.Random(0), Law(20, decay)
    keys = torch.zeros(0, K)
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 20, decay=decay)
        for step in range(80):
            fresh = rows(choose.randint(1, 4), seed=step)
            slots = bounded.append(*fresh)
            law.append(slots.tolist())
            keys = torch.cat([keys, fresh[0]])
            live = torch.tensor(sorted(law.use))
            query = 2 * torch.randn(choose.randint(1, 3), K, generator=torch.Generator().manual_seed(step))
            s, named = best(scores(query, keys[live]), live, 3)
            read, *rest = bounded.topk_read(query.unsqueeze(0), 3, return_slots=True, return_lse=True)
            assert read.shape == (1, len(query), V) and [len(x[0]) for x in rest] == 3 * [len(query)]
            law.read(named.tolist(), s.softmax(-1).tolist())
            agree(bounded, law)
        assert store.capacity > 100 and len(store) == 20 and store.verify() == []


def test_equal_use_goes_by_smaller_slot(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 6, decay=0.5)
        bounded.append(*rows(6))
        bounded.sparse_read(torch.tensor([[1, 0, 4]]), torch.tensor([[1.0, 0.5, 0.5]]))
        assert used(bounded) == {0: 1.0, 1: 1.5, 2: 0.5, 3: 0.5, 4: 1.0, 5: 0.5}
        assert bounded.least_used(5).tolist() == [2, 3, 5, 0, 4]
        assert bounded.append(*rows(2)).tolist() == [6, 7]
        assert used(bounded) == {0: 1.0, 1: 1.5, 4: 1.0, 5: 0.5, 6: 1.0, 7: 1.0}
        bounded.append(*rows(2))
        assert set(used(bounded)) == {1, 4, 6, 7, 8, 9}
    with new(tmp_path / "t") as store:  # nothing was read: the oldest go, also among many
        bounded = BoundedStore(store, 1000)
        bounded.append(*rows(1000))
        assert bounded.least_used(300).tolist() == list(range(300))


def test_an_append_evicts_none_of_its_own_rows(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 4)
        first = bounded.append(*rows(4))
        bounded.sparse_read(first.unsqueeze(0), torch.full((1, 4), 9.0))  # the old ones are used more than new ones
        assert set(used(bounded)) == set(range(4))
        second = bounded.append(*rows(3, seed=1))
        assert set(used(bounded)) == {3, *second.tolist()}
        third = bounded.append(*rows(4, seed=2))
        assert set(used(bounded)) == set(third.tolist())
        assert torch.equal(store.gather(third), rows(4, seed=2)[1])
        with pytest.raises(ValueError, match="append: keys must have at most max_slots=4 rows, got 5"):
            bounded.append(*rows(5))
        assert set(used(bounded)) == set(third.tolist()) and store.generation == 3


def test_an_append_and_what_it_evicts_are_one_commit(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 4)
        bounded.append(*rows(4), [{"i": i} for i in range(4)])
        with MemoryStore.open(tmp_path / "s") as watcher:
            assert bounded.append(*rows(2), [{"i": 4}, {"i": 5}]).tolist() == [4, 5]
            assert store.generation == watcher.generation == 2 and len(watcher) == 4
            assert watcher.meta([2, 3, 4, 5]) == [{"i": i} for i in (2, 3, 4, 5)]
        with pytest.raises(ValueError):
            bounded.append(torch.zeros(2, K), torch.zeros(2, V + 1))
        assert len(store) == 4 and store.generation == 2 and store.gather([2, 3]).shape == (2, V)


def test_a_transaction_that_is_undone_gives_slots_back_with_their_use(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 4, decay=0.5)
        bounded.append(*rows(4))
        bounded.sparse_read(torch.tensor([[2, 3, 1]]), torch.tensor([[4.0, 3.0, 2.0]]))
        before = used(bounded)
        assert before == {0: 0.5, 1: 2.5, 2: 4.5, 3: 3.5}
        with pytest.raises(ZeroDivisionError), store.transaction():
            slots = bounded.append(*rows(2))
            assert set(used(bounded)) == {2, 3, *slots.tolist()}
            bounded.sparse_read(slots[None], torch.ones(1, 2))
            bounded.append(*rows(1))
            raise ZeroDivisionError
        assert used(bounded) == {slot: use / 2 for slot, use in before.items()}  # what was read stays counted
        with store.transaction():
            bounded.append(*rows(1))
            with pytest.raises(ValueError):
                bounded.append(torch.zeros(2, K + 1), torch.zeros(2, V))  # evicts nothing, and the rest goes on
        assert used(bounded) == {1: 1.25, 2: 2.25, 3: 1.75, 4: 1.0} and store.generation == 2


def test_use_outlives_the_process_where_it_is_saved(tmp_path):
    store = new(tmp_path / "s")
    bounded = BoundedStore(store, 5, decay=0.9)
    bounded.append(*rows(5))
    bounded.sparse_read(torch.tensor([[0, 1, 2]]), torch.tensor([[5.0, 1.0, 0.25]]))
    bounded.save()
    saved = used(bounded)
    bounded.append(*rows(1))  # evicts 3
    abandon(store)
    with MemoryStore.open(tmp_path / "s", mode="w") as store:
        bounded = BoundedStore(store, 5, decay=0.9)
        assert used(bounded) == {**{slot: saved[slot] for slot in (0, 1, 2, 4)}, 5: 1.0}
        assert bounded.append(*rows(1)).tolist() == [6] and 4 not in used(bounded)
        bounded.save()
        saved = used(bounded)
        with store.transaction(), pytest.raises(StoreError, match="save: a transaction is open"):
            bounded.save()
    with MemoryStore.open(tmp_path / "s") as store:
        bounded = BoundedStore(store, 5)
        assert used(bounded) == saved
        with pytest.raises(StoreError, match="mode='r'"):
            bounded.save()
    with MemoryStore.open(tmp_path / "s", mode="w") as store:
        (tmp_path / "s" / "slot.use").unlink()
        assert used(BoundedStore(store, 5)) == dict.fromkeys((0, 1, 2, 5, 6), 1.0)
        BoundedStore(store, 5).save()  # sees all of them
        bounded = BoundedStore(store, 5, decay=0.5)
        bounded.sparse_read(torch.tensor([[0]]), torch.ones(1, 1))
        assert used(bounded) == {0: 1.5, 1: 0.5, 2: 0.5, 5: 0.5, 6: 0.5}


def test_a_changed_file_of_use_is_refused(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 3)
        bounded.append(*rows(3))
        bounded.save()
        file = tmp_path / "s" / "slot.use"
        whole = file.read_bytes()
        changed = [whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :] for at in range(480)]
        for data in (*changed, *(whole[:size] for size in range(len(whole))), whole + b"\0"):
            file.write_bytes(data)
            with pytest.raises(StoreDamaged, match=r"slot.use: its crc32c is wrong; remove .*slot.use to begin"):
                BoundedStore(store, 3)
        body = struct.pack("<Qqd", 1, -1, 9.0)  # whole, but of no slot
        file.write_bytes(body + struct.pack("<I", crc32c(body)))
        assert used(BoundedStore(store, 3)) == dict.fromkeys(range(3), 1.0)
        file.write_bytes(whole)
        assert used(BoundedStore(store, 3)) == used(bounded)


def test_numbers_that_come_back_do_not_bring_their_use(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 6)
        bounded.append(*rows(6))
        bounded.sparse_read(torch.tensor([[0, 1, 5]]), torch.tensor([[7.0, 6.0, 5.0]]))
        bounded.save()
        store.delete([0, 5])
        assert set(used(bounded)) == {1, 2, 3, 4}
        store.compact()
        assert store.append(*rows(2)).tolist() == [0, 5]  # past this object: seen when use is asked for
        assert used(bounded) == {0: 1.0, 1: 7.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}
        store.delete([0, 5])
        store.compact()
        assert used(BoundedStore(store, 6)) == {1: 7.0, 2: 1.0, 3: 1.0, 4: 1.0}  # saved for 5, beyond the capacity
        assert bounded.append(*rows(2)).tolist() == [0, 5] and bounded.use([0, 5]).tolist() == [1.0, 1.0]


def test_a_store_that_is_too_full_loses_slots_at_the_next_append(tmp_path):
    with new(tmp_path / "s", 50) as store:
        bounded = BoundedStore(store, 10)
        bounded.sparse_read(torch.tensor([[7]]), torch.ones(1, 1))
        store.sparse_read(torch.tensor([[8]]), torch.ones(1, 1))  # past this object: counts nothing
        assert len(store) == 50
        slots = bounded.append(*rows(2))
        assert set(used(bounded)) == {7, *range(43, 50), *slots.tolist()}


def test_many_tokens_and_small_decays_neither_overflow_nor_mix_up_the_order(tmp_path):
    with new(tmp_path / "s") as store:
        bounded, law = BoundedStore(store, 4, decay=0.5), Law(4, 0.5)
        law.append(bounded.append(*rows(4)).tolist())
        for count in (1, 300, 300, 300, 2):
            slots = torch.tensor([[count % 3]]).expand(count, 1)
            bounded.sparse_read(slots, torch.ones(count, 1))
            law.read(slots.tolist(), torch.ones(count, 1).tolist())
            agree(bounded, law, 1e-12)
        bounded.sparse_read(torch.full((5000, 1), 3), torch.ones(5000, 1))
        assert used(bounded) == {3: 5000.0, 0: 0.0, 1: 0.0, 2: 0.0}
        assert bounded.append(*rows(1)).tolist() == [4] and set(used(bounded)) == {1, 2, 3, 4}


def test_what_is_no_weight_counts_nothing(tmp_path):
    with new(tmp_path / "s") as store:
        bounded = BoundedStore(store, 5, decay=0.5)
        bounded.append(*rows(5))
        query = torch.randn(2, K)
        query[0] = torch.nan
        bounded.topk_read(query, 5)
        assert sum(used(bounded).values()) == pytest.approx(5 * 0.25 + 1)
        before = bounded.use(0).item()
        weights = torch.tensor([[1.0, torch.inf, 2.0, 4.0]], requires_grad=True)
        read = bounded.sparse_read(torch.tensor([[0, 1, -1, 0]]), weights)
        assert read.requires_grad  # weights carry their gradient, use has none
        assert bounded.use(0).item() == pytest.approx(before / 2 + 5)
        with pytest.raises(TypeError, match="sparse_read"):
            bounded.sparse_read(torch.tensor([[0]]), [[1.0]])


def test_results_are_those_of_the_store(tmp_path):
    with new(tmp_path / "s", 30) as store:
        store.write(list(range(15)), meta=[{"odd": i % 2} for i in range(15)])
        bounded, query = BoundedStore(store, 30), torch.randn(2, 3, K)
        for flags in ({}, {"return_slots": True}, {"return_lse": True}, {"return_slots": True, "return_lse": True}):
            options = {"scale": 0.5, "where": ("odd = ?", [1]), **flags}
            found, wanted = bounded.topk_read(query, 4, **options), store.topk_read(query, 4, **options)
            for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, wanted)), strict=True):
                assert torch.equal(a, b)
        assert sum(used(bounded).values()) == pytest.approx(30 + 4 * 6)


def test_a_reader_counts_and_does_not_append(tmp_path):
    with new(tmp_path / "s", 10) as store, MemoryStore.open(tmp_path / "s") as reader:
        bounded = BoundedStore(reader, 5)
        bounded.sparse_read(torch.tensor([[9]]), torch.ones(1, 1))
        store.append(*rows(3))
        assert bounded.use([9, 12]).tolist() == [2.0, 1.0] and len(bounded.least_used(99)) == 13
        with pytest.raises(StoreError, match="append: .* is open with mode='r'"):
            bounded.append(*rows(1))


def test_wrong_arguments_are_sentences(tmp_path):
    with new(tmp_path / "s", 3) as store:
        bounded = BoundedStore(store, 3)
        with pytest.raises(TypeError, match="BoundedStore: store must be a MemoryStore, got str"):
            BoundedStore("s", 3)
        for wrong in (True, 2.0, "3", None):
            with pytest.raises(TypeError, match="BoundedStore: max_slots must be an int"):
                BoundedStore(store, wrong)
            with pytest.raises(TypeError, match="least_used: count must be an int"):
                bounded.least_used(wrong)
        with pytest.raises(ValueError, match="max_slots must be at least 1, got 0"):
            BoundedStore(store, 0)
        with pytest.raises(ValueError, match="count must be at least 0, got -1"):
            bounded.least_used(-1)
        for wrong in (0, 1.5, -1, float("nan")):
            with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\], got"):
                BoundedStore(store, 3, decay=wrong)
        store.delete([1])
        with pytest.raises(KeyError, match="use: slot 1 is deleted"):
            bounded.use([1])
        with pytest.raises(IndexError, match="use: slot 3 is out of range, the capacity is 3"):
            bounded.use(3)
        for wrong in (torch.zeros(()), torch.zeros(K), "keys", torch.zeros(2, K + 1)):
            with pytest.raises((ValueError, TypeError), match="append: keys must be"):
                bounded.append(wrong, torch.zeros(2, V))
        assert bounded.least_used(0).tolist() == [] and bounded.least_used(9).tolist() == [0, 2]
    with pytest.raises(StoreError, match="closed"):
        bounded.use([0])
