"""Stores that earlier releases wrote open, hold what they held, and go on."""

from __future__ import annotations

import shutil

import pytest
import torch
from data.make_stores import FOLDER, SLOTS, keys, values

import memkernels as mk
from memkernels.store import MemoryStore
from memkernels.store._database import FORMAT

STORES = sorted(path.name for path in FOLDER.iterdir())
ROUNDING = {torch.float8_e4m3fn: 1 / 16, torch.int8: 1 / 127}  # of a row, relative to its largest number


@pytest.fixture(params=STORES)
def path(request, tmp_path):
    return shutil.copytree(FOLDER / request.param, tmp_path / "store")


def like(column, got, wanted):
    """Equal, or within the rounding of 8 bits."""
    allowed = ROUNDING.get(column.dtype, 0.0) * wanted.abs().amax(-1, keepdim=True)
    return bool(((got.double() - wanted.double()).abs() <= allowed).all())


def test_the_present_format_has_a_store():
    assert any(name.startswith(f"format{FORMAT}_") for name in STORES), "python tests/data/make_stores.py"


def test_it_holds_what_it_held(path):
    with MemoryStore.open(path) as store:
        assert store.verify() == [] and len(store) == SLOTS and store.capacity == SLOTS + 2
        live = torch.tensor([i for i in range(SLOTS + 2) if i not in (5, 6)])
        got_keys, got_values = store.read(live)
        wanted = values(live)
        wanted[(live == 3) | (live == 20), 0] += 1000
        assert like(store.columns["keys"], got_keys, keys(live))
        assert like(store.columns["values"], got_values, wanted)
        for slot in (5, 6):
            with pytest.raises(KeyError, match=f"slot {slot} is deleted"):
                store.read([slot])
        assert store.meta([4, 40]) == [{"number": 4, "kind": "even"}, {}]
        with MemoryStore.open(path, snapshot="before") as before:
            slots = torch.arange(SLOTS)
            assert len(before) == SLOTS
            assert like(before.columns["values"], before.gather(slots), values(slots))


def test_it_is_searched_and_filtered(path):
    with MemoryStore.open(path) as store:
        query = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        live = torch.tensor([i for i in range(SLOTS + 2) if i not in (5, 6)])
        stored = store.read(live)[0]
        scores, slots = store.topk_search(query, 5)
        wanted = mk.topk_search(query, stored, 5, backend="reference")
        assert torch.equal(slots, live[wanted[1]])
        assert torch.allclose(scores, wanted[0], rtol=1e-5)
        _, odd = store.topk_search(query, 50, where=("kind = ?", ["odd"]))
        assert sorted(odd[0][odd[0] >= 0].tolist()) == [i for i in range(1, SLOTS, 2) if i != 5]


def test_it_goes_on(path):
    with MemoryStore.open(path, mode="w") as store:
        generation = store.generation
        column = store.columns["values"]
        store.write([0], values=torch.full((1, 2), 7.0, dtype=column.read_dtype))
        assert store.generation == generation + 1
        store.drop_snapshot("before")
        store.compact()
        assert store.append(keys(torch.tensor([5.0])), values(torch.tensor([5.0])).to(column.read_dtype)).tolist() == [
            5
        ]
    with MemoryStore.open(path) as store:
        assert store.verify() == [] and like(column, store.gather([0]), torch.full((1, 2), 7.0))


def test_a_newer_format_is_refused_by_name(path, monkeypatch):
    monkeypatch.setattr("memkernels.store._database.FORMAT", FORMAT - 1)
    with pytest.raises(mk.store.StoreError, match=f"is of format {FORMAT}, this memkernels reads up to {FORMAT - 1}"):
        MemoryStore.open(path)
