"""attn_implementation="memkernels" against the attention that transformers has of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers_support import FAMILIES, PAD, stir, tiny, tokens

from memkernels.integrations import transformers as mkt
from memkernels.integrations.transformers import attention

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def counted(monkeypatch):
    """How many calls softmax_read served, and how many went to PyTorch."""
    calls = {"ours": 0, "sdpa": 0}
    read, sdpa = attention.softmax_read, attention._sdpa

    def ours(*args, **kwargs):
        calls["ours"] += 1
        return read(*args, **kwargs)

    def theirs(*args, **kwargs):
        calls["sdpa"] += 1
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(attention, "softmax_read", ours)
    monkeypatch.setattr(attention, "_sdpa", theirs)
    return calls


def pair(family: str):
    """The same model twice: with PyTorch's attention, and with ours."""
    mkt.register_attention()
    ours = tiny(family)
    ours.set_attn_implementation("memkernels")
    theirs = tiny(family)
    theirs.set_attn_implementation("sdpa")
    return ours, theirs


def padded():
    batch = torch.cat([torch.full((1, 12), PAD), tokens(1, 12)])
    batch[0, 5:] = tokens(7, seed=1)
    mask = (batch != PAD).long()
    return {"input_ids": batch, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def packed():
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    return {"input_ids": tokens(1, 12), "position_ids": positions}


CALLS = {"causal": lambda: {"input_ids": tokens(2, 12)}, "padded": padded, "packed": packed}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_sdpa(family, call, counted):
    given = CALLS[call]()
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    results = []
    for model in pair(family):
        logits = model(**given, use_cache=False).logits[real]
        logits.square().mean().backward()
        results.append((logits.detach(), {k: p.grad for k, p in model.named_parameters()}))
    (ours, d_ours), (theirs, d_theirs) = results
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    largest = max(float(g.abs().max()) for g in d_theirs.values())
    for name, gradient in d_theirs.items():
        torch.testing.assert_close(d_ours[name], gradient, atol=1e-4 * largest, rtol=0, msg=name)
    assert counted == {"ours": 3, "sdpa": 0}


@pytest.mark.parametrize("prompt", ("padded", "whole"))
@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_sdpa(family, cache, prompt, counted):
    """A prompt without padding has no mask at first, also where the cache has room for more."""
    given = padded() if prompt == "padded" else {"input_ids": tokens(2, 9)}
    given.pop("position_ids", None)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    ours, theirs = (model.generate(**given, **how) for model in pair(family))
    assert torch.equal(ours, theirs) and counted["ours"] > 0 and counted["sdpa"] == 0


def test_a_memory_beside_our_attention():
    """Padding is known from ranges, as from other masks."""
    ours, theirs = pair("gemma3")
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        stir(mkt.attach(model, mkt.Streaming([1], mem_size=8, heads=2)), size=1.0)
        given = padded()
        del given["position_ids"]
        how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
        results.append(model.generate(**given, **how))
    assert torch.equal(*results)


def test_what_is_no_range_goes_to_sdpa(counted):
    """A mask with gaps, and dropout."""
    ours, theirs = pair("llama")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 4] = 0
    given = {"input_ids": tokens(2, 12), "attention_mask": mask}
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=1e-4, rtol=0)
    assert counted == {"ours": 0, "sdpa": 3}
    model = tiny("llama", attention_dropout=0.5).train()
    model.set_attn_implementation("memkernels")
    model(tokens(2, 12))
    assert counted == {"ours": 0, "sdpa": 6}


def test_ranges_of_masks():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert attention.as_range(mask).tolist() == [[0, 2], [1, 4], [0, 0]]
    for row in ([1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1, 0]):
        gap = torch.tensor([[1] * len(row), row, [0] * len(row)]).bool()
        assert attention.as_range(gap) is gap
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # against the definition, on rows of every kind
        mask = torch.rand(2, 3, 5, generator=generator) < 0.7
        rows = [[i for i, here in enumerate(row) if here] for row in mask.flatten(0, -2).tolist()]
        if all(row == list(range(row[0], row[-1] + 1)) for row in rows if row):
            wanted = [[row[0], row[-1] + 1] if row else [0, 0] for row in rows]
            assert attention.as_range(mask).flatten(0, -2).tolist() == wanted
        else:
            assert attention.as_range(mask) is mask
    assert attention.as_range(torch.ones(2, 0, dtype=torch.bool)).tolist() == [[0, 0], [0, 0]]


def test_sinks_and_caps():
    """A logit per head that takes weight, in float64, for the last 3 of 5 tokens; capped scores are refused."""
    module = nn.Module()
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 4, dtype=torch.float64) for h, n in ((4, 3), (2, 5), (2, 5)))
    sink = torch.randn(4, dtype=torch.float64)
    ranges = torch.tensor([[0, 3], [0, 4], [0, 5]]).expand(2, 1, 3, 2)
    got, none = attention.attention(module, query, key, value, ranges, scaling=0.5, s_aux=sink)
    keys, values = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = (query @ keys.mT * 0.5).masked_fill(~torch.ones(3, 5).tril(2).bool(), -torch.inf)
    weights = torch.softmax(torch.cat([scores, sink.view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1), -1)[..., :-1]
    torch.testing.assert_close(got, (weights @ values).transpose(1, 2), atol=1e-10, rtol=0)
    assert none is None
    with pytest.raises(NotImplementedError, match="memkernels attention: softcap must be None, got 50.0"):
        attention.attention(module, query, key, value, None, softcap=50.0)
