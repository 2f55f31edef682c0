"""Memories in pretrained models: alike in pieces, padded and in beams; gone without a trace; saved and loaded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support import run_python
from torch import nn
from transformers_support import BLOCKS, FAMILIES, PAD, WIDTH, WORDS, cache_name, cache_of, stir, tiny, tokens

import memkernels as mk
from memkernels.integrations import transformers as mkt

pytestmark = pytest.mark.filterwarnings("ignore")


class Recent(mkt.Memory):
    """Votes for what followed the last states of the same text: a mixture whose state rides in the cache."""

    mixes = True

    def build(self, place):
        self.mix = nn.Parameter(torch.tensor(0.3))
        self.ready = place.width

    def inputs(self, place):
        return {"key": place.feed_forward(1)}

    def finish(self, step):
        x = step.input_of(self, "key").float()
        tokens = step.input_ids if step.token_mask is None else step.input_ids.masked_fill(~step.token_mask, -1)
        old = step.state(self, "past")
        keys = x if old is None else torch.cat([old[0], x], 1)
        ids = tokens if old is None else torch.cat([old[1], tokens], 1)
        step.keep(self, "past", (keys, ids))
        self.keys, self.ids, self.now = keys, ids, x

    def mixture(self, step, logits):
        now = step.with_logits(self.now)
        before, count = self.keys[:, :-1], self.keys.shape[1]
        followed = self.ids[:, 1:].unsqueeze(1).expand(-1, now.shape[1], -1)
        scores = now @ before.mT
        position = step.with_logits(torch.arange(count - self.now.shape[1], count).expand(len(now), -1))
        hidden = torch.arange(count - 1) >= position.unsqueeze(-1)
        hidden = hidden | (followed < 0) | (self.ids[:, :-1] < 0).unsqueeze(1)
        return mkt.Mixture(scores.masked_fill(hidden, -torch.inf), followed, self.mix.expand(now.shape[:-1]))

    def crop(self, state, tokens):
        return tuple(x[:, :-tokens] for x in state)


def memories():
    return mkt.Streaming([0, -1], mem_size=8, heads=2), Recent()


def attached(family: str, **options):
    model = tiny(family, **options)
    handle = mkt.attach(model, *memories())
    stir(handle.memories[0])
    return model, handle


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_attaching_changes_nothing_and_detaching_leaves_nothing(family):
    model, ids = tiny(family), tokens(2, 9)
    before, keys, found = model(ids).logits, list(model.state_dict()), hooks(model)
    handle = mkt.attach(model, mkt.Streaming([0, -1], mem_size=8, heads=2))
    assert torch.equal(model(ids).logits, before)
    stir(handle)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    with handle.disabled():
        assert torch.equal(model(ids).logits, before)
    assert [k for k in model.state_dict() if k.startswith("mk_memory.0.")] and hooks(model) > found
    handle.detach()
    handle.detach()
    assert torch.equal(model(ids).logits, before) and list(model.state_dict()) == keys and hooks(model) == found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pieces_equal_the_whole(family):
    model, _ = attached(family)
    ids = tokens(2, 12)
    whole, parts, cache = model(ids, use_cache=False).logits, [], None
    for piece in ids.split([5, 1, 1, 3, 1, 1], 1):
        given = {} if cache is None else {cache_name(model): cache}
        out = model(piece, use_cache=True, **given)
        parts, cache = [*parts, out.logits], cache_of(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_is_not_seen(family):
    model, _ = attached(family)
    long, short = tokens(1, 9), tokens(1, 5, seed=1)
    batch = torch.cat([torch.cat([torch.full((1, 4), PAD), short], 1), long])
    mask = (batch != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[:1, 4:], model(short).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1:], model(long).logits, atol=1e-4, rtol=0)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = model.generate(short, attention_mask=torch.ones_like(short), **how)[0, 5:]
    assert torch.equal(model.generate(batch, attention_mask=mask, **how)[0, 9:], alone)


@pytest.mark.parametrize("beams", (1, 3, 4))
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_with_a_cache_equal_beams_without(family, beams):
    model, _ = attached(family)
    ids = tokens(2, 9)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams}
    cached = model.generate(ids, do_sample=False, **how)
    assert torch.equal(cached, model.generate(ids, do_sample=False, use_cache=False, **how))


@pytest.mark.parametrize("family", ("gpt2", "qwen3", "gemma3"))
def test_beams_without_reordering_would_be_told(family, monkeypatch):
    """The test above sees a memory that does not follow its beams."""
    from memkernels.integrations.transformers.cache import MemoryCache

    model, _ = attached(family)
    ids = tokens(2, 9)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 4}
    right = model.generate(ids, do_sample=False, use_cache=False, **how)
    monkeypatch.setattr(MemoryCache, "_each", lambda self, change: None)
    assert not torch.equal(model.generate(ids, do_sample=False, **how), right)


@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_sampling_with_a_cache_equals_sampling_without(family):
    model, _ = attached(family)
    ids = tokens(2, 9)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": True, "top_p": 0.9}
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, use_cache=cached, num_return_sequences=2, **how))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_what_a_growing_one_gives(family):
    model = tiny(family)
    stir(mkt.attach(model, mkt.Streaming([0, -1], mem_size=8, heads=2)))
    batch = torch.cat([torch.full((1, 9), PAD), tokens(1, 9)])
    batch[0, 4:] = tokens(5, seed=1)
    how = {"attention_mask": (batch != PAD).long(), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    static = model.generate(batch, cache_implementation="static", **how)
    assert torch.equal(static, model.generate(batch, **how))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_to_keep(family):
    model, _ = attached(family)
    ids = tokens(2, 9)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5, rtol=0)
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, whole[:, chosen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_mixture(family):
    """Against the formula in float64: p = (1 - mix) softmax(logits) + mix * votes."""
    model, handle = attached(family)
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    recent = handle.memories[1]
    recent.mixes = False  # the model's own logits, of the same hidden states
    raw = model(ids).logits.double()
    recent.mixes = True
    scores, voted, mix = (x.double() for x in recent.mixture(handle._passes.done or _step(model, handle, ids), raw))
    votes = torch.zeros_like(raw).scatter_add_(-1, voted.long(), torch.softmax(scores, -1).nan_to_num(0))
    share = mix.unsqueeze(-1) * (votes.sum(-1, keepdim=True) > 0)
    wanted = ((1 - share) * torch.softmax(raw, -1) + share * votes).log()
    torch.testing.assert_close(out.logits.double(), wanted, atol=1e-4, rtol=0)
    kept = labels[:, 1:] != -100
    nll = -wanted[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][kept]
    torch.testing.assert_close(out.loss.double(), nll.mean(), atol=1e-5, rtol=0)
    total = model(ids, labels=labels, num_items_in_batch=40).loss
    torch.testing.assert_close(total.double(), nll.sum() / 40, atol=1e-5, rtol=0)


def _step(model, handle, ids):
    found = []
    original = handle.memories[1].mixture
    handle.memories[1].mixture = lambda step, logits: found.append(step) or original(step, logits)
    model(ids)
    del handle.memories[1].mixture
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    """Two texts with paddings of their own are under way at once: a replay finds the pass that it belongs to."""
    model, handle = attached(family)
    model.train()
    texts = [(tokens(2, 9), torch.ones(2, 9, dtype=torch.long)), (tokens(2, 9, seed=5), torch.ones(2, 9).long())]
    texts[0][1][0, :3] = 0
    texts[1][1][1, :5] = 0

    def gradients():
        model.zero_grad()
        sum(model(x, attention_mask=m, labels=x, use_cache=False).loss for x, m in texts).backward()
        return [p.grad.clone() for p in handle.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_to_the_bit(family, tmp_path):
    model, handle = attached(family)
    ids = tokens(2, 9)
    wanted = model(ids).logits
    handle.save(tmp_path)
    handle.detach()
    again = mkt.load(model, tmp_path)
    assert torch.equal(model(ids).logits, wanted)
    assert [type(m).__name__ for m in again.memories] == ["Streaming", "Recent"]
    again.detach()
    other = tiny(family)
    next(other.get_decoder().parameters() if family != "gpt2" else other.parameters()).data.mul_(1.1)
    with pytest.raises(ValueError, match="load: model must be the .* trained beside"):
        mkt.load(other, tmp_path)
    assert not hasattr(other, "mk_memory")


def test_a_model_in_16_bits_is_the_same_model(tmp_path):
    model, handle = attached("llama")
    handle.save(tmp_path)
    half = tiny("llama").to(torch.bfloat16)
    loaded = mkt.load(half, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = tokens(2, 9)
    out = half(ids, labels=ids)
    assert out.logits.dtype == torch.float32 and torch.isfinite(out.loss)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, atol=0.1, rtol=0)


def test_a_saved_file_says_what_it_is(tmp_path):
    _, handle = attached("llama")
    handle.save(tmp_path)
    record = json.loads((tmp_path / "memory.json").read_text())
    assert record["memories"][0] == {"kind": "Streaming", "options": handle.memories[0].options}
    record["format"] = 99
    (tmp_path / "memory.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="load: folder must be of format"):
        mkt.load(tiny("llama"), tmp_path)
    with pytest.raises(FileNotFoundError, match="load: folder must hold memory.json"):
        mkt.load(tiny("llama"), tmp_path / "none")


def test_fit_trains_the_memories_alone():
    model = tiny("llama")
    handle = mkt.attach(model, mkt.Streaming([1], mem_size=8, heads=2))
    base = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("mk_memory")}
    data = tokens(1, 16).repeat(8, 1)
    losses = handle.fit(data, steps=40, lr=2e-2, progress=False)
    assert losses[0] > math.log(WORDS) - 0.5 and losses[-1] < losses[0] - 1
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    assert all(p.requires_grad for p in model.parameters()) and not model.training


@torch.no_grad()
def test_a_cache_carries_the_memory_through_all_that_is_done_to_it():
    model, _ = attached("llama")
    ids = tokens(3, 9)
    name = cache_name(model)

    def after(change, rows):
        cache = cache_of(model(ids[:, :6], use_cache=True))
        change(cache)
        return model(rows[:, 6:], use_cache=True, **{name: cache}).logits

    whole = model(ids).logits[:, 6:]
    order = torch.tensor([2, 0, 0])
    got = after(lambda c: c.reorder_cache(order), ids[order])
    torch.testing.assert_close(got, whole[order], atol=1e-4, rtol=0)
    got = after(lambda c: c.batch_select_indices(order[:2]), ids[order[:2]])
    torch.testing.assert_close(got, whole[order[:2]], atol=1e-4, rtol=0)
    got = after(lambda c: c.batch_repeat_interleave(2), ids.repeat_interleave(2, 0))
    torch.testing.assert_close(got, whole.repeat_interleave(2, 0), atol=1e-4, rtol=0)


@torch.no_grad()
def test_crop_is_followed_where_it_can_be_and_refused_elsewhere():
    model = tiny("llama")
    handle, ids, name = mkt.attach(model, Recent()), tokens(2, 9), cache_name(model)
    whole = model(ids).logits[:, 6:]
    cache = cache_of(model(torch.cat([ids[:, :6], ids[:, :2]], 1), use_cache=True))
    cache.crop(-2)
    got = model(ids[:, 6:8], use_cache=True, **{name: cache}).logits
    torch.testing.assert_close(got, whole[:, :2], atol=1e-4, rtol=0)
    if name == "cache":
        cache.crop(0)  # removes nothing
        with pytest.raises(ValueError, match="positive"):
            cache.crop(3)  # refused by transformers: the memory keeps what it has
    cache.crop(-1 if name == "cache" else 7)  # before transformers 5.24 a positive count is the length that stays
    got = model(ids[:, 7:], use_cache=True, **{name: cache}).logits
    torch.testing.assert_close(got, whole[:, 1:], atol=1e-4, rtol=0)
    handle.detach()
    model, _ = attached("llama")
    cache = cache_of(model(ids, use_cache=True))
    with pytest.raises(NotImplementedError, match="Streaming: crop must undo"):
        cache.crop(-2)
    assert cache.get_seq_length() == 9


def test_assisted_generation_is_refused_where_tokens_cannot_be_undone():
    """An assistant guesses tokens; what the model does not accept is taken back."""
    ids, assistant = tokens(1, 9), tiny("llama", initializer_range=0.2)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    model = tiny("llama")
    mkt.attach(model, Recent())
    plain = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **how), plain)
    model, _ = attached("llama")
    with pytest.raises(NotImplementedError, match="Streaming: crop must undo"):
        model.generate(ids, assistant_model=assistant, **how)


def test_a_cache_that_is_none_is_refused():
    """Continuous batching brings pages of its own."""
    model, _ = attached("llama")
    with pytest.raises(TypeError, match="memory: the model's cache must be a transformers Cache, got object"):
        model(tokens(1, 5), **{cache_name(model): object()})


class Headless(nn.Module):
    config = None


def test_what_cannot_be_attached_is_refused_whole():
    with pytest.raises(TypeError, match="attach: model must be a decoder"):
        mkt.attach(Headless(), mkt.Streaming([0], 8))
    with pytest.raises(TypeError, match="attach: model must have a language model's head"):
        mkt.attach(tiny("llama").model, mkt.Streaming([0], 8))
    model = tiny("llama")
    found, keys = hooks(model), list(model.state_dict())
    with pytest.raises(ValueError, match="attach: memories must be at least one"):
        mkt.attach(model)
    with pytest.raises(TypeError, match="attach: memories must be Memory objects, got int"):
        mkt.attach(model, 3)
    with pytest.raises(ValueError, match=f"Streaming: layers must lie in -{BLOCKS}..{BLOCKS - 1}, got 7"):
        mkt.attach(model, mkt.Streaming([0], 8), mkt.Streaming([7], 8))
    with pytest.raises(ValueError, match=f"heads must divide width {WIDTH}, got 5"):
        mkt.attach(model, mkt.Streaming([0], 8, heads=5))
    assert hooks(model) == found and list(model.state_dict()) == keys
    handle = mkt.attach(model, mkt.Streaming([0], 8))
    with pytest.raises(ValueError, match="attach: model must have no attachment"):
        mkt.attach(model, mkt.Streaming([0], 8))
    with pytest.raises(ValueError, match="attach: each memory must be attached once"):
        mkt.attach(tiny("llama"), handle.memories[0])


def test_calls_that_a_memory_cannot_serve_are_refused():
    model, handle = attached("llama")
    batch = torch.cat([torch.full((2, 2), PAD), tokens(2, 5)], 1)
    with pytest.raises(ValueError, match="memory: attention_mask must be given with a batch padded on the left"):
        model(batch)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="memory: Streaming must have one text per row"):
        model(tokens(1, 5), position_ids=positions)
    model.register_forward_hook(lambda m, a, o: setattr(o, "logits", None) or o, prepend=True)
    with pytest.raises(RuntimeError, match="memory: the model must return logits to be mixed"):
        model(tokens(1, 5))
    with pytest.raises(ValueError, match="read_in: a memory must keep a text"):
        handle.read_in(None, tokens(5))
    with pytest.raises(TypeError, match="fit: tokenizer must be given with a text"):
        handle.fit("some text")
    other = lambda text, **options: {"input_ids": [3, WORDS]}  # noqa: E731
    with pytest.raises(
        ValueError, match=f"fit: tokenizer must be that of the model, of {WORDS} tokens, got the id {WORDS}"
    ):
        handle.fit("some text", other)


def test_a_missing_package_gives_one_sentence():
    code = "import sys; sys.modules['transformers'] = None\ntry: import memkernels.integrations.transformers\n"
    said = run_python(code + "except ImportError as error: print(error)").stdout
    assert "needs transformers, which is not installed (pip install 'memkernels[transformers]')" in said
    assert run_python("import sys, memkernels; print('transformers' in sys.modules)").stdout.strip() == "False"
    assert mk.__version__
