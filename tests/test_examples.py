"""Every example runs, and what it measures is what it claims."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from support import ROOT

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def run(name: str, *arguments):
    """What ``main`` of the example returns."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*arguments)


def question_answering(tmp_path):
    accuracy = run("question_answering")
    assert accuracy[2] >= 0.95
    assert accuracy[1] < 0.7, "one read cannot answer a question that takes two facts"


def dialogue_memory(tmp_path):
    accuracy = run("dialogue_memory")
    without, remembering = accuracy["window alone"], accuracy["window and memory"]
    assert min(remembering.values()) >= 0.95
    assert without["in the window"] >= 0.95
    assert without["before the window"] < 0.2, "what left the window cannot be known"


def continual_learning(tmp_path):
    measured = run("continual_learning")
    assert measured["network"]["when fresh"] >= 0.9 and measured["memory"]["when fresh"] >= 0.9
    assert measured["network"]["forgetting"] > 0.3
    assert measured["memory"]["forgetting"] < 0.05


def slots_read(tmp_path):
    pytest.importorskip("matplotlib")
    measured = run("slots_read", tmp_path / "picture.png")
    assert measured["right"] > 3 * measured["by chance"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def knowledge_base(tmp_path):
    pytest.importorskip("matplotlib")
    measured = run("knowledge_base", tmp_path / "picture.png")
    known = ("facts that are stored", "added", "corrected", "disputed, of the atlas", "disputed, of the forum")
    known += ("disputed, until 2020", "the forum is deleted, no filter", "facts that never changed")
    for name in known:
        assert measured[name]["right"] >= 0.97 and measured[name]["other"] == 0, name
        assert measured[name]["cited"] >= 0.97, "the slot that was read most says where the answer is from"
    for name in ("facts that nobody told", "to be added, before", "deleted"):
        assert measured[name]["unknown"] >= 0.9 and measured[name]["right"] <= 0.01, name
        assert measured[name]["other"] <= 0.01 and measured[name]["cited"] == 0, name
    assert 0.3 < measured["disputed, no filter"]["right"] < 0.7, "without a filter either source may win"
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def larger_than_memory(tmp_path):
    pytest.importorskip("matplotlib")
    pages, budget = 32, 32**2 * (128 << 10) // 8
    walks = run("larger_than_memory", tmp_path / "picture.png", pages, 16, 120)
    without, ahead = walks["without prefetch"], walks["with prefetch"]
    assert torch.equal(without.track, ahead.track), "prefetch changes what is in memory, not what is read"
    assert without.track.flatten(0, 1).div(16).floor().unique(dim=0).shape[0] > pages**2 // 8, "they fit in memory"
    assert without.hit_rate < 0.97 and ahead.hit_rate > 0.985
    for walked in walks.values():
        assert budget // 2 < walked.resident_bytes <= budget and walked.peak_bytes <= budget + (64 << 20)
        assert walked.bytes_read > budget
    assert ahead.bytes_read < 1.25 * without.bytes_read, "what is prefetched is mostly read"
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def ngram_memory(tmp_path):
    measured = run("ngram_memory", True, (0,), tmp_path / "result.json")
    memory, compute, size = (measured[kind] for kind in ("n-grams", "same compute", "same parameters"))
    assert 1 <= compute["operations"] / memory["operations"] < 1.02
    assert 1 <= size["parameters"] / memory["parameters"] < 1.02 and size["operations"] > memory["operations"]
    assert memory["bits per byte"][0] < min(compute["bits per byte"][0], size["bits per byte"][0]) - 0.2
    assert compute["bits per byte"][0] < 4.5, "untrained models would be easy to beat"
    for streams in (1, 2):
        assert measured[f"generation, streams: {streams}"]["disk / RAM"] > 0.2
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["row"] for row in rows] == list(measured) and all(row["processor"] and row["commit"] for row in rows)


def pretrained_memory(tmp_path):
    pytest.importorskip("transformers")
    page = tmp_path / "page.html"
    lines = run("pretrained_memory", ["--tiny", "--tokens", "8", "--page", str(page)])
    assert page.read_text("utf-8").count('class="t"') == 8
    assert len(lines) == 8 and all("document='notes/" in line for line in lines)


def chat_memory(tmp_path):
    pytest.importorskip("transformers")
    measured = run("chat_memory", ["--tiny", "--dialogues", "1", "--facts", "12"])
    for group in ("before the window", "before it, corrected"):
        assert measured[group]["window alone"] <= 0.4, "what left the window cannot be known"
        assert measured[group]["right turn given"] >= 0.9, "a turn that is put back is read"
        assert measured[group]["recall"] >= measured[group]["turn found"] - 0.1, "so is one that was found"


def continual_documents(tmp_path):
    pytest.importorskip("transformers")
    measured = run("continual_documents", ["--tiny"])
    before, after, removed = measured["before"], measured["with 2 new"], measured["removed"]
    assert before["old"] < 0.5 * measured["no memory"]["old"], "the store knows the old documents"
    assert after["new"] < 0.5 * before["new"], "new documents are known once they are added"
    assert after["old"] <= 1.02 * before["old"], "and nothing old is forgotten"
    assert removed == before and after["records"] > before["records"]


def sharded_memory(tmp_path):
    """By two processes of torchrun, which never outlive the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [*command, EXAMPLES["sharded_memory"]],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = running.communicate(timeout=55)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    print(printed)
    assert running.returncode == 0 and printed.startswith("2 ranks; rank 0 holds slots 0 to 500000 of 1000000")
    measured = {
        line[:24].strip(): float(line[24:]) for line in printed.splitlines() if line[0] != " " and ";" not in line
    }
    assert measured["written"] == measured["slots found elsewhere"] == 0
    assert max(measured[name] for name in ("loss", "memory", "read")) < 1e-5
    assert 0 < measured["bytes of calls"] < 1e-4 * measured["bytes of the slots"]


CHECKS = {
    check.__name__: check
    for check in (
        question_answering,
        dialogue_memory,
        continual_learning,
        slots_read,
        knowledge_base,
        larger_than_memory,
        ngram_memory,
        pretrained_memory,
        chat_memory,
        continual_documents,
        sharded_memory,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name, tmp_path, capsys):
    CHECKS[name](tmp_path)
    assert capsys.readouterr().out, "an example prints what it measured"


def test_every_example_is_checked():
    assert set(CHECKS) == set(EXAMPLES)
