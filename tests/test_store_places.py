"""Rows of slots in memory, found by the native pass: what it takes for granted, and what it leaves to the long way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memkernels.store import MemoryStore, _rows

N, K, V = 5000, 3, 4


@pytest.fixture
def store(memory_path):
    with MemoryStore.create(memory_path, K, V, page_slots=24) as store:
        numbers = torch.arange(N, dtype=torch.float32)
        store.append(numbers[:, None].expand(N, K), numbers[:, None].expand(N, V) * 10)
        store.prefetch(torch.arange(N))
        yield store


def places(store, slots, **options):
    with store._engine.lock:
        return _rows.places(store._engine, store._engine.tiers["values"], slots, **options)


def test_a_place_is_where_the_row_lies(store):
    slots = torch.randint(0, N, (7, 90), generator=torch.Generator().manual_seed(0))
    at = places(store, slots)
    tier = store._engine.tiers["values"]
    assert torch.equal(tier.pages.rows[at][..., 0], slots * 10.0)
    assert torch.equal(store.gather(slots), (slots * 10.0).unsqueeze(-1).expand(7, 90, V))
    weights = torch.rand(7, 90)
    assert torch.allclose(store.sparse_read(slots, weights)[:, 0], (weights * slots * 10).sum(1), rtol=1e-5)


@pytest.mark.parametrize("wrong", [-2, -1, N, N + 100, 2**40, -(2**63), 2**63 - 1])
def test_what_is_no_live_slot_goes_the_long_way(store, wrong):
    assert places(store, torch.tensor([0, wrong, 3])) is None
    with pytest.raises(IndexError, match=f"^gather: slot {wrong} is out of range, the capacity is {N}$"):
        store.gather(torch.tensor([0, wrong, 3]))


def test_a_deleted_slot_goes_the_long_way_at_once(store):
    slots = torch.tensor([5, 6, 7])
    assert places(store, slots) is not None
    store.delete([6])
    assert places(store, slots) is None and places(store, slots[::2]) is not None
    with pytest.raises(KeyError, match="gather: slot 6 is deleted"):
        store.gather(slots)


def test_minus_one_is_a_place_for_reads_alone(store):
    slots = torch.tensor([[4, -1], [-1, -1]])
    at = places(store, slots, none=True)
    assert at is not None and at[0, 1] == -1 and (at[1] == -1).all()
    read = store.sparse_read(slots, torch.ones(2, 2))
    assert read.tolist() == [[40.0] * V, [0.0] * V]


def test_a_page_that_is_not_in_memory_goes_the_long_way(memory_path, store):
    with MemoryStore.open(memory_path, ram_bytes=60_000) as reader:
        slots = torch.arange(0, N, 24)
        assert places(reader, slots) is None
        assert torch.equal(reader.gather(slots)[:, 0], slots * 10.0)
        some = slots[-20:]
        reader.prefetch(some)
        assert places(reader, some) is not None


def test_uses_are_counted_once_a_call_and_at_most_three(store):
    """As the long way counts them: CLOCK sees the same from both."""
    tier = store._engine.tiers["values"]
    tier.count[:] = 0
    slots = torch.tensor([0, 1, 2, 0, 30])
    frames = np.unique(places(store, slots).numpy() // 24)
    assert (tier.count[frames] == 1).all() and tier.count.sum() == len(frames)
    for _ in range(5):
        places(store, slots)
    assert (tier.count[frames] == 3).all()
    before = tier.count.copy()
    assert places(store, torch.tensor([0, N])) is None and (tier.count == before).all()


def test_the_operator_refuses_what_would_lead_out_of_its_tables():
    run = torch.ops.memkernels_cpu.slot_places
    slots, live = torch.arange(20), torch.full((3,), 255, dtype=torch.uint8)
    frames, count = torch.tensor([1, 0, 7], dtype=torch.int32), torch.zeros(2, dtype=torch.uint8)
    assert run(slots[:16], live, 24, frames, 8, count, False).tolist() == [*range(8, 16), *range(8)]
    assert count.tolist() == [1, 1]
    assert run(slots, live, 24, frames, 8, count, False).numel() == 0  # frame 7 of 2
    assert run(slots, live, 10**9, frames[:1], 8, count, False).numel() == 0  # page 1 of 1
    assert run(slots, live[:1], 10**9, frames, 8, count, False).numel() == 0  # beyond the bits
    for wrong in (
        (slots.int(), live, 24, frames, 8, count, False),
        (slots, live.bool(), 24, frames, 8, count, False),
        (slots, live, 24, frames.long(), 8, count, False),
        (slots[::2], live, 24, frames, 8, count, False),
        (slots, live, 24, frames, 0, count, False),
        (slots.view(4, 5), live, 24, frames, 8, count, False),
    ):
        with pytest.raises(RuntimeError, match="slot_places: "):
            run(*wrong)
