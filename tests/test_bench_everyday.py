"""``python -m bench --everyday``: every op has cases and plain forms, no speed for a wrong result, right sums of it."""

from __future__ import annotations

import functools
import json
import math
import time

import pytest
import torch
from promised import SIGNATURES

import memkernels as mk
from bench import results
from bench.__main__ import main
from bench.case import OWN
from bench.everyday import command, grid, inputs, measure, plain, row, summary
from docs import generate
from memkernels import _native
from memkernels.registration import OPS

needs_native = pytest.mark.skipif(bool(_native.missing()), reason="needs the native library")
ROWS = grid.rows()


def find(text: str) -> row.Row:
    """The first row that is named so."""
    return next(one for one in ROWS if text in one.key)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_op_has_cases_and_forms():
    promised = {name for name in SIGNATURES if name in OPS}
    assert set(grid.GRID) == promised == set(plain.FORMS)
    assert {one.op for one in ROWS} == promised


def test_the_grid_is_of_the_promised_extent():
    assert 150 <= len(ROWS) <= 210  # at about two seconds each
    assert len({one.key for one in ROWS}) == len(ROWS)
    assert sum("compile" in one.words for one in ROWS) <= 28  # at about eight seconds each
    for axis, least, most in (("T", 1, 4096), ("N", 16, 1 << 18), ("K", 8, 256)):
        sizes = {one.sizes[axis] for one in ROWS if axis in one.sizes}
        assert (min(sizes), max(sizes)) == (least, most), axis
    assert {one.dtype for one in ROWS} == {"float32", "bfloat16", "int64"}
    stepping = {one.op for one in ROWS if one.step}
    assert stepping == {one.op for one in ROWS if OPS[one.op].differentiable} - {
        "paged_topk_search"
    }  # no one trains it
    used = {word for one in ROWS for word in one.words}
    assert used | {"both"} == set(row.WORDS)  # no word that no case has


def test_every_case_has_a_peer_that_fits():
    for one in ROWS:
        small = one.quick()
        arguments = {**inputs.make(small, 0), **inputs.options(small)}
        assert plain.peers_of(one, arguments, compiled=False), one.key


def test_every_op_that_writes_in_place_has_such_a_case():
    assert {one.op for one in ROWS if one.in_place} == {op for op in grid.GRID if OPS[op].inplace}


@needs_native
def test_a_call_in_place_gets_a_memory_of_its_own():
    one = find("gated_write forward float32 T=16 N=1024 K=V=64 in-place").quick()
    tensors = inputs.make(one, 0)
    before = {name: x.clone() for name, x in tensors.items()}
    truth = measure.Truth(one, tensors, {})
    for _ in range(2):
        assert truth.judge(OWN, mk.gated_write_, tensors)["why"] == ""
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())
    assert "wrong" in truth.judge(OWN, mk.gated_write_, {**tensors, "write": -tensors["write"]})["why"]


def test_a_line_that_means_nothing_is_an_error():
    with pytest.raises(ValueError, match="unknown op 'no_op' in 'T=1'"):
        list(row.parse("no_op", "T=1"))
    with pytest.raises(ValueError, match=r"unknown word 'bfloat61' in address"):
        list(row.parse("address", "T=1 bfloat61"))
    forward, step = row.parse("address", "T=2^3 KV=4 both compile")
    assert (forward.sizes, forward.direction, "compile" in forward.words) == (
        {"T": 8, "K": 4, "V": 4},
        "forward",
        False,
    )
    assert (step.sizes, step.direction, "compile" in step.words) == (forward.sizes, "step", True)


def test_leading_dimensions():
    """Those that the op does not declare; a shared memory lacks all of them, one by head the first."""
    shape = lambda text, name: inputs.make(find(text).quick(), 0)[name].shape  # noqa: E731
    assert shape("B=32 T=1 N=1024 K=64 shared", "keys") == (256, 64)
    assert shape("by-head", "query") == (2, 2, 1, 64) and shape("by-head", "values") == (2, 256, 64)
    values, subkeys = (shape("product_key_read forward float32 H=4", name) for name in ("values", "subkeys"))
    assert (values, subkeys) == ((32 * 32, 256), (2, 2, 32, 64))
    assert shape("memory_gate forward float32 B=4", "hidden") == (16, 2, 64)
    assert shape("merge_reads forward float32 S=2 B=4", "reads") == (2, 2, 2, 16, 64)


def test_calls_rotate_through_tokens_and_memories():
    fresh = inputs.input_sets(find("address forward float32 T=128").quick(), cache=1 << 20)
    assert len({one["keys"].data_ptr() for one in fresh}) == len({one["query"].data_ptr() for one in fresh}) == 8
    assert not torch.equal(fresh[0]["keys"], fresh[1]["keys"])
    cached = inputs.input_sets(find("sparse_read forward float32 T=256 N=4096").quick())
    assert len(cached) == 8 and len({one["values"].data_ptr() for one in cached}) == 1
    assert not torch.equal(cached[0]["indices"], cached[1]["indices"])
    seen = []
    call = measure.rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(5):
        call()
    assert seen == [0, 1, 2, 0, 1]


