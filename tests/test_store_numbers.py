"""Searches and reads of a store against the formulas in float64 over the same rows in memory."""

from __future__ import annotations

import pytest
import torch
from store_support import PAGE, K, V, best, new, rows, scores, two_pages
from support import close

from memkernels.store import MemoryStore

FEW_PAGES = 3  # of each column in memory: most of what is read streams
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def reopened(store: MemoryStore, pages: int, **options) -> MemoryStore:
    store.close()
    each = sum(c.slots * c.stored_bytes for c in store.columns.values())
    return MemoryStore.open(store.path, mode="w", ram_bytes=pages * each, **options)


@pytest.fixture(params=["all in memory", "three pages"])
def pages(request) -> int:
    return 100 if request.param == "all in memory" else FEW_PAGES


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("page_slots", [16, 13])
def test_searches_and_reads_equal_the_formulas(memory_path, dtype, page_slots, pages):
    count, eight = 333, dtype.itemsize == 1
    keys, values = rows(count, dtype=torch.float32 if eight else dtype)
    store = new(memory_path / "s", key_dtype=dtype, value_dtype=dtype, page_slots=page_slots)
    store.append(keys[:200], values[:200])
    store.append(keys[200:], values[200:])
    store = reopened(store, pages)
    slots = torch.arange(count)
    stored = store.read(slots)
    if eight:
        steps = 253.9 if dtype == torch.int8 else 27.9  # half of the widest step, and rounding of the scale
        for got, x in zip(stored, (keys, values)):
            assert got.dtype == torch.float32
            assert ((got - x).abs() <= x.abs().amax(1, keepdim=True) / steps).all()
    else:
        assert torch.equal(stored[0], keys) and torch.equal(stored[1], values)
    store.delete(slots[::5])
    slots = slots[slots % 5 != 0]
    keys, values = (x[slots] for x in stored)
    query = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(5)).to(torch.float32 if eight else dtype)
    tolerance = TOLERANCE[query.dtype]
    s = scores(query, keys)
    for _ in range(2):  # from disk, then with what the first left in memory
        chosen, numbers = best(s, slots, 7)
        got = store.topk_search(query, 7)
        assert got[0].dtype == query.dtype and torch.equal(got[1], numbers)
        close(got[0].double(), chosen, tolerance)
        p = chosen.softmax(-1)
        read = (p.unsqueeze(-1) * store.gather(numbers).double()).sum(-2)
        got = store.topk_read(query, 7, return_slots=True, return_lse=True)
        assert got[0].dtype == query.dtype and torch.equal(got[1], numbers)
        for x, wanted in zip((got[0], got[2], got[3]), (read, p, chosen.logsumexp(-1))):
            close(x.double(), wanted, tolerance)
        got = store.softmax_read(query, return_lse=True)
        close(got[0].double(), s.softmax(-1) @ values.double(), tolerance)
        close(got[1].double(), s.logsumexp(-1), tolerance)
    store.close()


def test_a_scale_per_token(memory_path, pages):
    keys, values = rows(100)
    store = reopened(new(memory_path / "s", 100), pages)
    query, scale = torch.randn(2, 4, K), torch.rand(2, 4) + 0.5
    s = scores(query, keys, scale.unsqueeze(-1).double())
    assert torch.equal(store.topk_search(query, 5, scale=scale)[1], best(s, torch.arange(100), 5)[1])
    close(store.softmax_read(query, scale=scale).double(), s.softmax(-1) @ values.double(), 1e-5)
    close(store.topk_search(query, 5, scale=2)[0].double(), best(scores(query, keys, 2), torch.arange(100), 5)[0], 1e-5)
    store.close()


def test_under_autocast_a_search_stays_exact(memory_path, pages):
    keys, values = rows(100)
    store = reopened(new(memory_path / "s", 100), pages)
    query, numbers = torch.randn(3, K), torch.arange(100)
    for one in (query, query.bfloat16()):
        s = scores(one, keys)
        with torch.autocast("cpu", torch.bfloat16):
            found, read = store.topk_search(one, 20), store.softmax_read(one)
        assert torch.equal(found[1], best(s, numbers, 20)[1]) and found[0].dtype == read.dtype == one.dtype
        close(read.double(), s.softmax(-1) @ values.double(), 1e-5 if one.dtype == torch.float32 else 2e-2)
    store.close()


