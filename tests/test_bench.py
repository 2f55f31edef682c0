"""The benchmark: no time for a wrong result, complete rows, a report from a file, and a case for every goal."""

from __future__ import annotations

import json
import types

import pytest
import torch

import memkernels as mk
from bench import results, text
from bench.__main__ import main
from bench.case import OWN, Goal, copy_bandwidth, ratio, size_text
from bench.cases import all_cases, select
from bench.cases.sparse_read import check_gradient
from bench.check import Exact
from bench.harness import Settings, run_case
from bench.timers import LEAST_SAMPLES, Spread, interleave
from bench.variants import d_output, prepare
from bench.variants import results as results_of

QUICK = Settings("cpu", 1, quick=True)

# Every row of the CPU goals: op, direction, dtype, case, and what the goals are held against.
GOALS = {
    **{
        ("softmax_read", "forward", "float32", f"T={t} N={n} K=V={d}"): "peak SDPA+eager"
        for t, n in ((512, 1024), (2048, 8192))
        for d in (64, 128)
    },
    ("softmax_read", "forward", "float32", "T=1 N=2^20 K=V=128"): "bandwidth SDPA+eager",
    ("softmax_read", "forward", "float32", "T=8 N=2^20 K=V=128"): "bandwidth SDPA+eager",
    ("softmax_read", "forward", "bfloat16", "T=1024 N=4096 K=V=128"): "peak SDPA+eager",
    ("softmax_read", "forward", "bfloat16", "T=1 N=2^20 K=V=128"): "bandwidth SDPA+eager",
    ("softmax_read", "backward", "float32", "T=1024 N=4096 K=V=128"): "peak SDPA+eager",
    ("softmax_read", "backward", "float32", "T=1024 N=4096 K=V=64"): "peak SDPA+eager",
    ("softmax_read", "backward", "bfloat16", "T=1024 N=4096 K=V=128"): "peak SDPA+eager",
    ("softmax_read", "backward", "float32", "T=1 N=2^19 K=V=128"): "SDPA",
    ("softmax_read", "backward", "float32", "T=8 N=2^19 K=V=128"): "SDPA",
    ("softmax_read", "forward", "float32", "call overhead, inference, T=1 N=16 K=V=16"): "SDPA",
    ("softmax_read", "forward", "float32", "call overhead, autograd, T=1 N=16 K=V=16"): "SDPA",
    ("gated_write", "forward", "float32", "T=512 N=4096 K=V=64"): "eager",
    ("gated_write", "forward", "float32", "T=2048 N=1024 K=V=64"): "eager",
    ("gated_write", "backward", "float32", "T=512 N=4096 K=V=64"): "eager",
    ("gated_write", "backward", "float32", "T=2048 N=1024 K=V=64"): "eager",
    ("softmax_write", "backward", "float32", "T=512 N=4096 K=V=64"): "eager",
    ("slot_write", "forward", "float32", "erase and add, T=512 N=1024 V=64"): "loop",
    ("softmax_read_compressed", "forward", "float32", "T=1 N=2^20 K=V=128"): "float32 slots",
    ("paged_topk_search", "forward", "float32", "T=1 F=1024 S=1024 K=64"): "eager",
    ("paged_topk_search", "forward", "float32", "T=256 F=256 S=1024 K=64"): "eager",
    ("ngram_slots", "forward", "int64", "T=4096 M=16"): "loop eager",
    ("ngram_slots", "forward", "int64", "T=4096 M=24"): "loop eager",
    (*("gather_rows", "forward", "bfloat16"), "float8_e4m3fn to bfloat16, T=8192 N=2^22 V=256"): "eager torch.compile",
    **{
        ("memory_gate", direction, dtype, f"T={tokens * 4 // size} B={b} D={d}"): "bandwidth eager torch.compile"
        for direction in ("forward", "backward")
        for b, d, tokens in ((1, 1024, 5120), (4, 2560, 512))
        for dtype, size in (("float32", 4), ("bfloat16", 2))
    },
    ("product_key_search", "forward", "float32", "T=1024 n=512 K=128"): "eager",
    ("additive_read", "forward", "float32", "B=4 T=128 N=512 K=V=128"): "eager",
    ("additive_read", "backward", "float32", "B=4 T=128 N=512 K=V=128"): "eager",
    ("cache_nll", "forward", "float32", "T=256 W=32000 N=256"): "eager",
    ("cache_nll", "backward", "float32", "T=256 W=32000 N=256"): "eager",
    ("topk_read", "forward", "float32", "T=16 N=2^20 K=V=64"): "peak eager+faiss",
    ("topk_read", "forward", "float32", "T=256 N=2^18 K=V=64"): "peak eager+faiss",
    ("topk_read", "forward", "float32", "T=1024 N=65536 K=V=128"): "peak eager+faiss",
    ("topk_read", "forward", "float32", "T=1 N=2^20 K=V=64"): "bandwidth eager+faiss",
    ("sparse_read", "forward", "float32", "T=4096 N=2^20 V=256"): "bandwidth embedding_bag",
    ("sparse_read", "backward", "float32", "T=4096 N=2^20 V=256"): "embedding_bag",
    ("gated_scan", "forward", "float32", "B=8 T=2048 D=512"): "bandwidth",
    ("cell_scan", "forward", "float32", "B=1 T=256 D=256"): "loop",
    ("memory_scan", "forward", "float32", "T=2048 N=64 K=V=64"): "loop eager",
    ("memory_scan", "forward", "float32", "T=2048 N=256 K=V=64"): "loop eager",
    ("memory_scan", "backward", "float32", "T=512 N=128 K=V=64"): "eager",
    **{
        (op, direction, "float32", "peak extra memory, T=8192 N=8192 K=V=64"): "memory"
        for op in ("softmax_read", "gated_write", "topk_search", "topk_read", "slot_usage", "sparse_read")
        for direction in ("forward", "backward")
    },
}


