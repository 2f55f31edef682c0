"""MemoryAttention with merge="lse" against one softmax over the keys of the text and of the memory, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers_support import FAMILIES, PAD, cache_name, cache_of, stir, tiny, tokens, watched

from memkernels.integrations import transformers as mkt
from memkernels.integrations.transformers.attention import read_with_lse

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 20


def given_to(model, layer: int, call) -> dict[str, torch.Tensor]:
    """What transformers gives to the attention of a block in a pass: rotated, with the keys of the cache."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    found = {}

    def note(module, query, key, value, mask, scaling=None, **options):
        if module.layer_idx == layer:
            found.update(query=query, key=key, value=value, mask=mask[..., : key.shape[-2]])
            found["scaling"] = 8**-0.5 if scaling is None else scaling  # not told by GPT-2 of transformers 4
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)

    AttentionInterface.register("noting", note)
    AttentionMaskInterface.register("noting", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("noting")
    call()
    model.set_attn_implementation(before)
    return found


def over_both(given, query, keys, values, bias):
    """Softmax over the text's keys and the memory's: ``[B, T, H, K]`` and the weights of the memory ``[B, T, H, N]``.

    given: of the text. query: ``[B, T, H, K]`` before any rotation. keys, values: ``[N, Hkv, K]``. bias: ``[H]``.
    """
    heads = query.shape[-2]
    groups = heads // keys.shape[1]
    text_keys, text_values = (given[name].repeat_interleave(groups, 1).double() for name in ("key", "value"))
    keys, values = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (keys, values))  # [H, N, K]
    own = given["query"].double() @ text_keys.mT * given["scaling"] + given["mask"].double()
    old = query.transpose(1, 2) @ keys.mT * given["scaling"] + bias.view(-1, 1, 1)
    weights = torch.softmax(torch.cat([own, old], -1), -1)
    own, old = weights.split([own.shape[-1], old.shape[-1]], -1)
    return (own @ text_values + old @ values).transpose(1, 2), old.transpose(1, 2)


def calls(kind: str):
    """Arguments of a pass, and which tokens are real."""
    if kind == "padded":
        ids = torch.cat([torch.full((1, 9), PAD), tokens(1, 9)])
        ids[0, 4:] = tokens(5, seed=1)
    else:
        ids = tokens(2, 9)
    real = ids != PAD
    given = {"input_ids": ids}
    if kind == "padded":
        given["attention_mask"] = real.long()
    if kind == "gap":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, 3] = 0
    return given, real


@pytest.mark.parametrize("kind", ("whole", "padded", "gap"))
@pytest.mark.parametrize("implementation", ("sdpa", "eager", "memkernels"))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_softmax_over_the_text_and_the_memory(family, implementation, kind):
    mkt.register_attention()
    exact = implementation != "eager"  # which computes its softmax in float32
    model, text = tiny(family).to(torch.float64 if exact else torch.float32), tokens(24, seed=4)
    model.set_attn_implementation(implementation)
    noted = watched(model, family, 1)
    for piece in text.split(10):
        model(piece[None])
    keys, values = (torch.cat(noted[name], 1)[0, -SIZE:].double() for name in "kv")
    call, real = calls(kind)
    close = {"atol": 1e-9 if exact else 1e-4, "rtol": 0}
    noted["q"].clear()
    given = given_to(model, 1, lambda: model(**call, use_cache=False))
    query = noted["q"][0].double()
    before = model(**call, use_cache=False).logits
    handle = mkt.attach(model, mkt.MemoryAttention(1, size=SIZE, k=SIZE, merge="lse"))
    memory, attention = handle.memories[0], handle.place.attention(1)
    assert torch.equal(model(**call, use_cache=False).logits, before)  # while nothing was read in
    handle.read_in(None, text, window=10)
    into = []
    output = attention.c_proj if family == "gpt2" else attention.o_proj
    output.register_forward_pre_hook(lambda m, a: into.append(a[0].unflatten(-1, (4, 8))))
    for bias in (torch.zeros(4), torch.tensor([0.5, -1.0, 2.0, -30.0])):
        memory.bias.copy_(bias)
        model(**call, use_cache=False)
        wanted, weights = over_both(given, query, keys, values, bias)
        torch.testing.assert_close(into.pop()[real].double(), wanted[real], **close)
        told = handle.reads["0.1"]
        at = told.slots.sub(24 - SIZE).remainder(SIZE)  # the oldest slot is that of the token 24 - SIZE
        torch.testing.assert_close(told.weights[real].double(), weights.gather(-1, at)[real], **close)
    assert attention.config is model.config
    with handle.disabled():
        assert torch.equal(model(**call, use_cache=False).logits, before)
    handle.detach()
    assert torch.equal(model(**call, use_cache=False).logits, before) and attention.config is model.config


