"""TokenStore: keys and neighbours against numpy in float64, in memory and on disk; changes, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from transformers_support import tiny  # isort: skip (skips where transformers is absent)
from neighbours_support import TEXTS, Letters, feed_forward_inputs, ids, store

from memkernels.integrations import transformers as mkt


@pytest.fixture
def model():
    return tiny("llama")


def everything(model, layer=-2, window=64):
    """Inputs of the feed-forward network and next tokens of all texts, in order."""
    inputs, following = [], []
    for text in TEXTS.values():
        tokens = ids(text)
        for piece in tokens[:-1].split(window):
            inputs.append(feed_forward_inputs(model, layer, piece))
        following.append(tokens[1:])
    return torch.cat(inputs).double().numpy(), torch.cat(following).numpy()


def test_keys_are_principal_components(model):
    inputs, _ = everything(model)
    centred = inputs - inputs.mean(0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:16].T
    found = store(model).records.keys.double().numpy()
    wanted = centred @ components
    sign = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found, wanted * sign, atol=1e-4)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_search_is_exact(model, dtype, disk, tmp_path):
    made = store(model, dtype=dtype, path=tmp_path / "s" if disk else None)
    keys = store(model, dtype=dtype).records.keys.double().numpy()
    query = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 2
    distances, tokens, slots = made.search(query, 7)
    exact = ((query.to(dtype).double().numpy()[..., None, :] - keys) ** 2).sum(-1)
    order = exact.argsort(-1, kind="stable")[..., :7]
    # queries are rounded to search, as the keys are, and are not for the distances that come back
    shown = ((query.double().numpy()[..., None, :] - keys) ** 2).sum(-1)
    np.testing.assert_array_equal(slots.numpy(), order)
    np.testing.assert_allclose(distances.numpy(), np.take_along_axis(shown, order, -1), rtol=1e-4)
    np.testing.assert_array_equal(tokens.numpy(), everything(model)[1][order])


def test_a_record_is_found_by_its_own_key(model):
    made = store(model)
    tokens = ids(TEXTS["faq/two.txt"])[:65]
    query = made.project(feed_forward_inputs(model, -2, tokens[:-1]))
    distances, following, slots = made.search(query, 1)
    assert following[8:, 0].tolist() == tokens[9:].tolist()  # the first letters of windows may be alike
    assert distances.max() < 1e-6
    assert (made.records.columns[slots[8:, 0]][:, 1] == 1).all()


def test_windows_are_read_by_themselves(model):
    text = "one window, and " * 4
    whole, pieces = (store(model, [text], window=window).records for window in (64, 16))
    assert len(whole) == len(pieces) == 63
    inputs = [feed_forward_inputs(model, -2, piece) for piece in ids(text)[:-1].split(16)]
    made = store(model, [text], window=16)
    torch.testing.assert_close(made.records.keys, made.project(torch.cat(inputs)))


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_documents_come_and_go(model, disk, tmp_path):
    made = store(model, path=tmp_path / "s" if disk else None)
    before = len(made)
    query = made.project(feed_forward_inputs(model, -2, ids("the day after, the model serves on")))
    old = made.search(query, 3)
    count = made.add({"new/four.txt": "the day after, the model serves on"}, progress=False)
    assert count == 33 and len(made) == before + 33
    distances, tokens, slots = made.search(query, 3)
    assert distances[:33, 0].max() < 1e-6
    assert tokens[8:33, 0].tolist() == ids("the day after, the model serves on")[9:].tolist()
    source = made.sources(slots[32, :1], tokens=5)[0]
    assert source == ("new/four.txt", 32, "es on", "n", "")
    assert made.remove(where=("document like ?", ["new/%"])) == 33
    again = made.search(query, 3)
    for was, now in zip(old, again):
        torch.testing.assert_close(was, now)
    assert made.sources(slots[32, :1]) == [None]
    assert made.remove(where=("document = ? or document = ?", ["faq/one.txt", "faq/two.txt"])) > 0
    assert len(made) == len(TEXTS["ref/three.txt"]) - 1
    distances, tokens, slots = made.search(query[:2], before)
    assert (slots[:, len(made) :] == -1).all() and torch.isinf(distances[:, len(made) :]).all()
    assert (tokens[:, len(made) :] == -1).all() and (slots[:, : len(made)] >= 0).all()


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_saved_store_is_the_same(model, disk, tmp_path):
    path = tmp_path / "records"
    made = store(model, dtype=torch.bfloat16, path=path if disk else None)
    made.remove(where=("document = ?", ["faq/two.txt"]))
    query = torch.randn(4, 16)
    distances, tokens, slots = made.search(query, 5)
    sources = made.sources(slots)
    if disk:
        made.records.close()
        loaded = mkt.TokenStore.load(path, model, Letters())
    else:
        made.save(tmp_path / "saved")
        loaded = mkt.TokenStore.load(tmp_path / "saved", model, Letters())
    assert len(loaded) == len(TEXTS["faq/one.txt"]) + len(TEXTS["ref/three.txt"]) - 2
    found = loaded.search(query, 5)
    assert torch.equal(distances, found[0]) and torch.equal(tokens, found[1])
    assert loaded.sources(found[2]) == sources
    assert loaded.add(["more"], progress=False) == 3


def test_bytes_are_counted(model):
    made = store(model, dtype=torch.bfloat16)
    parts = (made.records.keys, made.records.lengths, made.records.columns)
    assert made.bytes_per_slot * len(made) == sum(x.numel() * x.element_size() for x in parts) == len(made) * 48


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        ({"dim": 33}, ValueError, r"dim must lie in 1..32, got 33"),
        ({"dtype": torch.int8}, TypeError, r"dtype must be one of float32, bfloat16, float16, got torch.int8"),
        ({"layer": 3}, ValueError, r"layers must lie in -3..2, got 3"),
        ({"window": 0}, ValueError, r"window must be at least 1, got 0"),
        ({"texts": ["x", ""]}, ValueError, r"texts must hold a document of at least 2 tokens, got none"),
        ({"texts": [3]}, TypeError, r"texts must hold str or \(name, str\), got int"),
        ({"texts": 3}, TypeError, r"texts must be an iterable of str or of \(name, str\), got int"),
    ],
)
def test_refusals(model, options, error, sentence, tmp_path):
    texts = options.pop("texts", TEXTS)
    with pytest.raises(error, match=sentence):
        store(model, texts, path=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_refusals_of_a_saved_store(model, tmp_path):
    made = store(model)
    made.save(tmp_path)
    with pytest.raises(FileExistsError, match="path must not be there yet"):
        store(model, path=tmp_path)
    with pytest.raises(ValueError, match="tokenizer must have the vocabulary .* that the store was built with"):
        mkt.TokenStore.load(tmp_path, model, Letters(shift=1))
    with pytest.raises(ValueError, match="model must be the LlamaForCausalLM .* other numbers in its weights"):
        mkt.TokenStore.load(tmp_path, tiny("llama", initializer_range=0.2))
    with pytest.raises(FileNotFoundError, match="folder must hold store.json"):
        mkt.TokenStore.load(tmp_path / "nothing")
    alone = mkt.TokenStore.load(tmp_path)
    with pytest.raises(TypeError, match="model and tokenizer must be given to load before add, got None"):
        alone.add(["x y"])
    with pytest.raises(TypeError, match="tokenizer must be given to load before sources, got None"):
        alone.sources(torch.tensor([0]))
    with pytest.raises(ValueError, match="where cannot contain"):
        made.remove(where="document = 'a'; drop table meta")
    described = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**described, "format": 2}))
    with pytest.raises(ValueError, match="folder must be of format 1 at most, got 2"):
        mkt.TokenStore.load(tmp_path)
    assert len(made) == sum(len(text) - 1 for text in TEXTS.values())
