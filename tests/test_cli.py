"""``python -m memkernels``: info, check, and what they tell a script."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from promised import PROMISED
from support import BACKENDS, ROOT

from memkernels import __main__ as cli
from memkernels import backends, testing
from memkernels.registration import OPS


def test_info_names_versions_backends_and_every_op(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "processor", "caches", "instruction sets", *BACKENDS, *OPS, "gated_write_"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 200


def gaps_of(text: str) -> list[str]:
    """The lines of gaps, without those of unfinished ops."""
    lines = text.partition("\nGaps\n")[2].splitlines()
    return [line for line in lines if line.split(":")[0].strip() not in set(OPS) - set(PROMISED)]


def test_every_gap_is_a_backend_that_is_not_here(capsys):
    """Every gap is explained, in one line per backend: here only a device or a package may be missing."""
    cli.main(["info"])
    text = capsys.readouterr().out
    missing = {b.name: b.missing() for b in backends.BACKENDS if b.missing() is not None}
    assert gaps_of(text) == [f"  every op: backend {name!r} is not available: {why}" for name, why in missing.items()]
    assert ("No gaps." in text) == ("\nGaps\n" not in text)


def test_info_as_json(capsys):
    cli.main(["info", "--json"])
    info = json.loads(capsys.readouterr().out)
    names = {"reference", *(b.name for b in backends.BACKENDS)}
    assert set(info["backends"]) == names
    assert all(set(row) == names for row in info["ops"].values())
    assert all(set(by) == set(OPS[op].directions) for op in OPS for by in info["ops"][op].values())


def test_info_gives_the_reason_for_a_gap(capsys, monkeypatch):
    gone = backends.Backend("cpu", ("cpu",), lambda: "its native library is not built")
    monkeypatch.setattr(backends, "BACKENDS", (gone,))
    cli.main(["info"])
    text = capsys.readouterr().out
    assert text.count("its native library is not built") == 2, "once beside the backend, once as a gap"
    assert text.endswith("every op: backend 'cpu' is not available: its native library is not built\n")


def test_info_gives_the_reason_for_an_op_that_a_backend_lacks(capsys, monkeypatch):
    own = next(b for b in backends.BACKENDS if b.name == "cpu")
    monkeypatch.setattr(backends, "BACKENDS", (own,))
    monkeypatch.setattr(backends, "_kernels", backends._kernels - {("memkernels_cpu::topk_read_backward", "cpu")})
    cli.main(["info"])
    assert gaps_of(capsys.readouterr().out) == ["  topk_read: backend 'cpu' has no backward kernel on cpu"]


def test_check_prints_a_table_and_succeeds(capsys):
    assert cli.main(["check", "--op", "merge_reads", "--backend", "reference", "--dtype", "float32", "--quick"]) == 0
    text = capsys.readouterr().out
    assert "merge_reads" in text and "passed" in text


def test_check_fails_with_status_1_and_names_the_row(capsys, monkeypatch):
    row = testing.Row("softmax_read", "cpu", "float32", "cpu", "usual", "forward", 1.0, 1e-5, False, "read: error 1")
    monkeypatch.setattr(testing, "check", lambda *args, **options: [row])
    assert cli.main(["check"]) == 1
    assert "softmax_read on cpu/cpu, float32, 'usual', forward: read: error 1" in capsys.readouterr().out


def test_check_of_nothing_is_a_failure(monkeypatch):
    monkeypatch.setattr(testing, "check", lambda *args, **options: [])
    assert cli.main(["check"]) == 1


@pytest.mark.parametrize("wrong", [["--op", "read"], ["--backend", "tpu"], ["--dtype", "int8"], ["--device", "moon"]])
def test_check_refuses_unknown_names(capsys, wrong):
    assert cli.main(["check", *wrong]) == 2
    assert "must be" in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "memkernels", "check", "--op", "merge_reads", "--quick", "--dtype", "float64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    help_text = subprocess.run([*command[:3], "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("info", "check", "demo"):
        assert name in help_text
