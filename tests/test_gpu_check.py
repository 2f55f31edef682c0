"""``python -m bench.gpu_check`` on a CPU: the same program over the same rows, with faults seeded into its workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT

from bench import cases, gpu_check, results
from bench.gpu import telling
from bench.gpu.jobs import GIVE_UP
from bench.gpu.plan import case_key
from bench.gpu.rows import Rows, key
from docs import generate
from memkernels.registration import OPS
from memkernels.spec import FLOATS
from memkernels.testing import cases as cases_of
from memkernels.testing.inputs import takes

# Every test run has the first run of the program; `make cuda` has the others, because each takes long.
whole = pytest.mark.skipif(
    os.environ.get("MEMKERNELS_CUDA") != "1", reason="make cuda runs the check on a GPU in all ways"
)
OP = "slot_write"  # its rows and speed cases are fast
# On the path of every process, but active in workers only. FAULTS: (case, dtype, direction) -> what the row does.
SEEDED = """
import json, os, sys, time

faults = {tuple(row): fault for row, fault in json.loads(os.environ["FAULTS"])}
if sys.argv[:1] == ["setup.py"] or "setup.py" in sys.orig_argv:
    raise SystemExit("kernel.cu(7): error: expected a ;")
if {"contract", "plan"} & set(sys.orig_argv):
    from memkernels import backends
    from memkernels.testing import grid

    print("noise of a library")
    backends._kernels -= {tuple(kernel) for kernel in json.loads(os.environ.get("GONE", "[]"))}
    judge, call, state = grid.Subject._judge, grid._call, {"poisoned": False, "factor": 1.0}

    def seeded(self, backend, direction, *rest):
        fault = faults.get((self.case.name, str(self.dtype)[6:], direction))
        if fault == "abort":
            os.abort()
        if fault == "hang":
            time.sleep(1000)
        if fault == "raise":
            raise ValueError("out of luck")
        state["poisoned"] |= fault == "poison"
        if state["poisoned"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        state["factor"] = 1.1 if fault == "wrong" else 1.0
        return judge(self, backend, direction, *rest)

    def spoiled(*arguments):
        return [state["factor"] * r for r in grid.spec.several(call(*arguments))]

    grid.Subject._judge, grid._call = seeded, spoiled
"""


def start(out: Path, *options: str, faults: dict | None = None, op: str = OP, **environment: str) -> subprocess.Popen:
    if faults is not None:
        seeded = out.parent / "seeded"
        seeded.mkdir(exist_ok=True)
        (seeded / "sitecustomize.py").write_text(SEEDED)
        path = os.pathsep.join([str(seeded), str(ROOT)])
        environment = {"PYTHONPATH": path, "FAULTS": json.dumps(list(faults.items())), **environment}
    command = [sys.executable, "-m", "bench.gpu_check", "--device", "cpu", "--op", op, "--out", str(out), *options]
    environment = {**os.environ, **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check(out: Path, *options: str, **more) -> tuple[int, str]:
    """Exit status and what was printed."""
    process = start(out, *options, **more)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def where(row: dict) -> tuple[str, str, str]:
    return row["case"], row["dtype"], row["direction"]


FAULTS = {
    ("erase tensor, token mask", "float32", "forward"): "poison",
    ("several panels of tokens", "bfloat16", "backward"): "abort",
    ("NaN in one token", "float32", "forward"): "raise",
    ("transposed", "float32", "backward"): "wrong",
    ("no tokens", "float32", "in place"): "hang",
}
REASONS = {
    "poison": "RuntimeError: CUDA error: an illegal memory access was encountered",
    "abort": "the process died of SIGABRT",
    "raise": "ValueError: out of luck",
    "wrong": "gradient of write: error",
    "hang": "no result after 5 s",
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A run with a fault of each kind: folder, exit status, output."""
    out = tmp_path_factory.mktemp("check") / "out"
    return out, *check(out, "--stage", "smoke", "--stage", "speed", "--row-seconds", "5", faults=FAULTS)


def test_a_fault_spoils_its_own_row_alone(spoiled):
    out, status, printed = spoiled
    found = rows(out)
    assert status == 1
    assert len({key(row) for row in found}) == len(found), "a line for each row"
    assert {where(row) for row in found if row["status"] == "failed"} == set(FAULTS), printed
    for row in found:
        if (fault := FAULTS.get(where(row))) is not None:
            assert row["message"].startswith(REASONS[fault])
            assert row["message"] in printed
    assert {where(row)[:2] for row in found} == {(case, dtype) for _, case, dtype in telling.rounds([OPS[OP]])[0]}
    for row in found:
        assert all((row["case"], row["dtype"], d) in {where(r) for r in found} for d in row["directions"])


def test_what_is_wrong_is_not_timed(spoiled):
    out, _, printed = spoiled
    assert f"speed: {OP} on cpu" in printed and "not timed, as rows of its smoke failed" in printed
    assert not [row for row in rows(out) if row["stage"] == "speed"]


def test_the_summary_counts_the_rows(spoiled):
    out, _, printed = spoiled
    found, summary = rows(out), json.loads((out / "summary.json").read_text())
    failed = len(FAULTS)
    assert summary["counts"] == {"passed": len(found) - failed, "failed": failed, "gap": 0}
    assert summary["cases"]["smoke"] == [len({where(row)[:2] for row in found})] * 2 and summary["status"] == 1
    assert summary["environment"]["torch"] == torch.__version__ and summary["environment"]["commit"]
    last = printed.splitlines()[-1]
    assert last.startswith(f"gpu-check on cpu: {len(found) - failed} rows passed, {failed} failed, 0 gaps")
    assert str(out / summary["rows"]) in last


@whole
def test_resume_does_the_rest_alone(spoiled):
    """The failed rows and one more are removed, and the file ends within a line, as after a power cut."""
    out, *_ = spoiled
    before = [line for line in (out / "rows.jsonl").read_text().splitlines() if '"failed"' not in line]
    kept, torn = before[:-1], before[-1][:40]
    folder = out.parent / "resumed"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join([*kept, torn]))
    status, printed = check(folder, "--resume", "--stage", "smoke", "--stage", "speed")
    assert status == 0, printed
    text = (folder / "rows.jsonl").read_text()
    assert text.startswith("\n".join([*kept, torn]) + "\n"), "rows that were there are left alone"
    new = [json.loads(line) for line in text.splitlines()[len(kept) + 1 :]]
    missing = {*FAULTS, where(json.loads(before[-1]))}
    assert {where(row) for row in new if row["stage"] == "smoke"} == missing
    timed = [row for row in new if row["stage"] == "speed"]
    assert timed and all(row["speed"]["median"] > 0 and row["backend"] == "cpu" for row in timed)
    assert "quartiles" in printed and f"{len(timed)} timed" in printed.splitlines()[-1]
    assert check(folder, "--stage", "smoke")[0] == 2, "without --resume earlier rows are not touched"
    assert (folder / "rows.jsonl").read_text() == text


