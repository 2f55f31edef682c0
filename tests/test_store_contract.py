"""MemoryStore, sentence by sentence: what each call takes, gives, and raises."""

from __future__ import annotations

import json
import pickle
import threading

import pytest
import torch
from store_support import PAGE, K, V, abandon, new, rows, two_pages
from support import run_python

import memkernels as mk
from memkernels.store import MemoryStore, StoreBusy, StoreError


def test_a_slot_gives_back_what_was_appended(tmp_path):
    keys, values = rows(40)
    with new(tmp_path / "s") as store:
        slots = store.append(keys, values, [{"i": i} for i in range(40)])
        assert slots.dtype == torch.int64 and slots.tolist() == list(range(40))
        assert len(store) == 40 and store.capacity == 40 and store.generation == 1
        back = store.read(slots)
        assert torch.equal(back[0], keys) and torch.equal(back[1], values)
        assert store.meta(slots[3:5]) == [{"i": 3}, {"i": 4}]
    with MemoryStore.open(tmp_path / "s") as store:
        assert len(store) == 40 and store.generation == 1
        shaped = slots.view(4, 2, 5)
        assert torch.equal(store.gather(shaped), values.view(4, 2, 5, V))
        assert store.read(shaped)[0].shape == (4, 2, 5, K)
        assert torch.equal(store.gather(7), values[7]) and torch.equal(store.gather([1, 1]), values[[1, 1]])


def test_nothing_may_be_appended_read_and_searched(tmp_path):
    with new(tmp_path / "s") as store:
        query = torch.randn(2, 3, K)
        scores, slots = store.topk_search(query, 2)
        assert slots.tolist() == [[[-1, -1]] * 3] * 2 and scores.isneginf().all()
        assert not store.softmax_read(query).any() and store.softmax_read(query, return_lse=True)[1].isneginf().all()
        assert not store.topk_read(query, 2).any()
        assert store.append(*rows(0)).shape == (0,) and store.generation == 0 and len(store) == 0
        assert store.gather(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, V)
        store.write([], values=torch.zeros(0, V))
        assert store.delete([]) == 0 and store.generation == 0


def test_write_replaces_what_is_given(tmp_path):
    keys, values = rows(20)
    other = rows(3, seed=1)
    with new(tmp_path / "s") as store:
        store.append(keys, values, [{"a": i} for i in range(20)])
        store.write([4, 5, 6], values=other[1])
        assert torch.equal(store.read([4, 5, 6])[0], keys[4:7]) and torch.equal(store.gather([4, 5, 6]), other[1])
        store.write([4, 5, 6], keys=other[0])
        assert torch.equal(store.read([4, 5, 6])[0], other[0]) and torch.equal(store.gather([4, 5, 6]), other[1])
        assert store.meta([4]) == [{"a": 4}]  # None leaves it
        store.write([4], meta=[{"b": 1}])
        assert store.meta([4, 5]) == [{"b": 1}, {"a": 5}]  # given, it replaces all of it
        store.write([2, 2], values=other[1][:2])
        assert torch.equal(store.gather(2), other[1][1])  # of a slot that is named twice, the last stays
        assert store.generation == 5


def test_deleted_slots_are_gone(tmp_path):
    with new(tmp_path / "s", 20) as store:
        store.write([3], meta=[{"a": 1}])
        assert store.delete([3, 9]) == 2 and len(store) == 18 and store.capacity == 20
        for call in (store.read, store.gather, store.meta, store.delete, store.prefetch):
            with pytest.raises(KeyError, match="slot 3 is deleted"):
                call([3])
        with pytest.raises(KeyError, match="slot 3 is deleted"):
            store.write([3], values=torch.zeros(1, V))
        with pytest.raises(KeyError, match="twice"):
            store.delete([4, 4])
        assert 3 not in store.topk_search(torch.randn(1, K), 20)[1]
        assert store.append(*rows(2)).tolist() == [20, 21]  # numbers are not given out again
        assert store.delete(where=("a = ?", [1])) == 0


def test_a_number_out_of_range_is_an_index_error(tmp_path):
    with new(tmp_path / "s", 20) as store:
        for call in (store.read, store.gather, store.meta, store.delete, store.prefetch):
            for wrong in (20, -1, 10**12):
                with pytest.raises(IndexError, match=f"slot {wrong} is out of range, the capacity is 20"):
                    call([wrong])
        with pytest.raises(IndexError, match="slot 20"):
            store.sparse_read(torch.tensor([[20]]), torch.ones(1, 1))