def identity(case):
    return case.op, case.direction, case.dtype, case.title(case.sizes)


def find(op, direction="forward"):
    return next(c for c in all_cases() if (c.op, c.direction, c.measure) == (op, direction, "time"))


def reference(op, spoil=lambda result: result):
    """A variant that computes the formula in plain PyTorch, and then spoils it."""
    return lambda **kw: lambda: spoil(getattr(mk, op)(**kw, backend="reference"))


class FlatCeilings:
    """Ceilings that need no measurement."""

    peaks = {"float32": 1e11, "bfloat16": 2e11, "float64": 5e10}
    bandwidth = 1e10
    fast_bfloat16 = True


@pytest.fixture(scope="module")
def small_rows():
    """Two rows of the reference instead of the kernels, on which they then do not depend: one right, one wrong."""
    case = find("softmax_read")
    where = results.environment("cpu", torch.get_num_threads())
    variants = ({OWN: reference("softmax_read")}, {OWN: reference("softmax_read", lambda read: read * 1.01)})
    rows = [run_case(case, QUICK, extra=v) for v in variants]
    return [json.loads(json.dumps(results.complete(row, case, FlatCeilings(), where))) for row in rows]


def held(device):
    """What the goals of every case that has any are held against."""
    named = lambda goal: "+".join(goal.peers) or goal.kind  # noqa: E731
    return {identity(case): " ".join(map(named, case.goals)) for case in all_cases(device) if case.goals}


def test_every_goal_has_a_case():
    assert held("cpu") == GOALS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_distinct_and_quick_ones_are_small(device):
    cases = all_cases(device)
    assert len({identity(case) for case in cases}) == len(cases)
    for case in cases:
        assert sum(t.nbytes for t in case.make(case.quick, case.torch_dtype, "cpu", seed=0).values()) <= 256 << 20


def test_select_names_the_unknown_op():
    assert {case.op for case in select(["topk_read"])} == {"topk_read"}
    with pytest.raises(ValueError, match="no case of 'softmax_raed' on cpu"):
        select(["softmax_raed"])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda read: read * 1.01, id="scaled"),
        pytest.param(lambda read: torch.where(torch.arange(read.shape[-1]) == 5, torch.nan, read), id="nan"),
        pytest.param(lambda read: read[..., :-1, :], id="shape"),
        pytest.param(lambda read: read + 1e-7 * torch.rand(()), id="not deterministic"),
    ],
)
def test_a_wrong_result_has_no_speed(spoil):
    row = run_case(find("softmax_read"), QUICK, extra={OWN: reference("softmax_read", spoil)})
    assert row["median"] is None and row["low"] is None and row["high"] is None
    assert "error" in row["why"] or "other bits" in row["why"]
    assert all(peer["median"] is None for peer in row["peers"].values())  # no peer is timed either


