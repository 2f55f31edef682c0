"""What a declaration says about its tests: how arguments are filled, what they hide, how an index is judged."""

from __future__ import annotations

import pytest
import torch

from memkernels.spec import Arg, Op, Out
from memkernels.testing import Case, Subject
from memkernels.testing.cases import SIZES, UNMET
from memkernels.testing.inputs import make


def _twice(query, words, live, share, made, x, gain, places):
    return 2 * query


OP = Op(
    name="declared",
    args=(
        Arg("query", "T K", "tokens", "lead"),
        Arg("words", "T c", "tokens", "index", of="W"),
        Arg("live", "T", "tokens", "bool", hides=True),
        Arg("share", "N", "memory", fill="uniform"),
        Arg("made", "T K", "tokens", fill=_twice),
        Arg("x", "N V", "memory", "content"),
    ),
    params=(("gain", "float"), ("places", "int")),
    usual={"gain": 0.25},
    outputs=(Out("best", "T", dtype="index", grad=False),),
    reference=lambda query, *rest: (query.argmax(-1),),
)
CASE = Case("small", sizes={"W": 3}, tokens=(2,), memory=())


def _made() -> dict[str, torch.Tensor]:
    inputs = make(OP, CASE, torch.float32)
    return dict(zip((a.name for a in OP.args), inputs.tensors)) | dict(zip(("gain", "places"), inputs.params))


def test_sizes_that_no_case_knows_and_usual_options():
    made = _made()
    assert made["words"].shape == (2, SIZES["T"], UNMET) and made["x"].shape == (SIZES["N"], SIZES["V"])
    assert (made["gain"], made["places"]) == (0.25, UNMET)


def test_an_index_points_into_its_own_axis():
    assert set(_made()["words"].unique().tolist()) == {-1, 0, 1, 2}


def test_fills_are_those_declared():
    made = _made()
    assert bool((made["share"] >= 0).all()) and bool((made["x"] < 0).any())
    assert torch.equal(made["made"].nan_to_num(), 2 * made["query"].nan_to_num())


def test_what_is_hidden_is_nan_and_nothing_else():
    made = _made()
    assert torch.equal(made["query"].isnan().all(-1), ~made["live"])
    assert torch.equal(made["query"].isnan().any(-1), ~made["live"])
    assert not made["x"].isnan().any() and not made["share"].isnan().any()


@pytest.mark.parametrize("off", [0, 1])
def test_an_index_without_a_judge_is_that_of_the_reference(off):
    subject = Subject(OP, CASE, torch.float32, "cpu")
    wanted = OP.reference(*subject.inputs.doubled())[0]
    assert bool(subject._wrong_index(0, wanted + off)) == bool(off)
