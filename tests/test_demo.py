"""The demonstration at toy size: its text, its training, its picture and its exit status."""

from __future__ import annotations

import math

import pytest
import torch

from memkernels import _figure, _speed, _text, demo

TINY = demo.Settings(
    streams=2,
    window=8,
    steps=6,
    compared_steps=4,
    warm_up=2,
    held_out=0.001,
    held_out_streams=2,
    model={"d_model": 16, "layers": 1, "heads": 2, "dropout": 0.1, "mem_size": 12, "mem_dim": 8, "gate_bias": -2.0},
)


@pytest.fixture(scope="module")
def training() -> demo.Training:
    return demo.train(TINY, seconds=60)


@pytest.fixture(scope="module")
def timings() -> list[_speed.Timing]:
    return [_speed.Timing(case, {"fused": 1.0, "reference": 5.0, "PyTorch": 2.0}) for case in _speed.cases()]


def test_the_text_is_english_and_does_not_repeat_itself():
    text = _text.documentation().decode()
    paragraphs = text.split("\n\n")
    assert len(text) > 100_000
    assert "statement" in text
    assert len(set(paragraphs)) > 0.99 * len(paragraphs)
    train, held_out = _text.split(text.encode(), 0.1)
    assert bytes([*train.tolist(), *held_out.tolist()]).decode() == text
    assert len(held_out) / len(train) == pytest.approx(1 / 9, rel=1e-3)


def test_windows_predict_every_token_once():
    text = _text.streams(torch.arange(35), 2)
    windows = _text.windows(text, 4)
    assert torch.equal(torch.cat([w[:, 1:] for w in windows], dim=1), text[:, 1:17])
    assert all(w.shape == (2, 5) for w in windows)


def test_both_backends_train_to_the_same_curve(training):
    assert len(training.difference) == TINY.compared_steps
    assert max(training.difference) < 1e-4
    assert len(training.fused.losses) == len(training.without.losses) == TINY.steps
    again = demo.train(TINY, seconds=60)
    assert again.fused.losses == training.fused.losses
    assert again.bits == training.bits


def test_without_memory_nothing_is_read(training):
    assert not training.without.state.values.any()
    assert training.fused.state.values.any()
    assert training.bits["with memory"] != training.bits["the same weights, memory switched off"]


def test_bits_per_byte_is_the_streamed_likelihood(training):
    trainee, text = training.fused, _text.streams(torch.arange(34) % 7, 2)
    model = trainee.model.eval()
    state, total = model.initial_state(2), 0.0
    for i in (0, 8):
        log_probs, hidden = model(text[:, i : i + 8], state)
        total -= log_probs.gather(-1, text[:, i + 1 : i + 9, None]).sum().item()
        state = model.write(hidden, state)
    assert trainee.bits_per_byte(text, write=True) == pytest.approx(total / 32 / math.log(2))


def test_training_stops_when_time_is_over():
    assert len(demo.train(TINY, seconds=0).fused.losses) == 1


def test_every_speed_case_runs_and_agrees():
    for case in _speed.cases(tokens=40, slots=96, many=300):
        if case.name in ("gated_write", "softmax_read", "topk_read", "sparse_read", "slot_usage", "address"):
            torch.testing.assert_close(case.call(backend="reference"), case.eager(), rtol=1e-3, atol=1e-4)


def test_the_table_and_the_text_name_every_number(training, timings):
    table = _speed.table(timings)
    assert all(case.name in table for case in _speed.cases())
    assert "5.00 (5.0x)" in table
    text = demo.describe(training)
    assert all(f"{value:.4f}  {name}" in text for name, value in training.bits.items())


@pytest.mark.parametrize("fault", ("none", "op", "curve"))
def test_the_exit_status_says_whether_fused_equals_reference(fault, training, timings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "check_ops", lambda: fault != "op")
    monkeypatch.setattr(demo, "train", lambda settings, seconds: training)
    monkeypatch.setattr(demo._speed, "measure", lambda fused: timings)
    if fault == "curve":
        monkeypatch.setattr(demo, "CURVE_TOLERANCE", -1.0)
    assert demo.main(["--out-dir", str(tmp_path / "new")]) == (fault != "none")
    out = capsys.readouterr().out
    assert ("FAILED" in out) == (fault != "none")
    picture = tmp_path / "new" / "demo.png"
    if fault == "op":
        assert not picture.exists()
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in out


def test_the_picture_survives_one_step(timings, tmp_path):
    assert _figure.draw(tmp_path, demo.train(TINY, seconds=0), timings).stat().st_size > 10_000