def test_compact_gives_numbers_back_and_keeps_those_of_live_slots(tmp_path):
    keys, values = rows(50)
    with new(tmp_path / "s", 50) as store:
        store.delete(list(range(10, 20)))
        store.delete(list(range(45, 50)))
        store.compact()
        assert store.capacity == 45 and len(store) == 35
        live = [*range(10), *range(20, 45)]
        assert torch.equal(store.gather(live), values[live])
        with pytest.raises(KeyError):
            store.read(10)
        with pytest.raises(IndexError):
            store.read(45)
        assert store.append(*rows(12)).tolist() == [*range(10, 20), 45, 46]
        store.delete([11])
        assert store.append(*rows(1)).tolist() == [47]  # deleted since, so not yet again
        generation = store.generation
    with MemoryStore.open(tmp_path / "s", mode="w") as store:
        assert store.generation == generation and store.append(*rows(1)).tolist() == [48]
        store.compact()
        assert store.append(*rows(2)).tolist() == [11, 49] and store.verify() == []


def test_a_transaction_is_all_or_nothing(tmp_path):
    keys, values = rows(20)
    store = new(tmp_path / "s", 20)
    watcher = MemoryStore.open(tmp_path / "s")
    with store.transaction():
        fresh = store.append(*rows(5, seed=1))
        store.write([0], values=torch.ones(1, V), meta=[{"a": 1}])
        store.delete([1])
        assert len(store) == 24 and torch.equal(store.gather(0), torch.ones(V))  # reads see its own writes
        assert store.topk_search(torch.randn(1, K), 30, where=("a = 1", []))[1].tolist()[0][:2] == [0, -1]
        assert torch.equal(store.gather(fresh), rows(5, seed=1)[1])
        assert len(watcher) == 20 and watcher.generation == 1
    assert store.generation == 2 and len(store) == 24 and len(watcher) == 24  # one commit
    before = store.read([0, 2]), store.meta([0])
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.append(*rows(40, seed=2))
        store.write([0, 2], *rows(2, seed=3), [{"b": 1}, {}])
        store.delete([3, 4])
        store.gather([0, 2])
        raise ZeroDivisionError
    assert len(store) == 24 and store.generation == 2 and store.meta([0]) == before[1] and store.capacity == 25
    assert all(torch.equal(a, b) for a, b in zip(store.read([0, 2]), before[0]))
    assert torch.equal(store.gather([3, 4]), values[3:5])
    with pytest.raises(IndexError):
        store.read(25)
    watcher.close()
    store.close()
    with MemoryStore.open(tmp_path / "s") as store:
        assert len(store) == 24 and all(torch.equal(a, b) for a, b in zip(store.read([0, 2]), before[0]))


def test_a_failing_call_in_a_transaction_leaves_the_rest_to_the_caller(tmp_path):
    with new(tmp_path / "s", 20) as store:
        with store.transaction():
            with pytest.raises(ValueError):
                store.append(torch.zeros(2, K + 1), torch.zeros(2, V))
            store.delete([0])
        assert len(store) == 19
        with store.transaction(), pytest.raises(StoreError, match="do not nest"), store.transaction():
            pass
        for call in (store.compact, store.verify, lambda: store.snapshot("a"), lambda: store.backup(tmp_path / "b")):
            with store.transaction(), pytest.raises(StoreError, match="a transaction is open"):
                call()


@pytest.mark.parametrize("count", [3, 40_000])
def test_an_unclosed_store_loses_nothing_acknowledged(tmp_path, count):
    """A commit that went to the log, and one that went to pages."""
    keys, values = rows(count)
    store = new(tmp_path / "s", page_slots=256)
    slots = store.append(keys, values, [{"i": i} for i in range(count)])
    store.delete(slots[1:2])
    abandon(store)
    with MemoryStore.open(tmp_path / "s") as store:
        assert len(store) == count - 1 and store.generation == 2 and store.meta([2]) == [{"i": 2}]
        assert torch.equal(store.gather(slots[2:]), values[2:])
    with MemoryStore.open(tmp_path / "s", mode="w") as store:
        assert torch.equal(store.read(slots[2:])[0], keys[2:]) and store.verify() == []