def test_a_wrong_peer_has_no_speed_and_is_not_the_best():
    wrong = reference("softmax_read", lambda read: read.zero_())
    row = run_case(find("softmax_read"), QUICK, extra={OWN: reference("softmax_read"), "swift": wrong})
    assert row["median"] > 0
    assert row["peers"]["swift"]["median"] is None and "wrong" in row["peers"]["swift"]["why"]
    assert results.complete(row, find("softmax_read"), FlatCeilings(), {})["best_peer"] in ("eager", "SDPA")


@pytest.mark.parametrize("argument", ["values", "keys", "query", "write"])
def test_a_wrong_gradient_is_found(argument):
    case = find("gated_write", "backward")
    inputs = case.make({"T": 5, "N": 12, "K": 8, "V": 8}, torch.float32, "cpu", seed=0)
    d_out = d_output(case, inputs)
    exact = Exact(case, inputs, d_out)
    got = results_of(case, prepare(case, reference("gated_write"), inputs, d_out))
    assert exact.error(got) <= exact.limit()
    got[case.grads.index(argument)][1] *= 1.01
    assert exact.error(got) > exact.limit()


def test_sparse_gradient_check_sees_strays_and_lost_duplicates():
    case = find("sparse_read", "backward")
    inputs = case.make({"T": 64, "N": 10000, "V": 8}, torch.float32, "cpu", seed=0)
    inputs["indices"][:, 0] = 3
    d_out = d_output(case, inputs)
    d_values, d_weights = results_of(case, prepare(case, reference("sparse_read"), inputs, d_out))
    assert check_gradient(inputs, d_out, (d_values, d_weights)) < 1e-5
    untouched = int((torch.bincount(inputs["indices"].flatten(), minlength=10000) == 0).nonzero()[0])
    stray, lost = d_values.clone(), d_values.clone()
    stray[untouched, 0] = 1.0
    lost[int(inputs["indices"].min())] *= 0.5
    assert check_gradient(inputs, d_out, (stray, d_weights)) > 1e-3
    assert check_gradient(inputs, d_out, (lost, d_weights)) > 1e-3
    assert check_gradient(inputs, d_out, (d_values, d_weights * 1.01)) > 1e-3


def test_rows_carry_every_field(small_rows):
    for row in small_rows:
        assert set(row) == set(results.FIELDS)
    right, wrong = small_rows
    assert 0 < right["low"] <= right["median"] <= right["high"]
    assert right["ratio"] == right["peers"][right["best_peer"]]["median"] / right["median"]
    assert right["peak_share"] == pytest.approx(right["flops"] / right["median"] / 1e11)
    assert wrong["median"] is None and wrong["ratio"] is None and wrong["peak_share"] is None


def test_goals_are_judged_at_full_size_only():
    case = find("softmax_read")
    row = {"sizes": dict(case.sizes), "unit": "s", "median": 1e-3, "flops": 95_000_000, "bytes": 1}
    row |= {"dtype": "float32", "peers": {"SDPA": {"median": 1.5e-3}, "eager": {"median": 3e-3}}}
    full = results.complete(row, case, FlatCeilings(), {})
    assert [goal["reached"] for goal in full["goals"]] == [True, True] and full["reached"] is True
    slow = results.complete({**row, "median": 2e-3}, case, FlatCeilings(), {})
    assert [goal["reached"] for goal in slow["goals"]] == [False, False] and slow["reached"] is False
    quick = results.complete({**row, "sizes": {**case.sizes, "T": 1}}, case, FlatCeilings(), {})
    assert quick["reached"] is None


def test_a_goal_beyond_the_ceiling_is_called_that():
    case = find("softmax_write", "backward")
    row = {"sizes": dict(case.sizes), "unit": "s", "median": 1e-3, "flops": 85_000_000, "bytes": 1, "dtype": "float32"}

    def beyond(eager: float, **other) -> list[str]:
        return text.beyond(
            results.complete({**row, "peers": {"eager": {"median": eager}}, **other}, case, FlatCeilings(), {})
        )

    assert beyond(1.5e-3) == ["3x eager would be 170% of the ceiling"]  # eager itself: 57%
    assert beyond(2.8e-3) == []  # 91%: no kernel was good enough, but one could be
    assert beyond(4e-3) == []  # reached
    assert beyond(1.5e-3, flops=160_000_000) == []  # the kernel skips work


def test_wrong_rows_show_the_reason_instead_of_a_time(small_rows):
    line = text.columns(small_rows[1])
    assert line[text.HEADER.index("median")].startswith("wrong: error")
    assert line[text.HEADER.index("ratio")] == line[text.HEADER.index("quartiles")] == ""


