"""``python -m bench lookup``: every promise has a row, no speed for a wrong result, what cannot run says why."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import memkernels as mk
from bench import results
from bench.__main__ import main
from bench.case import OWN
from bench.cases.gather_rows import dequantised, e4m3
from bench.contests import report
from bench.contests.contest import Contest
from bench.contests.finding import Goal, Wrong, least, most
from bench.contests.peers import Lmdb, missing
from bench.contests.turns import Times
from bench.lookup import cold, command, gathers, memory, resident, sharing, slots, tokens, training
from bench.lookup.setting import DTYPE, PIECE, WIDTH, Content, Setting, Table, write
from docs import generate
from memkernels import _native
from memkernels.optim import SparseAdam
from memkernels.store import RowTable, StoreFormat
from memkernels.store._table_host import HostTicket

pytestmark = pytest.mark.skipif(bool(_native.missing()), reason="needs the native library")

# What the lookup memory promises: row, what it is held against, goal. Against "" a number stands alone.
PROMISED = {
    ("gather", "random rows", "at least 0.85x"),
    ("gather", "F.embedding, dequantised", "at least 3x"),
    ("gather", "torch.compile", "at least 1.5x"),
    ("token", "", "at most 3 us"),
    ("token", "", "at most 12 us"),
    ("token", "", "at most 0"),
    ("slots", "NumPy, token by token", "at least 50x"),
    ("slots", "PyTorch, at once", "at least 5x"),
    ("gate", "read bandwidth", "at least 0.850"),
    ("gate", "read bandwidth", "at least 0.750"),
    ("gate", "eager", "at least 3x"),
    ("gate", "torch.compile", "at least 1x"),
    ("direct", "O_DIRECT", "at least 0.9x"),
    ("direct", "memmap, row by row", "at least 3x"),
    ("prefetch", "the steps alone", "at most 0.030"),
    ("shared", "one copy", "at most 1.1x"),
    ("shared", "", "at most 1 s"),
    ("training", "2048 rows", "at most 1.2x"),
}


def ran(folder: Path, out: Path, *words: str) -> tuple[int, list[dict]]:
    """Exit status and rows of a quick run."""
    threads = torch.get_num_threads()
    try:
        how = ["--quick", "--threads", "1", "--folder", str(folder), "--out", str(out)]
        return main(["lookup", *how, *words]), results.load(out)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Exit status and rows of a quick run of everything, and the folder that it was given."""
    folder = tmp_path_factory.mktemp("disk")
    return *ran(folder, tmp_path_factory.mktemp("out") / "rows.json"), folder


def test_every_promise_has_a_row(run):
    status, rows, _ = run
    assert status == 0
    found = {(row["row"], row["peer"], row["goal"]["text"]) for row in rows}
    assert found >= PROMISED, PROMISED - found
    assert list(dict.fromkeys(row["row"] for row in rows)) == list(command.ROWS)
    (peak,) = (row for row in rows if row["row"] == "resident")
    assert 64 << 20 < peak["goal"]["most"] < 65 << 20  # 64 MiB beside the cache, which is small
    shown = [row["what"] for row in rows if row["goal"]["text"] == "at most 0.030"]
    assert len(shown) == 2 and "tier direct" in shown[0] and "tier mmap" in shown[1]


def test_a_row_has_numbers_or_says_why(run):
    for row in run[1]:
        assert row["commit"] and row["torch"] and row["threads"] == 1
        assert row["reached"] is None, "a quick run judges nothing"
        if row["value"] is None:
            assert any(why in row["why"] for why in ("pip install", "O_DIRECT", "does not compile")), row
        else:
            assert not row["why"] and (row["theirs"] is None if not row["peer"] else row["theirs"] > 0)
            assert row["own"] > 0 or row["unit"] == "count"


def test_nothing_is_left(run):
    assert not list(run[2].iterdir())