def test_ties_go_to_the_smaller_slot_however_pages_lie(memory_path):
    """Equal keys everywhere, and frames in an order of their own."""
    with new(memory_path / "s") as store:
        keys = torch.ones(10 * PAGE, K)
        keys[::7] = 2
        store.append(keys, torch.zeros(10 * PAGE, V))
        wanted = best(scores(torch.ones(1, K), keys), torch.arange(10 * PAGE), 60)[1]
        for order in ([9, 3, 5, 0, 1, 8, 2, 7, 6, 4], [5, 1], [9, 8, 7]):
            for tier in store._engine.tiers.values():
                for page in range(10):
                    tier.drop(page)
            for page in order:
                store.prefetch([page * PAGE])
            for k in (1, 5, 23, 24, 60):
                assert torch.equal(store.topk_search(torch.ones(1, K), k)[1], wanted[:, :k]), (order, k)


def test_k_results_whenever_k_slots_match(memory_path, pages):
    keys, values = rows(200)
    store = new(memory_path / "s")
    store.append(keys, values, [{"rare": i % 40 == 3} for i in range(200)])
    store = reopened(store, pages)
    query = torch.randn(6, K)
    slots = torch.tensor([3, 43, 83, 123, 163])
    chosen, numbers = best(scores(query, keys[slots]), slots, 8)
    got = store.topk_search(query, 8, where=("rare", []))
    assert torch.equal(got[1], numbers) and torch.equal(got[0].isneginf(), chosen.isneginf())
    close(got[0].double(), chosen, 1e-5)
    read = store.softmax_read(query, where=("rare", []))
    close(read.double(), scores(query, keys[slots]).softmax(-1) @ values[slots].double(), 1e-5)
    store.close()


