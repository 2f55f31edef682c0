"""Results of searches and reads over pages on a device, on the CPU and on one beside it (device_support)."""

from __future__ import annotations

import pytest
import torch
from device_support import on_device, use, watched
from store_support import PAGE, K, V, best, new, rows, scores

from memkernels import ops, use_backend
from memkernels.store import MemoryStore, _rows

N = 20 * PAGE
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


@pytest.fixture
def late(monkeypatch):
    return use(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frames", [3, 20])
def test_every_dtype_is_exact(memory_path, late, dtype, frames):
    path = memory_path / "s"
    column = torch.float32 if dtype.itemsize == 1 else dtype
    keys, values = rows(N, dtype=column)
    with MemoryStore.create(path, K, V, key_dtype=dtype, value_dtype=dtype, page_slots=PAGE) as store:
        store.append(keys, values)
        keys, values = store.read(torch.arange(N))
    with on_device(path, frames) as store, watched(store):
        query = torch.randn(3, K).to(column)
        s = scores(query, keys)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        close = {"rtol": 1e-5, "atol": 1e-6} if column.itemsize > 2 else {"rtol": 1e-2, "atol": 1e-2}
        for _ in range(2):
            found, where = store.topk_search(query, 7)
            wanted, numbers = best(s, torch.arange(N), 7)
            assert torch.equal(where, numbers) and found.dtype == query.dtype
            torch.testing.assert_close(found.double(), wanted, **close)
            read, lse = store.softmax_read(query, return_lse=True)
            assert read.dtype == query.dtype and lse.dtype == exact
            torch.testing.assert_close(read.double(), s.softmax(-1) @ values.double(), **close)
            some, slots, weights = store.topk_read(query, 7, return_slots=True)
            assert torch.equal(slots, numbers)
            torch.testing.assert_close(weights.double(), wanted.softmax(-1), **close)
            by_hand = torch.einsum("tk,tkv->tv", wanted.softmax(-1), values[numbers].double())
            torch.testing.assert_close(some.double(), by_hand, **close)
            again = store.sparse_read(torch.cat([numbers, -torch.ones_like(numbers)], 1), weights.repeat(1, 2))
            torch.testing.assert_close(again.double(), by_hand, **close)


def test_values_of_another_dtype_than_the_query(memory_path, late, monkeypatch):
    """They are converted in runs, whatever the device holds."""
    monkeypatch.setattr(_rows, "RUN_BYTES", 2 * 4096)
    path, (keys, values) = memory_path / "s", rows(N)
    with MemoryStore.create(path, K, V, value_dtype=torch.bfloat16, page_slots=PAGE) as store:
        store.append(keys, values.bfloat16())
    with on_device(path, 12) as store, watched(store):
        query = torch.randn(3, K)
        wanted = scores(query, keys).softmax(-1) @ values.bfloat16().double()
        sizes, real = [], ops.softmax_read
        monkeypatch.setattr(ops, "softmax_read", lambda *a, **o: (sizes.append(len(a[1])), real(*a, **o))[1])
        torch.testing.assert_close(store.softmax_read(query).double(), wanted, rtol=1e-5, atol=1e-6)
        assert set(sizes[:6]) == {2 * PAGE}


@pytest.mark.parametrize("frames", [3, 9, 20])
def test_equal_scores_go_by_smaller_slot_wherever_it_lies(memory_path, late, frames):
    """Pages come to the device in no order, so that frames say nothing about numbers."""
    keys = torch.randint(0, 2, (N, K), generator=torch.Generator().manual_seed(0)).float()
    with MemoryStore.create(memory_path / "s", K, V, page_slots=PAGE) as store:
        store.append(keys, rows(N)[1])
    with on_device(memory_path / "s", frames) as store, watched(store):
        for page in (13, 2, 17, 5):
            store.read(torch.tensor([page * PAGE]))
        query = torch.ones(2, K)
        for k in (1, 30, N + 5):
            found, where = store.topk_search(query, k)
            wanted, numbers = best(scores(query, keys), torch.arange(N), k)
            assert torch.equal(where, numbers)
            torch.testing.assert_close(found.double(), wanted)


def test_gradients_reach_the_query_and_the_scale(memory_path, late):
    keys, values = (x.double() for x in rows(N))
    new(memory_path / "s", N).close()
    with on_device(memory_path / "s", 9) as store, watched(store):
        query, scale = torch.randn(3, K, requires_grad=True), torch.rand(3, requires_grad=True)
        plain, factor = (x.detach().double().requires_grad_() for x in (query, scale))
        s = (plain @ keys.mT) * factor.unsqueeze(1)
        top = s.topk(6)
        wholes = s.softmax(-1) @ values + s.logsumexp(-1, keepdim=True)
        parts = torch.einsum("tk,tkv->tv", top.values.softmax(-1), values[top.indices])
        read, lse = store.softmax_read(query, scale=scale, return_lse=True)
        for got, wanted in ((read + lse.unsqueeze(1), wholes), (store.topk_read(query, 6, scale=scale), parts)):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
            wanted = torch.autograd.grad(wanted.square().sum(), [plain, factor], retain_graph=True)
            for a, b in zip(torch.autograd.grad(got.square().sum(), [query, scale]), wanted):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


# --- another device than the CPU ---


@pytest.fixture(params=["meta", "cuda"])
def far(request):
    """A device beside the CPU: one whose tensors never meet others and whose copies are late, and a GPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        use(request.getfixturevalue("monkeypatch"))
        with use_backend("reference"):
            yield torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("frames", [3, 20])
def test_calls_run_where_their_tensors_lie(memory_path, far, dtype, frames):
    """Nothing meets a tensor of another device, and results come back to the device of what was asked."""
    path, column = memory_path / "s", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    with MemoryStore.create(path, K, V, key_dtype=dtype, value_dtype=dtype, page_slots=PAGE) as store:
        store.append(*rows(N, dtype=column), [{"n": i % 3} for i in range(N)])
        keys, values = store.read(torch.arange(N))
    with on_device(path, frames, device=str(far)) as store, watched(store):
        close = {"rtol": 1e-5, "atol": 1e-5} if column == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}

        def same(got, wanted) -> None:
            assert got.device == far
            torch.testing.assert_close(got.detach().cpu().double(), wanted.detach().double(), **close)

        query, slots = torch.randn(3, K).to(column), torch.randint(0, N, (3, 9))
        s = scores(query, keys)
        wanted, numbers = best(s, torch.arange(N), 7)
        for _ in range(2):
            found, where = store.topk_search(query.to(far), 7)
            same(found, wanted)
            same(where, numbers)
            read, lse = store.softmax_read(query.to(far), return_lse=True)
            same(read, s.softmax(-1) @ values.double())
            same(lse, s.logsumexp(-1))
            read, where, weights, lse = store.topk_read(query.to(far), 7, return_slots=True, return_lse=True)
            same(read, torch.einsum("tk,tkv->tv", wanted.softmax(-1), values[numbers].double()))
            same(where, numbers)
            same(weights, wanted.softmax(-1))
            same(lse, wanted.logsumexp(-1))
            same(store.sparse_read(where, weights), read.cpu())
            same(store.sparse_read(numbers, weights), read.cpu())
            for rows_of in (slots.to(far), slots.tolist()):
                same(store.gather(rows_of), values[slots])
                same(store.read(rows_of)[0], keys[slots])
        other = (torch.arange(N) % 3 == 1).nonzero().squeeze(1)
        same(store.topk_search(query.to(far), 4, where=("n = ?", [1]))[1], best(s[:, other], other, 4)[1])
        same(store.softmax_read(query.to(far), where=("n = ?", [1])), s[:, other].softmax(-1) @ values[other].double())
        same(store.topk_search(query.to(far), 4, where=("n = ?", [5]))[1], torch.full((3, 4), -1))
        same(store.softmax_read(query.to(far), where=("n = ?", [5])), torch.zeros(3, V))
        before = store.stats()["device"]
        assert torch.equal(store.topk_search(query, 7)[1], numbers) and store.gather(slots).device.type == "cpu"
        assert store.softmax_read(query).device.type == "cpu" and store.stats()["device"] == before


@pytest.mark.parametrize("frames", [3, 20])
def test_gradients_come_back_to_the_device(memory_path, far, frames):
    new(memory_path / "s", N).close()
    query, scale = torch.randn(3, K), torch.rand(3)
    with on_device(memory_path / "s", frames, device=str(far)) as store, watched(store):
        found = []
        for where in (torch.device("cpu"), far):
            leaves = [query.to(where, copy=True).requires_grad_(), scale.to(where, copy=True).requires_grad_()]
            read, lse = store.softmax_read(leaves[0], scale=leaves[1], return_lse=True)
            total = (read.sum(1) * lse).sum() + store.topk_read(leaves[0], 5, scale=leaves[1]).square().sum()
            found.append(torch.autograd.grad(total, leaves))
            assert all(x.device == where for x in found[-1])
        for wanted, got in zip(*found):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_the_approximate_index_answers_on_the_device(memory_path, far):
    pytest.importorskip("faiss", reason="needs faiss")
    with new(memory_path / "s", N) as store:
        store.build_index("Flat")
        store.write(torch.arange(5), *rows(5, seed=1))
    with on_device(memory_path / "s", 5, device=str(far)) as store, watched(store):
        query, scale = torch.randn(3, K), torch.rand(3) + 0.5
        wanted = store.topk_search(query, 6, scale=scale)
        leaf = query.to(far, copy=True).requires_grad_()
        found = store.topk_search(leaf, 6, scale=scale.to(far), index="approximate")
        assert found[0].device == found[1].device == far and torch.equal(found[1].cpu(), wanted[1])
        torch.testing.assert_close(found[0].detach().cpu(), wanted[0])
        assert torch.autograd.grad(found[0].sum(), leaf)[0].device == far