QUICK = [next(one for one in ROWS if one.op == op) for op in grid.GRID]
QUICK += [next(one for one in ROWS if one.op == op and one.step) for op in ("sparse_write", "memory_scan", "address")]
NAMED = (
    "by-head",
    "bias",
    "erase=0",
    "tokens",
    "float8",
    "mask",
    "slot_write step float32 B",
    "sparse_read forward float32 B",
)
QUICK += [find(text) for text in NAMED]


@needs_native
@pytest.mark.parametrize("one", QUICK, ids=lambda one: one.key)
def test_op_and_forms_are_right(one):
    """Against float64: the op, and every form that fits."""
    found = measure.measure(one, quick=True)
    assert found["why"] == "" and found["ours"] > 0
    assert found["error"] <= found["tolerance"]
    assert found["ratio"] > 0 and found["low"] <= found["ratio"] <= found["high"]
    assert found["best_peer"] == min(
        (name for name, peer in found["peers"].items() if peer["median"] is not None),
        key=lambda name: found["peers"][name]["median"],
    )
    for name, peer in found["peers"].items():
        assert peer["why"] == "" or "at first sight" in peer["why"], name
    json.dumps(found)


@pytest.mark.parametrize(("pause", "wins"), [(0.0, True), (5e-3, False)])
def test_the_ratio_is_above_one_where_the_op_wins(pause, wins):
    def own(**arguments):
        time.sleep(pause)
        return mk.address(**arguments, backend="reference")

    def slow(query, keys):
        time.sleep(2.5e-3)
        return mk.address(query, keys, backend="reference")

    one = find("address forward float32 T=128").quick()
    found = {"peers": {"slow": {"why": ""}}}
    tensors = inputs.make(one, 0)
    calls = {OWN: functools.partial(own, **tensors), "slow": functools.partial(slow, **tensors)}
    measure._timed(found, calls, 0.01)
    assert found["best_peer"] == "slow" and (found["ratio"] > 1) == wins
    assert found["ours"] >= pause and found["peers"]["slow"]["median"] >= 2.5e-3


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda weights: weights * 1.01, id="scaled"),
        pytest.param(lambda weights: torch.where(torch.arange(weights.shape[-1]) == 5, torch.nan, weights), id="nan"),
        pytest.param(lambda weights: weights[..., :-1], id="shape"),
        pytest.param(lambda weights: weights + 1e-7 * torch.rand(()), id="not deterministic"),
        pytest.param(lambda weights: (_ for _ in ()).throw(RuntimeError("no such kernel")), id="raises"),
    ],
)
def test_a_wrong_result_has_no_speed(spoil):
    own = {OWN: lambda **arguments: spoil(mk.address(**arguments, backend="reference"))}
    found = measure.measure(find("address forward float32 T=128"), quick=True, extra=own)
    assert found["why"] and found["ours"] is found["ratio"] is found["low"] is found["best_peer"] is None
    assert all(peer["median"] is None for peer in found["peers"].values())  # no peer is timed either
    assert summary.line(found).endswith(found["why"])


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_gradient_has_no_speed(which):
    """Right numbers, and one gradient a hundredth too large."""

    def own(query, keys):
        more = [x + 0.01 * (x - x.detach()) if i == which else x for i, x in enumerate((query, keys))]
        return mk.address(*more, backend="reference")

    found = measure.measure(find("address step float32 T=128"), quick=True, extra={OWN: own})
    assert found["why"].startswith("wrong: error") and found["ratio"] is None


def test_a_wrong_peer_has_no_speed_and_is_not_the_best():
    more = {
        OWN: lambda **arguments: mk.address(**arguments, backend="reference"),
        "swift": lambda query, keys: torch.zeros(query.shape[-2], keys.shape[-2]),
    }
    found = measure.measure(find("address forward float32 T=128"), quick=True, extra=more)
    assert found["peers"]["swift"]["median"] is None and "wrong" in found["peers"]["swift"]["why"]
    assert found["best_peer"] == "eager" and found["ours"] > 0


@pytest.mark.parametrize("text", ["sparse_write forward float32 T=16", "sparse_write forward float32 B=32"])
def test_the_check_of_sparse_writes_sees_order_and_strays(text):
    tensors = inputs.make(find(text).quick(), 0)
    tensors["indices"][..., 0] = 3  # the order of tokens decides what slot 3 holds
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    right = mk.sparse_write(**doubles)
    assert measure.sparse_written(tensors, None, [right]) < 1e-12
    stray = right.clone()
    stray[..., 7, 2] += 1
    assert measure.sparse_written(tensors, None, [stray]) > 1e-3
    backwards = mk.sparse_write(**{name: x if name == "values" else x.flip(-2) for name, x in doubles.items()})
    assert tensors["write"].shape[-2] == 1 or measure.sparse_written(tensors, None, [backwards]) > 1e-3