@pytest.mark.parametrize("implementation", ("sdpa", "eager", "memkernels"))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_pieces_in_beams_and_saved(family, implementation, tmp_path):
    mkt.register_attention()
    model, ids = tiny(family), tokens(2, 12)
    model.set_attn_implementation(implementation)
    handle = mkt.attach(model, mkt.MemoryAttention(1, size=16, k=4, merge="lse"))
    handle.read_in(None, tokens(30, seed=9), window=16)
    stir(handle)
    whole = model(ids, use_cache=False).logits
    parts, cache = [], None
    for piece in ids.split([5, 1, 1, 3, 2], 1):
        given = {} if cache is None else {cache_name(model): cache}
        out = model(piece, use_cache=True, **given)
        parts, cache = [*parts, out.logits], cache_of(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    assert handle.reads["0.1"].slots.shape == (2, 12, 4, 4)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    wanted = model.generate(ids, num_beams=3, use_cache=False, **how)
    assert torch.equal(model.generate(ids, num_beams=3, **how), wanted)
    static = model.generate(ids, cache_implementation="static", **how)
    assert torch.equal(static, model.generate(ids, use_cache=False, **how))
    handle.save(tmp_path)
    handle.detach()
    mkt.load(model, tmp_path)
    assert torch.equal(model(ids, use_cache=False).logits, whole)


def test_gradients_checkpointing_and_dropout():
    """The shares learn; a replayed block gives the same; dropout of the model's attention reaches the text alone."""
    model, ids = tiny("llama", attention_dropout=0.5).train(), tokens(2, 9)
    handle = mkt.attach(model, mkt.MemoryAttention(1, size=16, k=4, merge="lse"))
    handle.read_in(None, tokens(30, seed=9), window=16)

    def gradient():
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return handle.memories[0].bias.grad.clone()

    plain = gradient()
    assert float(plain.abs().min()) > 0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradient(), plain, atol=1e-6, rtol=1e-4)
    model.eval()
    still = gradient()
    assert not torch.allclose(plain, still, atol=1e-5)


def test_all_weights_at_once_are_those_of_the_read():
    """Masks of each kind and a sink, in float64; dropout takes weights away, and leaves the log-sum-exp."""
    torch.manual_seed(0)
    module = nn.Module()  # causal, as one that does not say otherwise
    query, key = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2))
    value = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)  # the read is the weights
    gap = torch.ones(2, 1, 5, 5).tril().bool()
    gap[:, :, 3:, 1] = False
    ranges = torch.tensor([[0, 1], [0, 2], [1, 3], [0, 0], [2, 5]]).expand(2, 1, 5, 2)
    kinds = {"none": None, "ranges": ranges, "gap": gap, "added": torch.randn(2, 1, 5, 5, dtype=torch.float64)}
    logit = torch.randn(4, dtype=torch.float64)
    for (name, mask), sink in itertools.product(kinds.items(), (None, logit)):
        added = torch.full((2, 1, 5, 5), -torch.inf, dtype=torch.float64)
        if name == "ranges":
            for t, (first, stop) in enumerate(ranges[0, 0].tolist()):
                added[:, :, t, first:stop] = 0
        else:
            added = mask if name == "added" else added.masked_fill(gap if name == "gap" else ones_below(5), 0)
        scores = query @ key.repeat_interleave(2, 1).mT * 0.3 + added
        others = torch.full((2, 4, 5), -torch.inf).double() if sink is None else logit.view(1, 4, 1).expand(2, 4, 5)
        lse = torch.logsumexp(torch.cat([scores, others.unsqueeze(-1)], -1), -1)
        weights = torch.where(scores == -torch.inf, 0, torch.exp(scores - lse.unsqueeze(-1)))
        given = (module, query, key, value, mask, 0.3)
        for dropped in (0.0, 0.5):
            read, found = read_with_lse(*given, dropout=dropped, s_aux=sink)
            torch.testing.assert_close(found.flatten(1, 2), lse, atol=1e-10, rtol=0)
            got = read.flatten(1, 2)
            if not dropped:
                torch.testing.assert_close(got, weights, atol=1e-10, rtol=0)
                continue
            kept = got != 0
            assert 0.2 < kept[weights > 0].double().mean() < 0.8
            torch.testing.assert_close(got[kept], 2 * weights[kept], atol=1e-10, rtol=0)


def ones_below(size):
    return torch.ones(1, 1, size, size).tril().bool()


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model, ids = tiny("llama"), tokens(1, 5)
    before = model(ids).logits
    handle = mkt.attach(model, mkt.MemoryAttention(1, size=16, k=4, merge="lse"))
    handle.read_in(None, tokens(30, seed=9), window=16)
    attention = handle.place.attention(1)

    def fail(module, args):
        raise RuntimeError("broken off")

    broken = attention.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        model(ids)
    broken.remove()
    assert attention.config is model.config
    handle.detach()
    assert torch.equal(model(ids).logits, before)


def test_what_is_refused():
    with pytest.raises(ValueError, match="MemoryAttention: merge must be one of .*, got 'sum'"):
        mkt.MemoryAttention(0, 8, merge="sum")
    with pytest.raises(ValueError, match="MemoryAttention: gate must be 0 with merge='lse', got 0.5"):
        mkt.MemoryAttention(0, 8, merge="lse", gate=0.5)

    model = tiny("llama")

    class Own(type(model.model.layers[1].self_attn)):
        """An attention from elsewhere."""

    Own.__module__ = "torch.nn"
    model.model.layers[1].self_attn.__class__ = Own
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match="merge='lse' must have an attention of transformers' interface, got a Own"):
        mkt.attach(model, mkt.MemoryAttention(1, 8, merge="lse"))
    assert list(model.state_dict()) == keys
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="softcap must be None, got 50.0"):
        read_with_lse(nn.Module(), q, k, k, None, softcap=50.0)
    with pytest.raises(TypeError, match=r"mask must be \[B, 1, T, N\] or ranges, got \[1, 3\]"):
        read_with_lse(nn.Module(), q, k, k, torch.ones(1, 3))