def test_the_page_has_every_row(run, tmp_path, monkeypatch):
    assert "`python -m bench lookup` writes one" in generate.lookup("") or report.files("lookup")
    for name in ("lookup-machine.json", "store-machine.json"):
        results.save(run[1], tmp_path / name)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert results.committed() == [] and generate.result_files() == []
    page = generate.generated(tmp_path)["lookup"]("")
    assert page.count("\n| ") == len(run[1]) + 2 and "| what | memkernels | against |" in page
    assert all(f"| {row['what']} |" in page for row in run[1])


def test_what_cannot_run_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    status, rows = ran(tmp_path, tmp_path / "rows.json", "--only", "direct")
    assert status == 0 and sum("pip install lmdb" in row["why"] for row in rows) == 1
    opened = RowTable.open

    def refused(path, tier, **options):
        if tier == "direct":
            raise StoreFormat("refuses O_DIRECT")
        return opened(path, tier=tier, **options)

    monkeypatch.setattr(RowTable, "open", refused)
    monkeypatch.setattr(training, "available", lambda: 0)
    status, rows = ran(tmp_path, tmp_path / "rows.json", "--only", "direct", "resident", "prefetch", "training")
    told = {row["row"]: row["why"] for row in rows if row["value"] is None}
    assert status == 0 and set(told) == {"direct", "resident", "prefetch", "training"}
    assert "O_DIRECT" in told["direct"] and "memory" in told["training"]
    assert any("mmap" in row["what"] and row["value"] is not None for row in rows), "the other tier ran"


class SpoiltOperator:
    """gather_rows_out with one number off."""

    def __init__(self) -> None:
        self.right = torch.ops.memkernels_cpu.gather_rows_out.default
        self.default = self

    def __call__(self, values, indices, scale, block, out) -> None:
        self.right(values, indices, scale, block, out)
        out[:1, 3] += 1


def more(rows):
    return rows + (torch.arange(rows.shape[-1]) == 3).to(rows.dtype)


def still(self) -> None:
    """A step that forgets a row."""
    kept = {table: table.data[:].clone() for group in self.param_groups for table in group["params"]}
    step(self)
    for table, before in kept.items():
        row = table.grad.coalesce().indices()[0, -1]
        table.data[row] = before[row]


step = SparseAdam.step

# Row -> what is replaced, and by what.
SPOILT = {
    "gather": lambda: (torch.ops.memkernels_cpu, "gather_rows_out", SpoiltOperator()),
    "token": lambda: (torch.ops.memkernels_cpu, "gather_rows_out", SpoiltOperator()),
    "slots": lambda: (mk, "ngram_slots", lambda *args, found=mk.ngram_slots, **kw: found(*args, **kw).roll(1, -1)),
    "gate": lambda: (
        mk,
        "memory_gate",
        lambda *args, found=mk.memory_gate, backend=None, **kw: (
            found(*args, backend=backend, **kw) * (1 if backend else 1.05)
        ),
    ),
    "direct": lambda: (RowTable, "gather", lambda *args, found=RowTable.gather, **kw: more(found(*args, **kw))),
    "prefetch": lambda: (HostTicket, "wait", lambda self, found=HostTicket.wait: more(found(self))),
    "shared": lambda: (
        sharing.Reader,
        "tell",
        lambda self, word, found=sharing.Reader.tell: found(self, word) | {"right": False},
    ),
    "training": lambda: (SparseAdam, "step", still),
}


def test_every_row_has_a_way_to_be_wrong():
    assert set(SPOILT) == set(command.ROWS) - {"resident"}, "which runs in a process of its own"


@pytest.mark.parametrize("row", SPOILT)
def test_a_wrong_result_has_no_speed(row, monkeypatch, tmp_path):
    monkeypatch.setattr(*SPOILT[row]())
    status, (told,) = ran(tmp_path, tmp_path / "rows.json", "--only", row)
    assert status == 1 and told["value"] is told["own"] is None and told["why"].startswith("wrong")