def test_sparse_read_ignores_minus_one_and_counts_duplicates(memory_path, pages):
    _, values = rows(200)
    store = reopened(new(memory_path / "s", 200), pages)
    slots = torch.randint(0, 200, (2, 5, 30))
    slots[..., 3] = -1
    slots[..., 4] = slots[..., 5]
    weights = torch.randn(2, 5, 30, requires_grad=True)
    used = values[slots.clamp(min=0)].masked_fill((slots < 0).unsqueeze(-1), 0).double()
    wanted = (weights.double().unsqueeze(-1) * used).sum(-2)
    got = store.sparse_read(slots, weights)
    close(got.detach().double(), wanted.detach(), 1e-5)
    given = torch.randn(2, 5, V)
    close(torch.autograd.grad(got, weights, given)[0], torch.einsum("btv,btkv->btk", given, used.float()), 1e-4)
    assert store.sparse_read(torch.full((1, 2), -1), torch.ones(1, 2)).tolist() == [[0.0] * V]
    store.close()


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_reach_query_and_scale(memory_path, pages, scaled):
    keys, values = rows(150, dtype=torch.float64)
    store = new(memory_path / "s", key_dtype=torch.float64, value_dtype=torch.float64)
    store.append(keys, values)
    store = reopened(store, pages)
    query = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, dtype=torch.float64, requires_grad=True) if scaled else 0.7
    leaves = [query, scale] if scaled else [query]

    def through(read, lse):
        return torch.autograd.grad((read * given[0]).sum() + (lse * given[1]).sum(), leaves, retain_graph=True)

    given = torch.randn(3, V, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    s = (query @ keys.T) * (scale.unsqueeze(1) if scaled else scale)
    wanted = through(s.softmax(-1) @ values, s.logsumexp(-1))
    for got, one in zip(through(*store.softmax_read(query, scale=scale, return_lse=True)), wanted):
        close(got, one)
    top, numbers = s.topk(6)
    wanted = through((top.softmax(-1).unsqueeze(-1) * values[numbers]).sum(-2), top.logsumexp(-1))
    for got, one in zip(through(*store.topk_read(query, 6, scale=scale, return_lse=True)), wanted):
        close(got, one)
    got = torch.autograd.grad(store.topk_search(query, 6, scale=scale)[0].square().sum(), leaves)
    for one, two in zip(got, torch.autograd.grad(top.square().sum(), leaves, retain_graph=True)):
        close(one, two)
    store.close()


def test_backward_after_a_commit_says_that_the_slots_changed(memory_path):
    with new(memory_path / "s", 50) as store:
        query = torch.randn(2, K, requires_grad=True)
        read = store.softmax_read(query)
        store.write([0], values=torch.zeros(1, V))
        with pytest.raises(RuntimeError, match="of generation 1; the store is at 2"):
            read.sum().backward()
        rows_ = store.read([0, 1])[1].requires_grad_()
        rows_.sum().backward()  # rows that were returned are the caller's
        assert rows_.grad is not None


def test_infinite_scores_and_nan_queries(memory_path, pages):
    keys, values = rows(100)
    keys[50] = torch.inf
    store = new(memory_path / "s")
    store.append(keys, values)
    store = reopened(store, pages)
    assert store.topk_search(torch.ones(1, K), 1)[1].tolist() == [[50]]
    query = torch.ones(3, K)
    query[1] = torch.nan
    numbers = store.topk_search(query, 4)[1]
    assert ((numbers >= -1) & (numbers < 100)).all() and torch.equal(numbers[0], numbers[2])
    assert store.softmax_read(query)[1].isnan().all()
    store.close()


def test_values_of_deleted_slots_reach_nothing(memory_path, pages):
    keys, values = rows(100)
    values[10:20] = torch.nan
    store = new(memory_path / "s")
    store.append(keys, values)
    store.delete(list(range(10, 20)))
    store = reopened(store, pages)
    assert torch.isfinite(store.softmax_read(torch.randn(5, K))).all()
    store.close()


@pytest.mark.parametrize("frames", [2, 5])
def test_small_tiers_give_the_same_rows(memory_path, frames):
    """Gathers of many pages through few frames, with writes between them."""
    keys, values = rows(160)
    store = reopened(new(memory_path / "s", 160), frames)
    values = values.clone()
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        slots = torch.randint(0, 160, (25,), generator=generator)
        assert torch.equal(store.gather(slots), values[slots])
        some = slots[:3].unique()
        values[some] = float(step)
        store.write(some, values=values[some])
        if step % 10 == 9:
            store._engine.fold(3)
    stats = store.stats()
    assert stats["hits"] and stats["misses"] and stats["resident_bytes"] <= stats["ram"]["budget_bytes"]
    store.close()


def test_hot_pages_stay_in_memory(memory_path):
    """CLOCK keeps a page that is read again and again from many that are read once."""
    store = reopened(new(memory_path / "s", 64 * PAGE), 8)
    store.gather([0])
    for page in range(1, 64):
        store.gather([1, page * PAGE])
    assert store.stats()["misses"] == 64  # each page once
    store.close()


def test_a_device_tier_is_the_same_class(memory_path):
    _, values = rows(160)
    store = reopened(new(memory_path / "s", 160), 3, device="cpu", device_bytes=2 * two_pages())
    values = values.clone()
    for step in range(8):
        slots = torch.randint(0, 160, (25,))
        assert torch.equal(store.gather(slots), values[slots])
        values[slots[:2]] = float(step)
        store.write(slots[:2], values=values[slots[:2]])
    stats = store.stats()
    assert stats["device"]["hits"] and stats["device"]["resident_bytes"] <= stats["device"]["budget_bytes"]
    store.close()
    with pytest.raises(ValueError, match="device_bytes must come with a device"):
        MemoryStore.open(store.path, device_bytes=1 << 20)


def test_no_more_memory_than_the_budget_and_two_runs(memory_path):
    """A scan of data 4 times the budget; the peak of the process that makes it."""
    from support import run_python

    code = """if True:
        import resource, sys, torch
        from memkernels.store import MemoryStore
        torch.set_num_threads(1)
        store = MemoryStore.open(sys.argv[1], ram_bytes=16 << 20)
        query = torch.randn(4, 64)
        small = torch.randn(100, 64)
        import memkernels as mk
        mk.topk_search(query, small, 5); mk.softmax_read(query, small, small, return_lse=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        store.topk_search(query, 5)
        store.softmax_read(query)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    with MemoryStore.create(memory_path / "s", 64, 64) as store:
        for seed in range(8):
            store.append(*rows(16384, seed, k=64, v=64))
    result = run_python(code, str(memory_path / "s"))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 16 + 64, result.stdout
