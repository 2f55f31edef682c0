"""TokenStore.recall: scores against the formula in numpy, ties, what was removed, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transformers_support import tiny  # isort: skip (may skip the module)
from neighbours_support import TEXTS, Letters, feed_forward_inputs, ids, store

from memkernels.integrations import transformers as mkt

QUESTION = "what token followed the key?"


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_scores_are_those_of_the_formula(k, disk, tmp_path):
    """``S(d) = 1/T sum_t (1 - min_{i in d} |q_t - k_i|^2 / f_t)`` over the k nearest records of each token."""
    model = tiny("llama")
    made = store(model, path=tmp_path / "records" if disk else None)
    query = made.project(feed_forward_inputs(model, made.layer, ids(QUESTION))).double().numpy()
    keys, columns = made.records.live()
    distances = ((query[:, None] - keys.double().numpy()) ** 2).sum(-1)
    wanted = dict.fromkeys(TEXTS, 0.0)
    for row in distances:
        near = row.argsort()[:k]
        for number, name in enumerate(TEXTS):
            own = row[near][columns.numpy()[near, 1] == number]
            wanted[name] += (1 - own.min() / row[near].max()) / len(distances) if len(own) else 0.0
    found = made.recall(QUESTION, k=k)
    assert [name for _, name in found] == sorted((name for _, name in found), key=lambda name: -wanted[name])
    np.testing.assert_allclose([score for score, _ in found], [wanted[name] for _, name in found], atol=1e-4)
    assert made.recall(QUESTION, most=1, k=k) == found[:1]


def test_the_document_that_says_the_same_is_recalled():
    model = tiny("llama")
    made = store(model)
    for name, text in TEXTS.items():
        assert made.recall(text[:30])[0][1] == name


def test_of_equal_scores_the_later_comes_first_until_it_is_removed():
    model = tiny("llama")
    same = {f"turn/{number}": "a correction is what was said last" for number in range(5)}
    made = store(model, {**TEXTS, **same})
    assert [name for _, name in made.recall("a correction is what was", most=5)] == list(same)[::-1]
    made.add({"turn/5": "a correction is what was said last"}, progress=False)
    assert made.recall("a correction is what was")[0][1] == "turn/5"
    made.remove(where=("document in (?, ?)", ["turn/5", "turn/4"]))
    assert [name for _, name in made.recall("a correction is what was", most=4)] == list(same)[3::-1]


def test_recall_beside_a_memory_at_work_leaves_it_alone():
    model, text = tiny("llama"), ids(TEXTS["faq/one.txt"])[None, :30]
    made = store(model)
    mkt.attach(model, mkt.Neighbours(made, k=8, cache=16))
    with torch.no_grad():
        before = model(text).logits
        found = made.recall(QUESTION)
        assert torch.equal(model(text).logits, before)
    assert made.recall(QUESTION) == found


def test_refusals(tmp_path):
    model = tiny("llama")
    made = store(model)
    for options in ({"most": 0}, {"k": 0}):
        with pytest.raises(ValueError, match=f"recall: {next(iter(options))} must be at least 1, got 0"):
            made.recall(QUESTION, **options)
    with pytest.raises(ValueError, match="recall: text must have a token, got none"):
        made.recall("")
    made.save(tmp_path)
    with pytest.raises(TypeError, match="model and tokenizer must be given to load before recall, got None"):
        mkt.TokenStore.load(tmp_path).recall(QUESTION)
    assert mkt.TokenStore.load(tmp_path, model, Letters()).recall(QUESTION) == made.recall(QUESTION)