def test_reads_are_those_of_the_rows(monkeypatch, tmp_path):
    """The same reads on both sides: more of them are wrong, and so are reads of other blocks."""
    stats = RowTable.stats
    with monkeypatch.context() as changed:
        changed.setattr(RowTable, "stats", lambda self: stats(self) | {"bytes_read": stats(self)["bytes_read"] + 4096})
        status, (told,) = ran(tmp_path, tmp_path / "more.json", "--only", "direct")
        assert status == 1 and "the rows took" in told["why"]
    read = _native.host().direct_reads

    def other(path, offsets, sizes, threads):
        seconds, size, mark = read(path, offsets, sizes, threads)
        return seconds, size, mark ^ 1

    monkeypatch.setattr(_native.host(), "direct_reads", other)
    status, rows = ran(tmp_path, tmp_path / "other.json", "--only", "direct")
    assert status == 1 and [row["peer"] for row in rows if row["why"].startswith("wrong")] == ["O_DIRECT"]


def test_a_step_that_changes_another_row_is_wrong(monkeypatch):
    trained = training.Training(256, 48)
    for name in trained.optimizers:
        trained.step(name)
        trained.check(name)

    def stray(self) -> None:
        step(self)
        (table,) = self.param_groups[0]["params"]
        named = set(table.grad.coalesce().indices()[0].tolist())
        table.data[min(set(range(256)) - named), 0] += 1

    monkeypatch.setattr(SparseAdam, "step", stray)
    with pytest.raises(Wrong, match="a row that no token named has changed"):
        trained.check(training.FUSED)


def test_a_process_that_reads_other_rows_is_seen(tmp_path):
    content = Content.of(256)
    at = torch.arange(0, content.count, 7)
    with RowTable.open(write(tmp_path / "table", content), tier="ram", out_dtype=torch.bfloat16) as table:
        assert sharing._done("check", table, content, at, None, 0) == {"right": True}
        table.update(torch.tensor([14]), torch.ones(1, WIDTH))
        assert sharing._done("check", table, content, at, None, 0) == {"right": False}
        table.close(write=False)


def test_a_process_that_gathers_other_rows_is_seen(monkeypatch, tmp_path):
    """Row resident: the process leaves what it gathered last in a file."""
    load = np.load
    monkeypatch.setattr(resident.np, "load", lambda path: _Changed(load(path)))
    status, (told,) = ran(tmp_path, tmp_path / "rows.json", "--only", "resident")
    assert status == 1 and told["value"] is None and told["why"].startswith("wrong")


class _Changed(dict):
    """What a file of NumPy holds, one number off."""

    def __init__(self, found) -> None:
        super().__init__(found)
        self["rows"][-1, 3] += 1

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None: ...


# --- contests ---


def test_findings_of_one_variant_and_of_two():
    contest = Contest("work", lambda: None, lambda found: None)
    contest.times = {
        OWN: Times([1.0, 2.0, 30.0], [0.0] * 3),
        "peer": Times([2.0, 1.0, 20.0], [0.0] * 3),
        "last": Times([4.0, 4.0, 5.0], [0.0] * 3),
    }
    contest.absent["gone"] = "why"
    alone = contest.alone("words", most(2, "s"), "last")
    assert (alone.what, alone.value, alone.own, alone.peer, alone.reached) == ("words", 4.0, 4.0, "", False)
    assert (alone.low, alone.high) == (4.0, 4.5) and contest.alone("words", most(2, "s")).value == 2.0
    beyond = contest.beyond("words", "peer", most(0.5, "share"))
    assert beyond.value == 0.5 and (beyond.own, beyond.theirs) == (2.0, 2.0) and beyond.reached
    assert contest.beyond("words", "peer", most(0.5, "share"), "last").value == 1.0
    between = contest.between("words", "last", "peer", most(2), "another")
    assert between.value == 2.0 and between.peer == "another" and between.theirs == 2.0
    assert contest.between("words", "last", "peer", least(2), "another").value == 0.5
    for found in (
        contest.alone("words", most(2, "s"), "gone"),
        contest.beyond("words", "gone", Goal()),
        contest.between("words", "gone", "peer", Goal(), "another"),
    ):
        assert found.value is None and found.why == "why"


