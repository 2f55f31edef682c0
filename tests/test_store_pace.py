"""Runs off the disk are used with one thread where the disk sets the pace; the caller's number comes back."""

from __future__ import annotations

import time

import pytest
import torch

from memkernels.store import MemoryStore, _rows, _search

N, K = 6000, 8


@pytest.fixture
def store(memory_path, monkeypatch):
    monkeypatch.setattr(_rows, "RUN_BYTES", 1 << 14)
    with MemoryStore.create(memory_path, K, K, page_slots=128) as store:
        rows = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
        store.append(rows, rows)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with MemoryStore.open(memory_path, ram_bytes=20_000) as store:
        yield store
    torch.set_num_threads(before)


def threads_of(store, monkeypatch, read=0.0, use=0.0):
    """The number of threads that each run is used with, where reading and using take so many seconds."""
    seen, load, search = [], _rows._load, _search._paged

    def slow_load(*args):
        time.sleep(read)
        return load(*args)

    def noted(*args, **options):
        seen.append(torch.get_num_threads())
        time.sleep(use)
        return search(*args, **options)

    monkeypatch.setattr(_rows, "_load", slow_load)
    monkeypatch.setattr(_search, "_paged", noted)
    store.topk_search(torch.randn(2, K), 3)
    return seen[1:]  # the first is that of the pages in memory


def test_a_slow_disk_is_met_by_one_thread(store, monkeypatch):
    assert set(threads_of(store, monkeypatch, read=0.02)) == {1}
    assert torch.get_num_threads() == 3


def test_a_fast_disk_is_met_by_all(store, monkeypatch):
    found = threads_of(store, monkeypatch, use=0.02)
    assert found[0] == 1 and set(found[2:]) == {3}
    assert torch.get_num_threads() == 3


def test_results_do_not_depend_on_it(store):
    query = torch.randn(40, K)
    wanted = store.topk_search(query, 5)
    torch.set_num_threads(1)
    for got, want in zip(store.topk_search(query, 5), wanted):
        assert torch.equal(got, want)


def test_an_error_or_an_end_before_the_last_run_gives_the_threads_back(store):
    engine = store._engine
    with engine.lock:
        runs = _rows.stream(engine, ("keys",), torch.arange(N // 128).numpy())
        next(runs)
        assert torch.get_num_threads() == 1
        runs.close()
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            for _ in _rows.stream(engine, ("keys",), torch.arange(N // 128).numpy()):
                raise ZeroDivisionError
    assert torch.get_num_threads() == 3
