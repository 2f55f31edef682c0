"""``python -m memkernels scale``: the cost of a read over ranks, against the formula by hand."""

from __future__ import annotations

import json

import pytest

from memkernels import __main__ as cli
from memkernels._scale import exchanged, read_cost


def test_a_billion_slots_on_four_devices(capsys):
    """256 GB need two H200; on four, a read of 256 tokens is bound by arithmetic and moves 0.1 MB."""
    assert read_cost(1e9, 64, 64).ranks == 2
    cost = read_cost(1e9, 64, 64, tokens=256, ranks=4)
    assert cost.slot_bytes == 256e9 and cost.rank_bytes == 64e9
    assert cost.moved == 2 * 3 / 4 * 256 * 65 * 4
    assert cost.memory == pytest.approx(64e9 / 4.8e12)
    assert cost.arithmetic == pytest.approx(2 * 256 * 1e9 * 128 / 4 / 989e12)
    assert cost.seconds == pytest.approx(cost.arithmetic + 2 * 2 * 10e-6 + cost.moved / 50e9)
    arguments = ["scale", "--slots", "1e9", "--key-dim", "64", "--value-dim", "64", "--tokens", "256", "--ranks", "4"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "256 GB, on 4 ranks of 64 GB" in text and "bound by arithmetic" in text
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == cost.seconds


def test_one_rank_moves_nothing_and_few_tokens_one_step():
    alone = read_cost(1e6, 8, 8, dtype="float32", tokens=3, ranks=1)
    assert alone.moved == alone.latency == 0 and alone.seconds == max(alone.memory, alone.arithmetic)
    assert exchanged(1, 100, 4) == 300, "an all-gather"
    assert exchanged(16, 100, 4) == 2 * 3 * 4 * 100, "two steps over blocks of four tokens"
    assert exchanged(16, 100, 2) == 16 * 100
    assert read_cost(1e12, 64, 64).ranks == 1816


@pytest.mark.parametrize("option", ["--slots", "--ranks", "--bandwidth"])
def test_numbers_that_mean_nothing_are_refused(option, capsys):
    arguments = {"--slots": "1e6", option: "0"}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["scale", *(word for pair in arguments.items() for word in pair)])
    assert stopped.value.code == 2 and f"{option} must be above 0, got 0" in capsys.readouterr().err
