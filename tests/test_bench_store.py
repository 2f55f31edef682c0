"""``python -m bench store``: every promise has a row, no speed for a wrong result, peers may be absent."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from bench import results
from bench.__main__ import main
from bench.case import OWN
from bench.contests import report
from bench.contests.command import renewed
from bench.contests.contest import Contest
from bench.contests.finding import TOLD, Finding, Goal, Wrong, least, most, summary
from bench.contests.peers import PACKAGES, missing
from bench.contests.turns import Times, take_turns
from bench.store import command, large, space, sparse
from bench.store.traces import belady, clustered, lru, scattered
from docs import generate
from memkernels.store import MemoryStore

# What the store promises: row, what it is held against, goal. Against "" a number stands alone.
PROMISED = {
    ("gather", "sparse_read", "at most 3x"),
    ("gather", "sparse_read", "at most 1.4x"),
    ("gather", "Lance", "at least 50x"),
    ("topk", "one tensor", "at most 1.15x"),
    ("stream", "one tensor", "at most 2.9x"),
    ("softmax", "one tensor", "at most 1.15x"),
    ("cold", "O_DIRECT", "at least 0.9x"),
    ("cold", "memmap", "at least 2x"),
    ("commit", "append and fdatasync", "at most 1.3x"),
    ("commit", "LMDB", "at least 4x"),
    ("space", "live + pinned", "at most 1.3x"),
    ("open", "", "at most 100 ms"),
    ("index", "exact, one tensor", "at least 4x"),
    ("index", "faiss alone", "at least 0.980"),
    ("index", "", "at least 1.000"),
    ("hits", "Belady", "at least 0.9x"),
    ("hits", "Belady", "at least 0.7x"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Exit status and rows of a quick run of everything, and the folder that it was given."""
    folder, out = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("out") / "rows.json"
    threads = torch.get_num_threads()
    try:
        status = main(["store", "--quick", "--threads", "1", "--folder", str(folder), "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    return status, results.load(out), folder


def test_every_promise_has_a_row(run):
    status, rows, folder = run
    assert status == 0
    found = {(row["row"], row["peer"], row["goal"]["text"]) for row in rows}
    wanted = {one for one in PROMISED if one[0] != "index" or not missing("faiss")}
    assert wanted <= found, wanted - found
    assert {row["row"] for row in rows} == set(command.ROWS)
    scan = next(row for row in rows if row["row"] == "scan" and row["goal"]["text"])
    assert scan["goal"]["unit"] == "bytes" and 64 << 20 < scan["goal"]["most"] < 65 << 20  # 64 MiB beside the budget
    clocks = {row["clock"] for row in rows if row["row"] == "stream" and row["goal"]["text"]}
    assert clocks == {"wall", "processor"}
    assert next(row for row in rows if row["row"] == "open")["clock"] == "processor"


def test_a_row_has_numbers_or_says_why(run):
    for row in run[1]:
        assert row["commit"] and row["torch"] and row["versions"]["SQLite"] and row["threads"] == 1
        assert row["reached"] is None, "a quick run judges nothing"
        if row["value"] is None:
            assert "pip install" in row["why"] or "O_DIRECT" in row["why"], row
        else:
            assert row["own"] > 0 and row["value"] > 0 and not row["why"]
            assert row["theirs"] is None if not row["peer"] else row["theirs"] > 0


def test_nothing_is_left_on_the_disk(run):
    assert not list(run[2].iterdir())


def test_the_table_has_every_row(run):
    page = report.page(run[1], "store")
    assert page.count("\n| ") == len(run[1]) + 2
    assert all(f"| {row['what']} |" in page for row in run[1])


@pytest.mark.parametrize("row, name", [("gather", "Lance"), ("commit", "LMDB"), ("index", "faiss")])
def test_a_peer_that_is_absent_is_told(row, name, monkeypatch, tmp_path, capsys):
    module, package = PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "rows.json"
    assert main(["store", "--quick", "--only", row, "--folder", str(tmp_path), "--out", str(out)]) == 0
    told = [row for row in results.load(out) if row["value"] is None]
    assert told and all(f"pip install {package}" in row["why"] for row in told)
    assert f"pip install {package}" in capsys.readouterr().out


def more(rows):
    return rows + 1


# Row -> a method of the store, and what spoils its result.
SPOILT = {
    "gather": ("gather", more),
    "topk": ("topk_search", lambda found: (found[0], found[1].roll(1, -1))),
    "stream": ("topk_search", lambda found: (found[0] * 1.001, found[1])),
    "softmax": ("softmax_read", lambda read: read * 1.001),
    "cold": ("gather", more),
    "commit": ("read", lambda rows: (more(rows[0]), rows[1])),
    "space": ("read", lambda rows: (rows[0], more(rows[1]))),
    "open": ("gather", more),
    "index": ("topk_search", lambda found: (found[0], found[1].roll(1, -1))),
    "hits": ("gather", more),
}


def test_every_row_has_a_way_to_be_wrong():
    assert set(SPOILT) == set(command.ROWS) - {"scan"}, "which runs in a process of its own"


@pytest.mark.parametrize("row", SPOILT)
def test_a_wrong_result_has_no_speed(row, monkeypatch, tmp_path):
    if row == "index" and missing("faiss"):
        pytest.skip("needs faiss")
    name, spoil = SPOILT[row]
    method = getattr(MemoryStore, name)
    monkeypatch.setattr(MemoryStore, name, lambda *args, **kw: spoil(method(*args, **kw)))
    out = tmp_path / "rows.json"
    assert main(["store", "--quick", "--only", row, "--folder", str(tmp_path), "--out", str(out)]) == 1
    (told,) = results.load(out)
    assert told["value"] is told["own"] is None and told["why"].startswith("wrong")


# --- contests ---


def equals_one(got: object) -> None:
    if got != 1:
        raise Wrong(f"must be 1, got {got}")


def test_a_wrong_peer_has_no_speed():
    contest = Contest("work", lambda: 1, equals_one)
    contest.enter("swift", lambda: 2)
    contest.enter("right", lambda: 1)
    contest.run(1e-3)
    told = contest.against("swift", most(1))
    assert told.value is None and told.why == "wrong: must be 1, got 2"
    assert contest.against("right", most(1)).value > 0


def test_ratios_are_of_rounds_and_point_the_right_way():
    contest = Contest("work", lambda: 1, equals_one)
    # Each round is slower than the one before: the ratio of medians says 2, that of rounds 3.
    contest.times = {OWN: Times([1.0, 2.0, 30.0], [1.0] * 3), "peer": Times([3.0, 4.0, 90.0], [5.0] * 3)}
    assert contest.against("peer", least(2)).value == 3 and contest.against("peer", least(2)).reached
    assert (
        contest.against("peer", most(0.4)).value == pytest.approx(1 / 3) and contest.against("peer", most(0.4)).reached
    )
    assert not contest.against("peer", most(0.3)).reached and not contest.against("peer", least(3.1)).reached
    assert contest.against("peer", least(2), clock="processor").value == 5
    assert contest.against("peer", TOLD).reached is None


def test_a_round_takes_everyone_and_prepares_each():
    said: list[str] = []
    calls = {name: lambda name=name: said.append(name) for name in "ab"}
    times = take_turns(calls, 1e-3, before=lambda: said.append("-"))
    assert len(times["a"].wall) == len(times["b"].wall) == len(times["a"].processor) >= 5
    assert said[::2] == ["-"] * (len(said) // 2)
    assert all(set(said[i : i + 4 : 2]) == {"a", "b"} for i in range(1, len(said), 4))
    assert len({tuple(said[i : i + 4 : 2]) for i in range(1, len(said), 4)}) == 2, "in both orders"


@pytest.mark.parametrize("value, goal, reached", [(3, most(3), True), (3.1, most(3), False), (0.9, least(0.9), True)])
def test_goals(value, goal: Goal, reached):
    row = {"row": "r", **Finding("work", "peer", goal, value, 1.0, 1.0).row()}
    assert row["reached"] is reached
    assert ("NOT REACHED" in summary(row)) is not reached
    assert json.loads(json.dumps(row)) == row


def test_a_run_renews_its_rows_alone(tmp_path):
    path = tmp_path / "rows.json"
    results.save([{"row": "hits", "old": 1}, {"row": "gather", "old": 1}], path)
    kept = renewed([{"row": "gather", "old": 0}, {"row": "large", "old": 0}], path, command.NAMES)
    assert [(row["row"], row["old"]) for row in kept] == [("gather", 0), ("hits", 1), ("large", 0)]


def test_results_of_the_store_are_no_results_of_cases(tmp_path, monkeypatch):
    for name in ("store-machine.json", "lookup-machine.json", "crash_lab.json"):
        results.save([{"row": "gather"}], tmp_path / name)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert results.committed() == [] and generate.result_files() == []
    assert [file.name for file in report.files("store")] == ["store-machine.json"]


# --- what rows stand on ---


def fewest_misses(pages: tuple[int, ...], frames: int) -> int:
    """By trying every choice of what gives way."""

    def after(i: int, held: frozenset) -> int:
        if i == len(pages):
            return 0
        if pages[i] in held:
            return after(i + 1, held)
        if len(held) < frames:
            return 1 + after(i + 1, held | {pages[i]})
        return 1 + min(after(i + 1, held - {out} | {pages[i]}) for out in held)

    return after(0, frozenset())


def test_belady_is_the_best_there_is():
    random = np.random.default_rng(0)
    for _ in range(40):
        pages, frames = random.integers(5, size=12), int(random.integers(1, 4))
        best = len(pages) - fewest_misses(tuple(pages.tolist()), frames)
        assert belady(pages, frames) == best >= lru(pages, frames)


def test_lru_by_hand():
    pages = np.array([1, 2, 1, 3, 2, 1])  # 3 takes the place of 2, then 2 that of 1
    assert lru(pages, 2) == 1 and belady(pages, 2) == 2


def test_a_clustered_trace_stays_on_its_topics():
    topics, width = 16, 64
    trace = clustered(topics * width, topics, 4096) // width
    assert trace.min() >= 0 and trace.max() < topics
    assert all(len(set(stay)) == 1 for stay in trace.reshape(-1, 64).tolist())
    assert len(set(trace.tolist())) > topics // 2


def test_a_scattered_trace_follows_the_law_anywhere():
    slots = 1 << 12
    trace = scattered(slots, 1 << 15)
    counts = np.sort(np.bincount(trace, minlength=slots))[::-1]
    assert counts[0] / counts[9] == pytest.approx(10**1.1, rel=0.25)
    hot = np.argsort(np.bincount(trace, minlength=slots))[-64:] // 64
    assert len(set(hot.tolist())) > 32, "the hot slots lie on many pages"


@pytest.mark.parametrize("slots", [1, 1000, 70_001])
def test_a_sparse_store_is_a_whole_one(slots, tmp_path):
    size = 64
    last = (slots - 1) // size
    sparse.make(tmp_path / "sparse", slots, 16, size, real=np.array([last]))
    with MemoryStore.open(tmp_path / "sparse") as store:
        assert len(store) == store.capacity == slots
        assert store.verify() == []
        assert store.gather(torch.tensor([slots - 1])).eq(last).all()
        assert not store.gather(torch.arange(last * size)).any()
        with pytest.raises(IndexError):
            store.gather(torch.tensor([slots]))
    with MemoryStore.open(tmp_path / "sparse", mode="w") as store:
        (new,) = store.append(torch.ones(1, 16), torch.ones(1, 16))
        assert int(new) == slots and len(store) == slots + 1
    with MemoryStore.open(tmp_path / "sparse") as store:
        assert store.gather(new.view(1)).eq(1).all() and store.verify() == []


def test_everyone_overwrites_the_same():
    rows = np.arange(8192 * 4, dtype=np.uint8).reshape(8192, 4)
    first, second = (list(space.overwrites(12, rows)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(itertools.chain(*first), itertools.chain(*second)))
    assert [len(slots) for slots, _ in first] == [100] * 9 + [4096] + [100] * 2


def test_the_large_run_takes_what_fits():
    assert large.slots_that_fit(1 << 40) == 10**8
    assert large.slots_that_fit(14 * 10**9 + 10**8) == 5 * 10**7
    assert large.slots_that_fit(25 * 10**9) == 5 * 10**7
    with pytest.raises(OSError, match="needs 48 MiB free, there are 1"):
        large.slots_that_fit(1 << 20)


def test_the_large_run_at_a_small_size(tmp_path):
    out = tmp_path / "rows.json"
    assert main(["store", "--quick", "--large", "--folder", str(tmp_path), "--out", str(out)]) == 0
    rows = results.load(out)
    assert {row["row"] for row in rows} == {"large"} and all(row["own"] > 0 for row in rows)
