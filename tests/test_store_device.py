"""Searches and reads over pages on a device, whose copies are as late as they may be (device_support.Late)."""

from __future__ import annotations

import contextlib
import os
import random
import weakref

import pytest
import torch
from device_support import Disorder, on_device, use, watched
from store_support import PAGE, K, V, abandon, best, new, rows, scores, two_pages
from test_store_random import Model, step

from memkernels import ops
from memkernels.store import MemoryStore, StoreDamaged, _rows, _writer
from memkernels.store._copies import Copies

N = 20 * PAGE


@pytest.fixture
def late(monkeypatch):
    return use(monkeypatch)


def work(path, frames: int = 6) -> None:
    """Searches, reads, gathers and writes in turn, each compared with plain tensors."""
    keys, values = rows(N)
    with on_device(path, frames, mode="w") as store, watched(store):
        for turn in range(6):
            generator = torch.Generator().manual_seed(turn)
            query = torch.randn(3, K, generator=generator)
            slots = torch.randint(0, N, (40,), generator=generator)
            assert torch.equal(store.gather(slots), values[slots])
            s = scores(query, keys)
            wanted, numbers = best(s, torch.arange(N), 5)
            found, where = store.topk_search(query, 5)
            assert torch.equal(where, numbers)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
            read, lse = store.softmax_read(query, return_lse=True)
            torch.testing.assert_close(read.double(), s.softmax(-1) @ values.double(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-5, atol=1e-6)
            assert torch.equal(store.read(slots[:3])[0], keys[slots[:3]])
            store.prefetch(slots[10:20])
            keys, values = keys.clone(), values.clone()
            keys[slots[:4]], values[slots[:4]] = rows(4, seed=100 + turn)
            store.write(slots[:4], keys[slots[:4]], values[slots[:4]])


# --- order ---


@pytest.mark.parametrize("frames", [2, 6, 20])
def test_kernels_copies_and_the_host_wait_for_one_another(memory_path, monkeypatch, late, frames):
    monkeypatch.setattr(_rows, "RUN_BYTES", 2 * 4096)
    new(memory_path / "s", N).close()
    work(memory_path / "s", frames)


@pytest.mark.parametrize("queue", ["compute", "copy", "host"])
def test_a_wait_that_is_left_out_is_found(memory_path, monkeypatch, late, queue):
    monkeypatch.setattr(_rows, "RUN_BYTES", 2 * 4096)
    new(memory_path / "s", N).close()
    late.left_out = (queue,)
    with pytest.raises(AssertionError) as found:
        work(memory_path / "s")
    assert isinstance(found.value, Disorder) or queue == "compute"


def test_a_copy_runs_while_the_next_run_is_read_and_nobody_waits_for_the_last(memory_path, monkeypatch, late):
    """The host waits for a copy before it fills the same memory again, and then the next run is being read."""
    monkeypatch.setattr(_rows, "RUN_BYTES", 4096)
    new(memory_path / "s", N).close()
    log = []
    stage, wait = late.stage, late.wait
    with on_device(memory_path / "s", 8) as store:
        submit = store._engine.threads().submit
        monkeypatch.setattr(store._engine.threads(), "submit", lambda *a: (log.append(f"read {a[3]}"), submit(*a))[1])
        monkeypatch.setattr(late, "stage", lambda self, *a: (log.append("copy"), stage(self, *a)))
        monkeypatch.setattr(late, "wait", lambda self, *a: (log.append(f"{a[0]} waits"), wait(self, *a)))
        _rows.to_device(store._engine, store._engine.device_tiers["keys"], torch.arange(4).numpy())
    log = [line for line in log if line != "read []"]
    assert log == [
        *("read [0]", "read [1]", "copy waits", "copy"),
        *("host waits", "read [2]", "copy waits", "copy"),
        *("host waits", "read [3]", "copy waits", "copy"),
        *("copy waits", "copy"),
    ]


def test_the_streams_of_a_gpu_are_used(monkeypatch):
    """Copies go to their own stream; each queue records and waits in its own."""
    log = []

    class Event:
        def record(self, stream):
            log.append(f"record {stream}")

        def wait(self, stream):
            log.append(f"{stream} waits")

        def synchronize(self):
            log.append("host waits")

    class Module:
        @staticmethod
        def Stream(device):
            return f"own of {device}"

        @staticmethod
        def current_stream(device):
            return f"current of {device}"

        @staticmethod
        @contextlib.contextmanager
        def stream(stream):
            log.append(f"in {stream}")
            yield
            log.append("out")

    Module.Event = Event
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    copies = Copies(torch.device("cuda:1"))
    target = torch.zeros(3)
    copies.stage(target, torch.ones(3))
    copies.wait("compute", copies.record("copy"))
    copies.wait("copy", copies.record("compute"))
    copies.wait("host", copies.record("copy"))
    own, current = "own of cuda:1", "current of cuda:1"
    assert torch.equal(target, torch.ones(3)) and log == [
        *(f"in {own}", "out"),
        *(f"record {own}", f"{current} waits"),
        *(f"record {current}", f"{own} waits"),
        *(f"record {own}", "host waits"),
    ]


def test_memory_stays_within_device_bytes(memory_path, late):
    for dtype in (torch.float32, torch.int8):
        path = memory_path / str(dtype)
        store = new(path, N, key_dtype=dtype)
        budget = 7 * two_pages() // 2 + 100
        store.close()
        with MemoryStore.open(path, device="cpu", device_bytes=budget) as store:
            store.topk_search(torch.randn(2, K), 3)
            store.softmax_read(torch.randn(2, K))
            stats = store.stats()["device"]
            assert stats["resident_bytes"] <= stats["budget_bytes"] == store._engine.copies.bytes <= budget


# --- failures ---


@pytest.mark.parametrize("failing", range(6))
def test_a_copy_that_fails_is_an_error_once_and_leaves_no_page(memory_path, monkeypatch, late, failing):
    monkeypatch.setattr(_rows, "RUN_BYTES", 2 * 4096)
    keys, _ = rows(N)
    new(memory_path / "s", N).close()
    late.failing = failing
    with on_device(memory_path / "s", 12) as store, watched(store):
        query = torch.randn(2, K)
        store.prefetch(torch.arange(2 * PAGE))  # copies that nobody waits for yet
        with pytest.raises(RuntimeError, match="the copy failed"):
            for _ in range(2):
                store.topk_search(query, 5)
                store.softmax_read(query)
        for _ in range(2):
            assert torch.equal(store.topk_search(query, 5)[1], best(scores(query, keys), torch.arange(N), 5)[1])
        read = store.softmax_read(query)
        assert torch.isfinite(read).all()


def test_a_page_that_cannot_be_read_takes_no_frame(memory_path, late):
    path = memory_path / "s"
    new(path, N).close()
    with on_device(path, 8, 2) as store:
        tier = store._engine.device_tiers["values"]
        offset = int(store._engine.tables["values"]["extent"][3]) * 4096
        with open(path / "values.pages", "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(StoreDamaged, match="page 3"):
            store.softmax_read(torch.randn(1, K))
        assert tier.frame_of[3] < 0 and torch.isfinite(store.gather(torch.arange(3 * PAGE))).all()


# --- a memory that changes ---


@pytest.mark.parametrize("frames", [4, 20])
def test_deletes_writes_and_filters_reach_the_device(memory_path, late, frames):
    keys, values = rows(N)
    store = MemoryStore.create(memory_path / "s", K, V, page_slots=PAGE)
    store.append(keys, values, [{"n": i % 3} for i in range(N)])
    store.close()
    live = torch.ones(N, dtype=torch.bool)
    with on_device(memory_path / "s", frames, mode="w") as store, watched(store):
        query = torch.randn(2, K)

        def check(among: torch.Tensor | None = None, **options) -> None:
            there = live if among is None else live & among
            slots = there.nonzero().squeeze(1)
            s = scores(query, keys[slots])
            assert torch.equal(store.topk_search(query, 4, **options)[1], best(s, slots, 4)[1])
            read = store.softmax_read(query, **options)
            torch.testing.assert_close(read.double(), s.softmax(-1) @ values[slots].double(), rtol=1e-5, atol=1e-6)

        check()
        store.delete(store.topk_search(query, 1)[1][:, 0].unique())
        live[best(scores(query, keys), torch.arange(N), 1)[1].flatten()] = False
        check()
        check(torch.arange(N) % 3 == 1, where=("n = ?", [1]))
        keys, values = keys.clone(), values.clone()
        some = live.nonzero().squeeze(1)[::7]
        keys[some], values[some] = 3 * query[0], torch.ones(len(some), V)
        store.write(some, keys[some], values[some])
        check()
        with pytest.raises(ZeroDivisionError), store.transaction():
            old = keys, values
            keys, values = keys.clone(), values.clone()
            keys[some], values[some] = -query[1], torch.zeros(len(some), V)
            store.write(some, keys[some], values[some])
            live[some[0]] = False
            store.delete(some[:1])
            check()  # a transaction reads its own writes
            raise ZeroDivisionError
        (keys, values), live[some[0]] = old, True
        check()
        store._engine.fold_all()
        check()
        more = rows(40, seed=5)
        store.append(*more)
        keys, values = torch.cat([keys, more[0]]), torch.cat([values, more[1]])
        live = torch.cat([live, torch.ones(40, dtype=torch.bool)])
        check()


@pytest.mark.parametrize("small", [1 << 20, 500])
def test_a_reader_with_a_device_sees_commits_of_another_process(memory_path, monkeypatch, late, small):
    """By way of the log, and of pages."""
    monkeypatch.setattr(_writer, "SMALL", small)
    path = memory_path / "s"
    new(path, N).close()
    with on_device(path, 8) as reader, watched(reader):
        query = torch.randn(2, K)
        for turn in range(3):
            if (child := os.fork()) == 0:
                status = 1
                try:
                    with MemoryStore.open(path, mode="w") as store:
                        store.write(torch.arange(turn, N), *(x[turn:] for x in rows(N, seed=turn + 1)))
                        store.delete(torch.tensor([turn]))
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            keys, values = rows(N, seed=turn + 1)
            slots = torch.arange(turn + 1, N)
            s = scores(query, keys[slots])
            assert torch.equal(reader.topk_search(query, 5)[1], best(s, slots, 5)[1])
            read = reader.softmax_read(query).double()
            torch.testing.assert_close(read, s.softmax(-1) @ values[slots].double(), rtol=1e-5, atol=1e-6)
            assert torch.equal(reader.gather(slots[::9]), values[slots[::9]])


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_beside_a_device(memory_path, monkeypatch, late, seed):
    monkeypatch.setattr(_writer, "SMALL", 1200)
    torch.manual_seed(seed)
    draw, model, path = random.Random(seed), Model(), memory_path / "s"
    MemoryStore.create(path, K, V, page_slots=PAGE).close()
    store, reader = on_device(path, 3 + seed, mode="w"), on_device(path, 5)
    for turn in range(60):
        step(store, model, draw)
        if turn % 10 == 9:
            store.compact() if turn % 20 == 9 else store._engine.fold(2)
        if turn % 25 == 24:
            abandon(store)
            store = on_device(path, 3 + seed, mode="w")
        if turn % 4 == 0:
            for one in (store, reader):
                with watched(one):
                    model.check(one, draw)
    reader.close()
    store.close()


def test_a_delete_that_comes_with_the_maps_alone_reaches_the_device(memory_path, late):
    store = new(memory_path / "s", N)
    store._engine.fold_all()
    with on_device(memory_path / "s", 20) as reader, watched(reader):
        query = torch.randn(2, K)
        first = reader.topk_search(query, 1)[1]
        store.delete(first.unique())
        store._engine.fold_all()
        assert not torch.isin(reader.topk_search(query, 9)[1], first).any()
        assert reader.stats()["device"]["bytes_copied"] == N * 4 * K  # no page came again
    store.close()


# --- which tier ---


def test_a_search_fills_free_frames_and_evicts_nothing(memory_path, late):
    new(memory_path / "s", N).close()
    with on_device(memory_path / "s", 6, 4) as store:
        tier = store._engine.device_tiers["keys"]
        store.read(torch.tensor([15 * PAGE, 18 * PAGE]))
        store.topk_search(torch.randn(1, K), 3)
        held = sorted(tier.page_of.tolist())
        assert held == [0, 1, 2, 3, 15, 18]
        store.reset_stats()
        store.topk_search(torch.randn(1, K), 3)
        stats = store.stats()
        assert sorted(tier.page_of.tolist()) == held and stats["device"]["bytes_copied"] == 0
        assert (stats["device"]["hits"], stats["device"]["misses"]) == (6 * PAGE, 14 * PAGE)
        assert stats["ram"]["hits"] + stats["ram"]["misses"] == 14 * PAGE and stats["reads"] == 1


def test_what_the_device_holds_is_searched_in_one_call_and_is_not_copied(memory_path, monkeypatch, late):
    new(memory_path / "s", N).close()
    calls = []
    for name in ("paged_topk_search", "softmax_read"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _n=name, _f=real, **o: (calls.append(_n), _f(*a, **o))[1])
    with on_device(memory_path / "s", 20, 2) as store:
        query = torch.randn(2, K)
        store.softmax_read(query)
        calls.clear()
        copied, read = store.stats()["device"]["bytes_copied"], store.stats()["bytes_read"]
        assert copied == N * 4 * (K + V)
        store.softmax_read(query)
        store.topk_search(query, 3)
        assert calls == ["softmax_read", "paged_topk_search"]
        assert store.stats()["device"]["bytes_copied"] == copied and store.stats()["bytes_read"] == read


def test_a_closed_store_keeps_no_memory_of_the_device(memory_path):
    new(memory_path / "s", N, key_dtype=torch.int8).close()
    with on_device(memory_path / "s", 6) as store:
        store.softmax_read(torch.randn(2, K))
        pages = [tier.pages for tier in store._engine.device_tiers.values()]
        held = [weakref.ref(x) for p in pages for x in (p.rows, p.scales) if x is not None]
    assert len(held) == 3 and not any(ref() is not None for ref in held)
    assert store.stats()["device"]["hits"]


@pytest.mark.parametrize("where", [{}, {"device": "cpu"}], ids=["memory", "device"])
def test_a_store_outlives_the_inference_mode_in_which_it_is_first_used(memory_path, where):
    keys, values = rows(N)
    with new(memory_path / "s", N) as store:
        store.delete(torch.arange(0, N, 5))  # so that there are masks
    live = (torch.arange(N) % 5).nonzero().squeeze(1)
    budget = 2 * two_pages()
    with torch.inference_mode():
        store = MemoryStore.open(memory_path / "s", ram_bytes=budget, **where, device_bytes=budget * len(where))
        store.read(live[-3 * PAGE :])
        store.topk_search(torch.randn(2, K), 3)
        store.softmax_read(torch.randn(2, K))
    with store:
        query = torch.randn(2, K, requires_grad=True)
        read = store.softmax_read(query)
        torch.testing.assert_close(read, scores(query, keys[live]).softmax(-1).float() @ values[live])
        read.sum().backward()
        store.topk_read(query, 3).sum().backward()
        assert torch.equal(store.gather(live), values[live])


def test_a_read_is_one_call_in_whatever_order_pages_came(memory_path, monkeypatch, late):
    """A page comes into the frame that it has in the other column."""
    keys, values = rows(N)
    new(memory_path / "s", N).close()
    calls, real = [], ops.softmax_read
    with on_device(memory_path / "s", 20, mode="w") as store, watched(store):
        for page in (17, 3, 11):
            store.gather(torch.tensor([page * PAGE]))
        store.topk_search(torch.randn(1, K), 2)
        monkeypatch.setattr(ops, "softmax_read", lambda *a, **o: (calls.append(1), real(*a, **o))[1])
        for slots in ([5 * PAGE], [2 * PAGE, 9 * PAGE, 17 * PAGE]):
            query = torch.randn(2, K)
            wanted = scores(query, keys).softmax(-1) @ values.double()
            torch.testing.assert_close(store.softmax_read(query).double(), wanted, rtol=1e-5, atol=1e-6)
            store.write(slots, values=values[slots])
        assert len(calls) == 2


@pytest.mark.parametrize("device", ["meta", "cuda", "cuda:99", "no such device", 5.5], ids=str)
def test_a_device_that_cannot_be_used_is_one_sentence(memory_path, device):
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is one")
    new(memory_path / "s", 3).close()
    with pytest.raises(ValueError, match="^open: device must be a CUDA device that this torch can use, or cpu, got "):
        MemoryStore.open(memory_path / "s", device=device, device_bytes=1 << 20)
    MemoryStore.open(memory_path / "s", mode="w").close()  # nothing is left open