def test_a_gap_is_a_gap(tmp_path):
    gone = json.dumps([["memkernels_cpu::slot_write_backward", "cpu"]])
    status, printed = check(tmp_path / "out", "--stage", "smoke", faults={}, GONE=gone)
    found = rows(tmp_path / "out")
    assert status == 0, printed
    gaps = [row for row in found if row["status"] == "gap"]
    assert {row["dtype"] for row in gaps} == {str(dtype)[6:] for dtype in FLOATS}
    assert {row["message"] for row in gaps} == {"slot_write: backend 'cpu' has no backward kernel on cpu"}
    assert {row["direction"] for row in found if row["status"] == "passed"} == {"forward", "in place"}
    assert "gap: backend 'cpu' has no backward kernel on cpu (4 rows)" in printed


@whole
def test_processes_that_die_again_and_again_are_given_up(tmp_path):
    directions = ("forward", "backward", "in place")
    every = {(case, dtype, d): "poison" for _, case, dtype in telling.rounds([OPS[OP]])[0] for d in directions}
    status, printed = check(tmp_path / "out", "--stage", "smoke", faults=every)
    *failed, last = rows(tmp_path / "out")
    assert status == 1 and len(failed) == GIVE_UP, printed
    assert last["case"] == "the rest" and "not run" in last["message"]


@whole
def test_time_that_is_over_is_no_failure(tmp_path):
    """The first row hangs: the budget ends the run, finished rows are summed up, and that row is not marked done."""
    first = next(iter(FAULTS))
    begun = time.monotonic()
    status, printed = check(tmp_path / "out", "--stage", "smoke", "--minutes", "0.1", faults={first: "hang"})
    assert time.monotonic() - begun < 60
    assert status == 0, printed
    assert rows(tmp_path / "out") == [] and json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == 0