def test_another_process_sees_a_commit_at_its_next_call(tmp_path):
    code = """if True:
        import sys, torch
        from memkernels.store import MemoryStore
        with MemoryStore.open(sys.argv[1], mode="w") as store:
            store.write([0], values=torch.full((1, 4), 7.0))
            store.append(torch.zeros(1, 8), torch.ones(1, 4), [{"new": True}])
    """
    new(tmp_path / "s", 20).close()
    with MemoryStore.open(tmp_path / "s") as store:
        assert torch.equal(store.gather(0), rows(20)[1][0])
        result = run_python(code, str(tmp_path / "s"))
        assert result.returncode == 0, result.stderr
        assert store.gather(0).tolist() == [7.0] * V
        assert len(store) == 21 and store.generation == 3 and store.meta([20]) == [{"new": True}]
        assert store.topk_search(torch.ones(1, K), 3, where=("new", []))[1].tolist() == [[20, -1, -1]]


def test_one_writer_and_any_number_of_readers(tmp_path):
    store = new(tmp_path / "s", 5)
    with pytest.raises(StoreBusy, match="mode='r'"):
        MemoryStore.open(tmp_path / "s", mode="w")
    readers = [MemoryStore.open(tmp_path / "s") for _ in range(3)]
    for reader in readers:
        with pytest.raises(StoreError, match="mode='w'"):
            reader.append(*rows(1))
        with pytest.raises(StoreError, match="mode='w'"), reader.transaction():
            pass
        reader.close()
    store.close()
    MemoryStore.open(tmp_path / "s", mode="w").close()


def test_a_closed_store_says_so(tmp_path):
    store = new(tmp_path / "s", 5)
    store.close()
    store.close()
    for call in (lambda: store.read([0]), lambda: len(store), lambda: store.generation, lambda: store.append(*rows(1))):
        with pytest.raises(StoreError, match="is closed"):
            call()


def test_where_a_store_is_made_nothing_is(tmp_path):
    new(tmp_path / "s").close()
    with pytest.raises(FileExistsError):
        MemoryStore.create(tmp_path / "s", K, V)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        MemoryStore.create(tmp_path / "file", K, V)
    (tmp_path / "empty").mkdir()
    MemoryStore.create(tmp_path / "empty", K, V).close()
    MemoryStore.create(tmp_path / "deep" / "er", K, V).close()
    with pytest.raises(FileNotFoundError, match="MemoryStore.create"):
        MemoryStore.open(tmp_path / "no")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_ram_bytes_below_two_pages_a_column(tmp_path):
    new(tmp_path / "s").close()
    with pytest.raises(ValueError, match=f"ram_bytes must hold two pages of each column, {two_pages()} bytes"):
        MemoryStore.open(tmp_path / "s", ram_bytes=two_pages() - 1)
    MemoryStore.open(tmp_path / "s", ram_bytes=two_pages()).close()


def test_where_becomes_a_mask_before_the_search(tmp_path):
    keys, values = rows(60)
    meta = [{"source": "manual" if i % 3 else "web", "year": 2000 + i, "ok": i % 2 == 0} for i in range(50)]
    query = torch.randn(4, K)
    with new(tmp_path / "s") as store:
        store.append(keys[:50], values[:50], meta)
        store.append(keys[50:], values[50:])  # without metadata

        def matching(where) -> list[int]:
            slots = store.topk_search(query, 60, where=where)[1]
            assert (slots.sort(dim=1).values == slots.sort(dim=1).values[0]).all()
            return sorted(i for i in slots[0].tolist() if i >= 0)

        assert matching(("source = ? and year >= ?", ["manual", 2024])) == [i for i in range(24, 50) if i % 3]
        assert matching(("source is null", [])) == list(range(50, 60))
        assert matching(("not (source is null) or year is null", [])) == list(range(60))
        assert matching(("ok = ? and year between ? and 2010", [True, 2003])) == [4, 6, 8, 10]
        assert matching(("source like ?", ["MAN%"])) == [i for i in range(50) if i % 3]
        assert matching(("year in (?, ?) or missing = 1", [2001, 2002.0])) == [1, 2]
        assert matching(("upper(source) = 'WEB' and year < 2004", [])) == [0, 3]
        assert matching("year = 2007") == [7]
        assert matching(("source = ?", ["' or 1=1 --"])) == []
        indexes = store._engine.db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'meta%year'").fetchall()
        plan = store._engine.db.execute(
            "EXPLAIN QUERY PLAN SELECT slot FROM meta WHERE json_extract(doc, '$.year') = 3"
        ).fetchall()
        assert len(indexes) == 1 and "USING INDEX meta_year" in str(plan)  # fields that filters name are indexed
        assert store.delete(where=("year >= ?", [2040])) == 10 and len(store) == 50
        assert matching(("year >= ?", [2038])) == [38, 39]