# --- what rows stand on ---


def test_numbers_of_e4m3_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(e4m3(), theirs, equal_nan=True)
    rows = dequantised(codes[[0x38, 0xC0]].view(1, 2), torch.tensor([0.5]), torch.float32)  # 1 and -2
    assert rows.tolist() == [[0.5, -1.0]]


def test_the_table_and_the_file_hold_the_content(tmp_path):
    content = Content.of(PIECE + 64)
    slots_ = torch.tensor([0, 63, PIECE - 1, PIECE, PIECE + 63])
    wanted = content.rows(slots_, torch.float32)
    assert torch.isfinite(wanted).all() and len({tuple(row.tolist()) for row in wanted}) == 5
    table = Table.of(content)
    numbers = table.values[slots_].float() * table.scale[slots_].unsqueeze(1)
    assert table.values.dtype == DTYPE and torch.equal(numbers, wanted)
    with RowTable.open(write(tmp_path / "table", content)) as stored:
        assert not stored.verify() and torch.equal(stored.gather(slots_), wanted)


def test_memory_begins_a_huge_page():
    part = memory.huge(5 << 20)
    assert part.data_ptr() % memory.HUGE == 0 and len(part) == 5 << 20 and not part.any()
    part += 1
    assert 0 <= memory.in_huge_pages(part) <= 1
    assert 1 << 20 < memory.available() < 1 << 50


def test_blocks_that_touch_are_one_read():
    offsets, sizes = cold.ranges(np.array([2, 3, 5, 9, 10, 11]))
    assert offsets.tolist() == [3 * 4096, 6 * 4096, 10 * 4096] and sizes.tolist() == [8192, 4096, 12288]
    offsets, sizes = cold.ranges(np.arange(70))  # 32 blocks of 4 KiB at most
    assert offsets.tolist() == [4096, 33 * 4096, 65 * 4096] and sizes.tolist() == [131072, 131072, 6 * 4096]


def test_a_draw_takes_a_row_of_every_block_once():
    content = Content.of(1600)
    draw = cold.Draw(content, 25)
    taken = []
    for _ in range(4):
        draw.next()
        assert draw.slots.min() >= 0 and draw.slots.max() < 1600 and int(draw.sizes.sum()) == 25 * 4096
        taken += (draw.slots // 16).tolist()
    assert sorted(taken) == list(range(100))


def test_slots_by_hand():
    """x = 5, 6: 5 * 3 = 15 and 6 * 3 ^ 5 * 7 = 49; before the text stands 0."""
    found = slots.exact(
        torch.tensor([1, 0]), torch.tensor([11, 13]), torch.tensor([3, 7]), torch.tensor([6, 5]), [1, 2], 1
    )
    assert found.tolist() == [[15 % 11, 11 + 15 % 13], [18 % 11, 11 + 49 % 13]]
    big = slots.exact(torch.tensor([0]), torch.tensor([7]), torch.tensor([3]), torch.tensor([2**62]), [1], 1)
    assert big.tolist() == [[(3 * 2**62 - 2**64) % 7]]


def test_allocations_are_counted():
    assert tokens.allocations(lambda: (torch.empty(10), torch.empty(10))) == 2
    assert tokens.allocations(lambda: None) == 0


def test_a_probe_of_other_rows_is_wrong(tmp_path):
    setting = Setting(tmp_path, quick=True)
    probe = gathers.Probe(setting, 8)
    at = torch.arange(8) * 5
    probe.check(probe(at))
    with pytest.raises(Wrong):
        probe.check(at + 1)


@pytest.mark.skipif(bool(missing("LMDB")), reason="needs lmdb")
def test_lmdb_is_opened_again(tmp_path):
    rows = np.arange(512, dtype=np.uint8).reshape(2, 256)
    peer = Lmdb(tmp_path / "lmdb", rows)
    peer.close()
    peer.open(tmp_path / "lmdb")
    assert np.array_equal(peer.read(np.array([1, 0])), rows[::-1])
    peer.close()