@whole
def test_a_signal_ends_it_with_a_summary(tmp_path):
    hangs = ("several panels of tokens", "bfloat16", "forward")
    process = start(tmp_path / "out", "--stage", "smoke", faults={hangs: "hang"})
    written = tmp_path / "out" / "rows.jsonl"
    deadline = time.monotonic() + 120
    while not (written.exists() and len(written.read_text().splitlines()) == 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert [where(row)[0] for row in rows(tmp_path / "out")] == ["erase tensor, token mask"] * 3
    assert "3 rows passed, 0 failed" in printed.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["counts"]["passed"] == 3


@whole
def test_a_failing_build_is_a_row(tmp_path):
    status, printed = check(tmp_path / "out", "--stage", "build", "--stage", "smoke", faults={})
    found = rows(tmp_path / "out")
    assert status == 1
    failed = [row for row in found if row["status"] == "failed"]
    assert [row["case"] for row in failed] == ["native libraries"]
    assert "kernel.cu(7): error: expected a ;" in failed[0]["message"]
    assert "instruction sets" in printed, "info is printed"
    assert {row["op"] for row in found if row["stage"] == "smoke"} == {OP}


SANITIZER = f"""#!/bin/sh
log=$(echo "$*" | sed 's/.*--log-file \\([^ ]*\\) .*/\\1/' | sed "s/%p/$$/")
tool=$2
while [ "$1" != {sys.executable} ]; do shift; done
"$@"
status=$?
if [ $tool = memcheck ]; then
    echo "========= COMPUTE-SANITIZER" > $log
    echo "========= Invalid __global__ read of size 4 bytes" >> $log
    echo "=========     at read_kernel" >> $log
    echo "========= ERROR SUMMARY: 2 errors" >> $log
else
    echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" > $log
fi
exit $status
"""


@whole
def test_what_the_sanitizer_reports_is_a_failure(tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    status, printed = check(tmp_path / "out", "--stage", "sanitize", PATH=path)
    found = rows(tmp_path / "out")
    reports = {row["stage"]: row for row in found if row["case"] == "report"}
    assert status == 1 and reports["memcheck"]["status"] == "failed", printed
    assert reports["memcheck"]["message"] == "2 reports, the first: Invalid __global__ read of size 4 bytes"
    assert reports["racecheck"]["status"] == "passed" and reports["racecheck"]["op"] == OP
    assert [row for row in found if row["status"] == "failed"] == [reports["memcheck"]]
    assert sum(row["stage"] == "racecheck" for row in found) > 20


@whole
def test_without_a_sanitizer_it_says_so(tmp_path):
    status, printed = check(tmp_path / "out", "--stage", "sanitize", "--stage", "tune", PATH=str(tmp_path))
    assert status == 0
    assert "compute-sanitizer is not on the path" in printed and "measured on a GPU" in printed


def test_unknown_names_are_refused(tmp_path):
    status, printed = check(tmp_path / "out", "--stage", "smoke", op="soft_read")
    assert status == 2 and "op must be one of" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "no GPU that torch" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_needs_no_package():
    command = [sys.executable, "-S", "-m", "bench.gpu_check", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for option in ("--out", "--minutes", "--resume", "--stage", "--device", "--op", "--backend"):
        assert option in done.stdout


def test_results_are_no_page_of_the_docs(tmp_path, monkeypatch):
    """The docs are made from result files; the folder of a check is among these and must be ignored."""
    folder = gpu_check._new_folder("NVIDIA H200")
    assert folder.parent == results.DIRECTORY and folder.name.startswith("gpu-check-nvidia-h200-")
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / "summary.json").write_text("{}")
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    assert generate.result_files() == [] and results.committed() == []


# --- the choice and order of cases ---


@pytest.fixture(scope="module")
def rounds():
    return telling.rounds(OPS.values())


def test_the_rounds_are_the_whole_grid_once(rounds):
    grid = {
        (op.name, c.name, str(d)[6:]) for op in OPS.values() for d in op.dtypes for c in cases_of(op) if takes(c, d)
    }
    flat = [subject for some in rounds for subject in some]
    assert set(flat) == grid and len(flat) == len(grid)


def test_the_smoke_is_small_and_meets_every_kernel_and_every_edge(rounds):
    smoke = rounds[0]
    assert 50 <= len(smoke) <= 120, "three or four subjects an op, and there are 34 ops that a GPU has kernels for"
    named = {case.name: case for op in OPS.values() for case in cases_of(op)}
    assert {(op, dtype) for op, _, dtype in smoke} >= {
        (op, d) for op in OPS for d in ("bfloat16", "float32", "int64") if getattr(torch, d) in OPS[op].dtypes
    }
    assert "float16" in {dtype for _, _, dtype in smoke}
    met = {edge for op, case, _ in smoke for edge in telling.edges_of(OPS[op], named[case])}
    every = {e for op in OPS.values() for c in cases_of(op) for e in telling.edges_of(op, c) if not c.wants}
    assert met == every
    for edge in (
        *("odd sizes", "T = 0", "N = 0", "no streams", "K > 256", "V > 256", "few tokens, many slots", "many tokens"),
        *("slot_mask is mask_bool", "slot_mask is mask_float", "slot_mask is mask_empty", "grouped heads", "NaN"),
        *("slot_range is ranges_causal", "slot_range is ranges_empty", "token_mask is token_mask"),
        *("shared memory", "more chosen than there are", "erase is uniform", "erase_scale = 0.5", "float32 content"),
    ):
        assert edge in met, edge


def test_cases_to_time_have_names_of_their_own():
    keys = [case_key(case, "cuda") for case in cases.all_cases("cuda")]
    assert len(set(keys)) == len(keys)


def test_a_row_that_is_not_a_line_yet_is_not_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"stage": "grid", "op": "a", "backend": "b", "dtype": "c", "case": "d", "direction": "e"}\n{"stage'
    )
    found = Rows(path)
    assert [row["op"] for row in found] == ["a"]
    found.add({**next(iter(found)), "case": "f", "status": "passed"})
    assert len(list(Rows(path))) == 2
