"""Neighbours: the mixture against its formula in numpy, its cache in generation, learning, reads, and refusals."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from transformers_support import FAMILIES, WORDS, cache_name, cache_of, stir, tiny  # isort: skip (may skip the module)
from neighbours_support import TEXTS, Letters, feed_forward_inputs, ids, store

import memkernels as mk
from memkernels.integrations import transformers as mkt
from memkernels.integrations.transformers import passes
from memkernels.integrations.transformers.cache import MemoryCache
from memkernels.integrations.transformers.mixing import Found, Mixing, Past

TEXT = "the model reads a store of records, and votes for the token after each. "


def attached(model, k=8, cache=32, texts=None, **options):
    return mkt.attach(model, mkt.Neighbours(store(model, texts), k=k, cache=cache, **options))


def probabilities(model, tokens, **options):
    with torch.no_grad():
        return model(tokens[None] if tokens.dim() == 1 else tokens, **options).logits.double().exp()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def spread(words, weights):
    """``[T, WORDS]``: the sum of the weights ``[T, k]`` of each word."""
    out = np.zeros((len(words), WORDS))
    for row, (word, weight) in enumerate(zip(words, weights)):
        np.add.at(out[row], word, weight)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_of_neulab(family):
    """``log p = logaddexp(log_softmax(lm) + log(1 - l), log sum_{j: v_j = w} softmax(-|q - k_j|^2 / T)_j + log l)``."""
    model, tokens = tiny(family), ids(TEXT)
    with torch.no_grad():
        own = torch.log_softmax(model(tokens[None]).logits[0].double(), -1).numpy()
    made, k, share, temperature = store(model), 9, 0.3, 0.7
    query = made.project(feed_forward_inputs(model, made.layer, tokens)).double().numpy()
    keys, values = made.records.keys.double().numpy(), made.records.columns[:, 0].numpy()
    distances = ((query[:, None] - keys) ** 2).sum(-1)
    near = distances.argsort(-1)[:, :k]
    votes = softmax(-np.take_along_axis(distances, near, -1) / temperature)
    neighbours = np.log(np.maximum(spread(values[near], votes), 1e-300))
    wanted = np.logaddexp(own + np.log(1 - share), neighbours + np.log(share))

    memory = mkt.Neighbours(made, k=k, cache=0, shares=(share, 0.0), temperature=temperature)
    mkt.attach(model, memory)
    with torch.no_grad():
        output = model(tokens[None], labels=tokens[None])
    np.testing.assert_allclose(output.logits[0].double().numpy(), wanted, atol=2e-3)
    loss = -np.take_along_axis(wanted[:-1], tokens.numpy()[1:, None], -1).mean()
    np.testing.assert_allclose(float(output.loss), loss, atol=1e-4)


@pytest.mark.parametrize("size", [3, 32])
def test_the_formula_of_the_cache(size):
    model, tokens = tiny("llama"), ids(TEXT)[:40]
    own = probabilities(model, tokens)
    own = softmax(np.log(own[0].numpy()))
    made, k, share = store(model), 8, 0.4
    keys = made.project(feed_forward_inputs(model, made.layer, tokens)).double().numpy()
    following, wanted = tokens.numpy()[1:], own.copy()
    for t in range(1, len(tokens)):
        first = max(0, t - size)
        distances = ((keys[t] - keys[first:t]) ** 2).sum(-1)
        near = distances.argsort()[:k]
        votes = softmax(-distances[near])
        wanted[t] = (1 - share) * own[t] + share * spread([following[first:t][near]], [votes])[0]
    mkt.attach(model, mkt.Neighbours(made, k=k, cache=size, shares=(0.0, share)))
    np.testing.assert_allclose(probabilities(model, tokens)[0].numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_whole(family):
    model = tiny(family).double()  # no rounding chooses between two records that are almost as near
    handle = attached(model, cache=16)
    stir(handle.memories[0])
    tokens = torch.stack([ids(TEXT)[:48], ids(TEXT)[20:68]])
    whole = probabilities(model, tokens)
    parts, cache, given = [], None, cache_name(model)
    with torch.no_grad():
        for piece in tokens.split([5, 1, 1, 30, 11], 1):
            output = model(piece, use_cache=True, **({} if cache is None else {given: cache}))
            cache = cache_of(output)
            parts.append(output.logits.double().exp())
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-3)
    last = probabilities(model, tokens, logits_to_keep=1)
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=2e-5, rtol=1e-3)


def test_padding_changes_nothing():
    model = tiny("llama")
    handle = attached(model)
    stir(handle.memories[0])
    tokens = ids(TEXT)[:30]
    padded = torch.cat([torch.zeros(7, dtype=torch.long), tokens])
    mask = (torch.arange(37) >= 7).long()
    rows = torch.stack([padded, torch.cat([ids(TEXT)[:7], tokens])])
    masks = torch.stack([mask, torch.ones_like(mask)])
    positions = (masks.cumsum(1) - 1).clamp(min=0)
    found = probabilities(model, rows, attention_mask=masks, position_ids=positions)[0, 7:]
    torch.testing.assert_close(found, probabilities(model, tokens)[0], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("beams", [1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_with_the_cache_is_that_without(family, beams):
    model = tiny(family)
    handle = attached(model, cache=16, shares=(0.3, 0.3))
    prompt = torch.stack([ids(TEXT)[:20], ids(TEXT)[30:50]])
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": beams, "do_sample": False}
    options["attention_mask"] = torch.ones_like(prompt)
    with_cache = model.generate(prompt, **options)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **options))
    assert handle.reads["0.store"].slots.shape[0] == 2 * beams
    with handle.disabled():
        assert not torch.equal(with_cache, model.generate(prompt, **options))


def test_beams_need_the_state_to_be_reordered(monkeypatch):
    model = tiny("llama")
    attached(model, cache=16, shares=(0.1, 0.8))
    prompt = ids(TEXT)[None, :20]
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "num_beams": 4, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(prompt), "num_return_sequences": 4}
    wanted = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), wanted)
    monkeypatch.setattr(MemoryCache, "_each", lambda self, change: None)
    with contextlib.suppress(Exception):
        assert not torch.equal(model.generate(prompt, **options), wanted)


def test_what_is_cropped_was_never_there():
    model = tiny("llama")
    handle = attached(model, cache=16)
    stir(handle.memories[0])
    tokens, given = ids(TEXT)[None, :40], cache_name(model)
    with torch.no_grad():
        cache = cache_of(model(tokens[:, :25], use_cache=True))
        cache = cache_of(model(tokens[:, 30:36], use_cache=True, **{given: cache}))
        cache.crop(-6)
        output = model(tokens[:, 25:], use_cache=True, **{given: cache})
    wanted = probabilities(model, tokens)[:, 25:]
    torch.testing.assert_close(output.logits.double().exp(), wanted, atol=2e-5, rtol=1e-3)


def test_the_cache_goes_on_from_window_to_window():
    model = tiny("llama")
    handle = attached(model, cache=64, shares=(0.1, 0.5))
    tokens = ids(TEXT)[:61]
    losses = mkt.score(handle, tokens, window=16)
    at = handle.reads["0.cache"].slots[0]
    assert at.shape[0] == 60 and (at < torch.arange(60)[:, None]).all()
    assert at[40:48].min() < 30  # before the window of these tokens, which begins at 32
    own = torch.cat([probabilities(model, piece)[0] for piece in tokens[:-1].split(16)])
    assert not torch.allclose(-own.gather(1, tokens[1:, None])[:, 0].log().float(), losses, atol=1e-3)
    torch.testing.assert_close(mkt.score(model, tokens, window=16), losses, atol=1e-4, rtol=1e-4)
    with handle.disabled():
        alone = mkt.score(handle, tokens, window=16)
    handle.detach()
    assert torch.equal(mkt.score(model, tokens, window=16), alone)


def test_fit_learns_and_leaves_the_model_alone():
    model = tiny("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    handle = attached(model)
    texts = {"a": TEXT * 2, "b": "a key finds the record that was read before it. " * 2}
    tokens = ids("the model keeps what it has read, and finds the token after each key again")
    was = mkt.score(handle, tokens).mean()
    losses = handle.fit(texts, progress=False)
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    assert mkt.score(handle, tokens).mean() < was
    assert handle.memories[0].mixing.usual > 0
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    handle.detach()
    assert {name: torch.equal(weight, before[name]) for name, weight in model.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_fit_sees_the_windows_that_score_sees():
    model = tiny("llama")
    handle = attached(model)
    tokens = ids(TEXT)
    memory = handle.memories[0]
    data = memory._record(handle, [tokens], 16, False)
    loss = memory.mixing.nll((data.store, data.cache), data.past, data.targets, data.own)
    torch.testing.assert_close(loss, mkt.score(handle, tokens, window=16), atol=1e-4, rtol=1e-4)


def test_a_text_in_which_the_store_fails_hardly_reads_it():
    """``m_s = n_s min(1, h / h_0)^2``."""
    mixing = Mixing((0.2, 0.3), 1.0)
    mixing.usual.fill_(0.4)
    found = [Found(torch.rand(3, 5).sort(-1).values, torch.randint(0, 9, (3, 5))) for _ in range(2)]
    rates = torch.tensor([[0.8, 0.1], [0.4, 0.1], [0.1, 0.9]])
    shares = mixing(found, Past(torch.full((3,), 7), rates))[0].exp()
    wanted = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3], [1 - 0.5 / 16, 0.2 / 16, 0.3 / 16]])
    torch.testing.assert_close(shares, wanted)


def test_rates_count_how_often_the_nearest_was_right():
    model = tiny("llama")
    handle = attached(model)
    tokens = ids(TEXTS["faq/one.txt"])[:50]
    data = handle.memories[0]._record(handle, [tokens], 64, False)
    right = (data.store.tokens[:, 0] == tokens[1:]).double()
    wanted = (torch.cat([torch.zeros(1), right.cumsum(0)[:-1]]) + 1) / (torch.arange(49) + 4)
    torch.testing.assert_close(data.past.rates[:, 0].double(), wanted, atol=1e-6, rtol=0)
    assert data.past.entries.tolist() == torch.arange(49).clamp(max=32).tolist()


def test_reads_name_records_and_their_texts():
    model = tiny("llama")
    handle = attached(model, shares=(0.3, 0.1))
    tokens = ids(TEXTS["faq/two.txt"])[:40]
    probabilities(model, tokens)
    read, cache = handle.reads["0.store"], handle.reads["0.cache"]
    assert read.slots.shape == read.weights.shape == (1, 40, 8)
    torch.testing.assert_close(read.weights.sum(-1)[0, 1:], torch.full((39,), 0.3), atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.weights.sum(-1)[0, 1:], torch.full((39,), 0.1), atol=1e-5, rtol=0)
    told = handle.memories[0].sources(read, most=2)
    assert len(told) == 40 and len(told[0]) == 2
    weight, source = told[30][0]
    assert source.document == "faq/two.txt" and source.position in (30, 30 + len(TEXTS["faq/two.txt"]) // 2)
    assert source.text.endswith(TEXTS["faq/two.txt"][26:32]) and weight == float(read.weights[0, 30].max())


def test_new_documents_are_read_at_once():
    model = tiny("llama")
    handle = attached(model)
    made, text = handle.memories[0].store, "what nobody wrote before: 3141592653589793"
    old = mkt.score(handle, ids(text)).mean()
    made.add({"new": text}, progress=False)
    assert mkt.score(handle, ids(text)).mean() < old - 0.1
    made.remove(where=("document = ?", ["new"]))
    assert torch.equal(mkt.score(handle, ids(text)).mean(), old)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_saved_detached_and_loaded(disk, tmp_path):
    model, tokens = tiny("llama"), ids(TEXT)
    alone, keys = probabilities(model, tokens), set(model.state_dict())
    made = store(model, path=tmp_path / "records" if disk else None)
    handle = mkt.attach(model, mkt.Neighbours(made, k=8, cache=32))
    handle.fit([TEXT], progress=False, steps=20)
    with_memory = probabilities(model, tokens)
    handle.save(tmp_path / "saved")
    handle.detach()
    assert torch.equal(probabilities(model, tokens), alone) and set(model.state_dict()) == keys
    if disk:
        made.records.close()
    handle = mkt.load(model, tmp_path / "saved")
    assert torch.equal(probabilities(model, tokens), with_memory)
    handle.detach()
    with pytest.raises(ValueError, match="load: model must be"):
        mkt.load(tiny("llama", initializer_range=0.2), tmp_path / "saved")


def test_bfloat16():
    model = tiny("llama").to(torch.bfloat16)
    handle = attached(model)
    found = probabilities(model, ids(TEXT))
    assert handle.memories[0].mixing.hidden.weight.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), atol=1e-4, rtol=0)


def _other(model):
    return store(tiny("llama", initializer_range=0.2))


def _emptied(model):
    made = store(model)
    made.remove(where=("document is not null", []))
    return made


@pytest.mark.parametrize(
    "make, k, sentence",
    [
        (lambda model: store(tiny("llama", hidden_size=64)), 8, "store must have keys of width 32, got 64"),
        (_other, 8, "model must be the LlamaForCausalLM .* other numbers in its weights"),
        (lambda model: store(tiny("gpt2"), dim=16), 8, "model must be a GPT2LMHeadModel .* got a LlamaForCausalLM"),
        (lambda model: store(model, ["abcde"]), 5, "k must be at most the 4 records of the store, got 5"),
        (_emptied, 8, "store must hold records, got none"),
    ],
    ids=["width", "weights", "kind", "k", "empty"],
)
def test_refusals_attach_nothing(make, k, sentence):
    model = tiny("llama")
    keys = set(model.state_dict())
    made = make(model)
    with pytest.raises(ValueError, match=sentence):
        mkt.attach(model, mkt.Neighbours(made, k=k))
    assert set(model.state_dict()) == keys and not hasattr(model, "mk_memory")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_refusals_of_arguments():
    model = tiny("llama")
    made = store(model)
    with pytest.raises(TypeError, match="store must be a TokenStore, got str"):
        mkt.Neighbours("somewhere")
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        mkt.Neighbours(made, k=0)
    with pytest.raises(ValueError, match="cache must be an integer of at least 0, got -1"):
        mkt.Neighbours(made, cache=-1)
    with pytest.raises(ValueError, match="shares must be two numbers"):
        mkt.Neighbours(made, shares=(0.5, 0.5))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        mkt.Neighbours(made, temperature=0.0)
    handle = mkt.attach(model, mkt.Neighbours(made, k=4))
    with pytest.raises(ValueError, match="tokenizer must have the vocabulary"):
        handle.fit([TEXT], Letters(shift=1))
    with pytest.raises(ValueError, match="data must hold a text of at least 2 tokens, got none"):
        handle.fit(["x"], progress=False)
    with pytest.raises(ValueError, match="must be given input_ids, got embeddings"):
        model(inputs_embeds=torch.randn(1, 4, 32))


def test_scores_are_those_of_the_mixed_distribution():
    """By score, window after window, against the log-probabilities that the model returns; without the memory too."""
    model, tokens = tiny("llama"), ids(TEXT)[:41]
    handle = attached(model, cache=16)
    stir(handle.memories[0])
    for context in (contextlib.nullcontext(), handle.disabled()):
        with context, torch.no_grad():
            wanted, cache = [], None
            for first in (0, 25):
                piece = tokens[first : first + 25][: len(tokens) - first - 1]
                given = {} if cache is None else {cache_name(model): mkt.next_window(model, cache)}
                output = model(piece[None], use_cache=handle.enabled, **given)
                cache = cache_of(output) if handle.enabled else None
                own = output.logits[0].double().log_softmax(-1)
                wanted.append(-own.gather(-1, tokens[first + 1 : first + 1 + len(piece), None])[:, 0])
            found = mkt.score(handle, tokens, window=25)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.cat(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_writes_no_distribution_and_copies_no_logits(dtype, monkeypatch):
    """The kernels get the model's own logits; log-probabilities are formed where they are returned, and only there."""
    model, tokens = tiny("llama").to(dtype), ids(TEXT)[:40]
    handle, read, formed = attached(model), [], []

    def nll(logits, *rest):
        read.append(logits)
        return mk.cache_nll(logits, *rest)

    def logprobs(logits, *rest):
        formed.append(logits)
        return mk.cache_logprobs(logits, *rest)

    monkeypatch.setattr(passes, "cache_nll", nll)
    monkeypatch.setattr(passes, "cache_logprobs", logprobs)
    with torch.no_grad():
        whole = model(tokens[None], labels=tokens[None])
        assert len(formed) == 1 and whole.logits.dtype == torch.float32
        with handle.loss_only():
            alone = model(tokens[None], labels=tokens[None])
            unlabelled = model(tokens[None])
        assert alone.logits is None and torch.equal(alone.loss, whole.loss) and len(formed) == 2
        assert torch.equal(unlabelled.logits, whole.logits)
        mkt.score(handle, tokens)
    assert len(formed) == 2 and len(read) == 3 and all(x.dtype == dtype for x in (*read, *formed))
    chosen = whole.logits[0, :-1].double().gather(-1, tokens[1:, None])
    torch.testing.assert_close(whole.loss.double(), -chosen.mean(), atol=1e-5, rtol=1e-5)
    with handle.loss_only(), handle.disabled(), torch.no_grad():
        assert model(tokens[None], labels=tokens[None]).logits is not None


def test_labels_that_are_ignored_have_no_loss_and_no_gradient():
    model, tokens = tiny("llama"), ids(TEXT)[:30]
    handle = attached(model)
    labels = tokens.clone()
    labels[5:20] = -100
    output = model(tokens[None], labels=labels[None])
    kept = labels[1:] != -100
    chosen = output.logits[0, :-1].gather(-1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(output.loss, -chosen[kept].mean(), atol=1e-5, rtol=1e-5)
    parameters = [p for p in handle.parameters() if p.requires_grad]
    by_loss = torch.autograd.grad(output.loss, parameters, retain_graph=True)
    by_hand = torch.autograd.grad(-chosen[kept].mean(), parameters)
    for a, b in zip(by_loss, by_hand):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