def test_where_is_no_way_to_sql(tmp_path):
    with new(tmp_path / "s", 5) as store:
        refused = (
            "1; drop table meta",
            "slot in (select slot from meta)",
            "load_extension('x')",
            "x = 1 -- y",
            "x = 1 /* y */",
            '"x" = 1',
            "[x] = 1",
            "a.b = 1",
            "randomblob(1000000000)",
            "x = :y",
            "x = ?1",
            "x = '?'",
            "x =",
            "",
            "x = x collate nocase",
            "x = cast(1 as text)",
        )
        for condition in refused:
            with pytest.raises(ValueError):
                store.topk_search(torch.randn(1, K), 1, where=(condition, []))
        for where in (("x = ?", []), ("x = 1", [2])):
            with pytest.raises(ValueError, match=r"where has \d \? and \d values"):
                store.delete(where=where)
        for where in (3, ("x = ?",), ("x = ?", {"a": 1}), ("x = ?", [b"a"]), ("x = ?", [[1]])):
            with pytest.raises(TypeError):
                store.delete(where=where)
        assert len(store) == 5


def test_stats_count_what_happened(tmp_path):
    with new(tmp_path / "s", 64) as store:
        assert store.stats()["commits"] == 1 and store.stats()["bytes_written"] > 64 * 4 * (K + V)
    with MemoryStore.open(tmp_path / "s", ram_bytes=two_pages()) as store:
        store.prefetch(torch.arange(32))
        assert store.stats()["ram"]["resident_bytes"] == two_pages() and store.stats()["hits"] == 0
        store.gather(torch.arange(32))
        assert store.stats()["ram"]["hits"] == 32 and store.stats()["misses"] == 0
        store.gather(torch.arange(32, 40))
        stats = store.stats()
        assert stats["misses"] == 8 and stats["reads"] == 2 and stats["bytes_read"] == 5 * 4096
        assert stats["resident_bytes"] <= stats["ram"]["budget_bytes"] == two_pages()
        store.reset_stats()
        assert store.stats()["hits"] == store.stats()["bytes_read"] == 0


def test_calls_from_several_threads_wait_for_each_other(tmp_path):
    with new(tmp_path / "s", 64) as store:
        failures = []

        def work(seed: int) -> None:
            try:
                for i in range(10):
                    store.write([seed], values=torch.full((1, V), float(i)))
                    assert store.gather(seed).tolist() == [float(i)] * V
            except Exception as error:  # told to the thread of the test
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and store.generation == 41


def test_a_store_is_not_pickled_and_not_carried_across_a_fork(tmp_path):
    with new(tmp_path / "s", 5) as store, pytest.raises(TypeError, match="open it by its path"):
        pickle.dumps(store)
    code = """if True:
        import os, sys
        from memkernels.store import MemoryStore, StoreError
        store = MemoryStore.open(sys.argv[1], mode="w")
        if (child := os.fork()) == 0:
            try:
                store.read([0])
            except StoreError as error:
                os._exit(7 if "fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        store.read([0])
        store.close()
    """
    result = run_python(code, str(tmp_path / "s"))
    assert result.returncode == 0, result.stderr


def test_importing_memkernels_does_not_import_the_store():
    code = "import sys, memkernels as mk; print('sqlite3' in sys.modules); mk.store; print('sqlite3' in sys.modules)"
    assert run_python(code).stdout.split() == ["False", "True"]
    assert "store" in dir(mk)


def test_metadata_is_json(tmp_path):
    with new(tmp_path / "s") as store:
        odd = {"text": "'; drop table meta; -- ü\u0000\ud7ff", "list": [1, {"a": None}], "": True, "f": 1e300}
        store.append(*rows(1), [odd])
        assert store.meta([0]) == [json.loads(json.dumps(odd))]
        for wrong, kind in (
            ([{"a": torch.zeros(1)}], TypeError),
            ([{"a": float("nan")}], ValueError),
            ([{1: 2}], TypeError),
            ([3], TypeError),
            ({"a": 1}, TypeError),
            ([], ValueError),
        ):
            with pytest.raises(kind):
                store.append(*rows(1), wrong)
        assert len(store) == 1 and PAGE