def test_report_from_a_small_file(small_rows, tmp_path, capsys):
    from bench.report import main as report

    results.save(small_rows, tmp_path / "small.json")
    report([str(tmp_path / "small.json"), "--docs", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| softmax_read | T=512 N=1024 K=V=128 |" in printed and "wrong: error" in printed
    assert (tmp_path / "performance-small.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_is_by_ratio_to_the_peer_of_the_earlier_run(small_rows):
    before = small_rows[0]
    machine_half_as_fast = json.loads(json.dumps(before))
    machine_half_as_fast["median"] *= 2
    for peer in machine_half_as_fast["peers"].values():
        peer["median"] *= 2
    [(_, old, new)] = results.compare([machine_half_as_fast], [before])
    assert new == pytest.approx(old)
    [(_, old, new)] = results.compare([{**before, "median": 2 * before["median"]}], [before])
    assert new == pytest.approx(old / 2) and new < results.GUARD * old
    assert results.compare([{**before, "threads": 64}], [before]) == []


def test_command_line(tmp_path, capsys):
    path = tmp_path / "out.json"
    status = main(["slot_usage", "--quick", "--threads", str(torch.get_num_threads()), "--out", str(path)])
    rows = results.load(path)
    assert {row["op"] for row in rows} == {"slot_usage"} and all(set(row) == set(results.FIELDS) for row in rows)
    assert status == int(any(row["why"] and row["backend"] for row in rows))
    assert "read bandwidth" in capsys.readouterr().out


def test_interleaving_rotates_inputs_and_takes_every_variant():
    seen = {"a": [], "b": []}
    calls = {name: [lambda n=name, i=i: seen[n].append(i) for i in range(3)] for name in seen}
    spreads = interleave(calls, "cpu", seconds=0.01)
    assert set(spreads) == {"a", "b"}
    for name in seen:
        assert spreads[name].samples >= LEAST_SAMPLES
        assert seen[name][:6] == [0, 1, 2, 0, 1, 2]  # consecutive calls use different inputs


def test_a_ratio_is_to_the_best_named_peer_that_runs():
    case = types.SimpleNamespace(dtype="float32", sizes={"T": 1}, goals=(ratio(2, "flash", "cuDNN", "flex"),))
    row = {"sizes": {"T": 1}, "unit": "s", "median": 1e-3, "flops": 1, "bytes": 1, "dtype": "float32"}
    refused = {"median": None, "why": "No available kernel."}

    def judged(**peers):
        return results.complete({**row, "peers": peers}, case, FlatCeilings(), {})

    both = judged(flash=refused, cuDNN={"median": 3e-3}, flex={"median": 2.5e-3}, eager={"median": 1e-3})
    assert both["goals"][0]["value"] == pytest.approx(2.5) and both["reached"] is True
    assert both["goals"][0]["why"] == "without flash"
    assert judged(cuDNN={"median": 1.5e-3}, flex={"median": 9e-3})["reached"] is False
    nobody = judged(flash=refused, eager={"median": 1e-3})
    assert nobody["goals"][0]["reached"] is None and nobody["reached"] is None
    assert nobody["goals"][0]["why"] == "not judged, no peer ran: flash (No available kernel.), cuDNN, flex"
    assert "(not judged, no peer ran: flash" in text.goal_words(nobody["goals"][0])
    wrong = results.complete({**row, "median": None, "peers": {"flash": refused}}, case, FlatCeilings(), {})
    assert wrong["reached"] is False  # our op has no time, although a peer ran


def test_words():
    assert size_text({"T": 1, "N": 1 << 20, "K": 64, "V": 64}) == "T=1 N=2^20 K=V=64"
    assert size_text({"T": 4096, "N": 1 << 20, "V": 256}) == "T=4096 N=2^20 V=256"
    assert Spread.of([3.0, 1.0, 2.0]).median == 2.0
    assert Goal("ratio", 0.25, ("SDPA",)).text() == "at most 4x the time of SDPA"
    assert ratio(6, "eager", "faiss").text() == "6x eager and faiss"
    assert ratio(2, "a", "b", "c").text() == "2x the best of a, b, c"
    assert copy_bandwidth(0.85).text() == "85% of copy bandwidth"
    assert text.seconds(1.5e-5) == "15 us" and text.size(3 << 20) == "3 MiB"