def test_peers_far_behind_are_not_timed(monkeypatch):
    seconds = {"fast": 1e-3, "near": 2.9e-3, "far": 4e-3}
    monkeypatch.setattr(measure, "_seconds", lambda call: seconds[call])
    calls, entries = {name: name for name in (OWN, *seconds)}, {name: {"why": ""} for name in seconds}
    measure.with_chances(calls, entries)
    assert list(calls) == [OWN, "fast", "near"]
    assert entries["far"]["why"] == "took 4 times as long as fast at first sight"
    assert entries["near"]["why"] == ""


def entry(op: str, ratio: float | None, why: str = "", direction: str = "forward") -> dict:
    """A row of a result file."""
    median = None if ratio is None else 1e-5 * ratio
    about = {
        "key": f"{op} {direction} float32 T=1",
        "op": op,
        "case": "T=1",
        "direction": direction,
        "dtype": "float32",
    }
    times = {"ours": None if why else 1e-5, "ratio": ratio, "low": ratio, "high": ratio, "samples": 5, "why": why}
    peers = {"best_peer": None if ratio is None else "eager", "peers": {"eager": {"median": median, "why": ""}}}
    return about | times | peers | results.environment("cpu", 2)


def test_summary_arithmetic():
    rows = [entry("a", 4.0), entry("b", 0.5), entry("c", 0.94), entry("d", 0.95), entry("e", None, "wrong: error 1")]
    found = summary.Summary.of(rows)
    assert (found.cases, found.compared, [one["op"] for one in found.wrong]) == (5, 4, ["e"])
    assert math.isclose(found.mean, (4.0 * 0.5 * 0.94 * 0.95) ** (1 / 4))
    assert [one["op"] for one in found.losses] == ["b", "c"] and found.worst["op"] == "b"
    assert found.line() == (
        "4 of 5 cases compared, 1 without a right result: geometric mean 1.16x, 2 losses (below 0.95x), worst 0.50x."
    )
    nothing = summary.Summary.of([entry("e", None, "wrong: error 1")])
    assert nothing.mean is nothing.worst is None and nothing.losses == []


def test_the_page_shows_every_loss():
    page = summary.page([entry("address", 2.0), entry("address", 0.5, direction="step"), entry("topk_read", 0.8)])
    assert "geometric mean 0.93x, 2 losses" in page
    assert "| address | 2 | 1.00x | 1 | 0.50x | T=1, step; eager |" in page
    lost = page.partition("| op | case | time |")[2]
    assert "| address | T=1, step | 10 us | eager | 0.50x |" in lost and "| topk_read | T=1 |" in lost
    assert lost.index("address") < lost.index("topk_read")  # the worst first


def test_only_and_losses_choose():
    assert {one.op for one in command.chosen(["topk_read"])} == {"topk_read"}
    assert [one.key for one in command.chosen(["gated_write forward float32 T=1 N=4096"])]
    with pytest.raises(ValueError, match="no case is named by 'softmax_raed'"):
        command.chosen(["softmax_raed"])
    keys = [one.key for one in ROWS[:4]]
    earlier = [{"key": k, "ratio": r, "why": w} for k, r, w in zip(keys, (0.5, 1.2, None, 0.97), ("", "", "wrong", ""))]
    assert [one.key for one in command.chosen([], earlier)] == [keys[0], keys[2]]
    assert [one.key for one in command.chosen([], earlier, below=1.3)] == keys
    assert command.chosen(["topk_read"], earlier) == []


@needs_native
def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    path = tmp_path / "out.json"
    how = ["--everyday", "--quick", "--threads", "1"]
    assert main([*how, "--only", "slot_usage", "--out", str(path)]) == 0
    rows = results.load(path)
    assert [one["op"] for one in rows] == ["slot_usage"] * 3
    assert all(set(results.ENVIRONMENT) < set(one) for one in rows)
    assert "3 of 3 cases compared: geometric mean" in capsys.readouterr().out
    for one, full, ratio in zip(rows, command.chosen(["slot_usage"]), (2.0, 0.5, 2.0)):
        one |= {"key": full.key, "ratio": ratio}  # as a run at full size names them
    results.save(rows, path)
    assert main([*how, "--losses", str(path)]) == 0
    assert "before 0.50x" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]  # a part of the grid, or a quick run, writes no file by itself
    with pytest.raises(SystemExit):
        main([*how, "--only", "nothing"])


def test_the_docs_read_the_result_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert generate.everyday("").startswith("No result file is committed yet. `python -m bench --everyday` writes one")
    results.save([entry("address", 0.5)], tmp_path / "everyday-cpu-machine-2t.json")
    assert "| address | T=1 | 10 us | eager | 0.50x |" in generate.everyday("")
    assert results.committed() == [] and generate.result_files() == []  # it is no file of cases with goals
