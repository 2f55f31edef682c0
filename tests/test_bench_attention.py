"""``python -m bench attention``: calls as transformers makes them, no speed for a wrong result, the page."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from bench.attention import calls, command, page
from memkernels.integrations.transformers import attention

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = (
    calls.Case("causal", "llama", 6),
    calls.Case("learns", "llama", 6, backward=True),
    calls.Case("window", "gemma3", 140),
    calls.Case("padded", "llama", 5, batch=2, lengths=(3, 5)),
    calls.Case("one token", "llama", 1, seen=5, batch=2, lengths=(3, 6)),
)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.title)
def test_calls_are_timed_and_wrong_ones_are_not(case, monkeypatch):
    row = command.measured(case, torch.float32, 1, 0.0)
    assert row["goes to"] == "softmax_read"
    ours, sdpa = (row["milliseconds"][name] for name in ("memkernels", "sdpa"))
    assert row["sdpa over memkernels"] == pytest.approx(sdpa / ours) and ours > 0
    read = attention.softmax_read
    monkeypatch.setattr(attention, "softmax_read", lambda *args, **kwargs: 1.01 * read(*args, **kwargs))
    with pytest.raises(AssertionError, match="not close"):
        command.measured(case, torch.float32, 1, 0.0)


def test_the_shapes_are_those_of_the_case():
    out = calls.noted(SMALL[3], "memkernels", torch.bfloat16).attend()
    assert out.shape == (2, 5, 9, 64) and out.dtype == torch.bfloat16
    out = calls.noted(SMALL[4], "sdpa", torch.float32).attend()
    assert out.shape == (2, 1, 9, 64)


def test_the_page_tells_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "CASES", SMALL[:1])
    assert command.main(["--quick", "--out", str(tmp_path / "attention-here.json")]) == 0
    rows = json.loads((tmp_path / "attention-here.json").read_text())["rows"]
    text = page.tables(tmp_path)
    for row in rows:
        assert f"| causal | {row['dtype']} | softmax_read |" in text
        assert f"| {row['sdpa over memkernels']:.2f}x | {row['eager over memkernels']:.2f}x |" in text
    assert len(rows) == 2 and "x sdpa" in capsys.readouterr().out
