"""The memories that learn in a pretrained model: their equations in float64, zero at first, in pieces, read back."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers_support import FAMILIES, PAD, WIDTH, cache_name, cache_of, stir, tiny, tokens, watched

from memkernels.integrations import transformers as mkt
from memkernels.nn import TokenMap
from memkernels.store import RowTable

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = {"orders": (2, 3), "heads": 2, "head_dim": 8}
ALL = {
    "streaming": lambda: mkt.Streaming([0, -1], mem_size=8, heads=2),
    "product keys": lambda: mkt.ProductKeys([0, -1], n=8, heads=2, k=4),
    "n-grams": lambda: mkt.Ngrams([0, 1], 50, **ROWS),
    "memory attention": lambda: mkt.MemoryAttention(1, size=64, k=4),
    "together": lambda: (mkt.Ngrams([0], 50, **ROWS), mkt.ProductKeys([1], 8, 2, 4), mkt.MemoryAttention(1, 64, 4)),
}


def give(model, kind):
    made = ALL[kind]()
    return mkt.attach(model, *(made if isinstance(made, tuple) else (made,)))


def fill(handle) -> None:
    """Memories that keep a text are given one."""
    if any(memory.reads_in for memory in handle.memories):
        handle.read_in(None, tokens(40, seed=9), window=16)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_changes_until_something_is_learned(family, kind, tmp_path):
    """Then: pieces equal the whole, padding is not seen, what is saved is loaded to the bit."""
    model, ids = tiny(family), tokens(2, 12)
    before, keys = model(ids).logits, list(model.state_dict())
    handle = give(model, kind)
    fill(handle)
    assert torch.equal(model(ids).logits, before)
    stir(handle)
    whole = model(ids, use_cache=False).logits
    assert not torch.allclose(whole, before, atol=1e-3)
    parts, cache = [], None
    for piece in ids.split([5, 1, 1, 3, 2], 1):
        given = {} if cache is None else {cache_name(model): cache}
        out = model(piece, use_cache=True, **given)
        parts, cache = [*parts, out.logits], cache_of(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    padded = torch.cat([torch.full((2, 3), PAD), ids], 1)
    mask = (padded != PAD).long()
    seen = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    torch.testing.assert_close(seen, whole, atol=1e-4, rtol=0)
    handle.save(tmp_path)
    handle.detach()
    assert torch.equal(model(ids).logits, before) and list(model.state_dict()) == keys
    mkt.load(model, tmp_path)
    assert torch.equal(model(ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("kind", ALL)
def test_beams_with_a_cache_equal_beams_without(kind):
    model = tiny("qwen3")
    handle = give(model, kind)
    fill(handle)
    stir(handle)
    ids = tokens(2, 9)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3}
    assert torch.equal(
        model.generate(ids, do_sample=False, **how), model.generate(ids, do_sample=False, use_cache=False, **how)
    )


@pytest.mark.parametrize("kind", ALL)
def test_every_parameter_has_a_gradient_and_checkpointing_keeps_it(kind):
    model = tiny("llama").train()
    handle = give(model, kind)
    fill(handle)
    stir(handle)
    ids = tokens(2, 9)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.mk_memory.named_parameters()}

    plain = gradients()
    assert all(float(g.abs().max()) > 0 for g in plain.values()), [k for k, g in plain.items() if not g.any()]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, atol=1e-6, rtol=1e-4)


def hidden_after(model, layer: int, call):
    """The hidden states that go into the block after ``layer``, or the last that come out of the decoder's blocks."""
    found = []
    block = model.get_decoder().layers[layer + 1]
    note = lambda m, a, k: found.append(a[0] if a else k["hidden_states"])  # noqa: E731
    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    call()
    handle.remove()
    return found[0]


def rms_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() * weight


def test_product_keys_follow_their_equation():
    """All n * n sums, a softmax over the k best, in float64; the reads tell the slots."""
    model, ids = tiny("llama").double(), tokens(2, 7)
    x = hidden_after(model, 0, lambda: model(ids))
    handle = mkt.attach(model, mkt.ProductKeys([0], n=6, heads=2, k=3))
    stir(handle)
    got = hidden_after(model, 0, lambda: model(ids))
    part = handle.memories[0].parts["0"]
    n = rms_norm(x, part.norm.weight)
    query = F.linear(n, part.project_query.weight, part.project_query.bias).unflatten(-1, (2, -1))  # [B, T, H, K]
    query = F.layer_norm(query, query.shape[-1:], part.norm_query.weight, part.norm_query.bias)
    half = query.shape[-1] // 2
    first = torch.einsum("bthd,hnd->bthn", query[..., :half], part.subkeys[:, 0])
    second = torch.einsum("bthd,hnd->bthn", query[..., half:], part.subkeys[:, 1])
    scores = ((first.unsqueeze(-1) + second.unsqueeze(-2)) / math.sqrt(2 * half)).flatten(-2)  # [B, T, H, n * n]
    best, slots = scores.topk(3, -1)
    weights = torch.softmax(best, -1)
    read = (weights.unsqueeze(-1) * part.values[slots]).sum((-2, -3))
    gate = F.silu(F.linear(n, part.project_gate.weight, part.project_gate.bias))
    torch.testing.assert_close(got, x + F.linear(gate * read, part.project_out.weight), atol=1e-9, rtol=0)
    told = handle.reads["0.0"]
    assert torch.equal(told.slots, slots)
    torch.testing.assert_close(told.weights, weights, atol=1e-9, rtol=0)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :4], use_cache=True))
        model(ids[:, 4:], use_cache=True, **{cache_name(model): cache})
    assert torch.equal(handle.reads["0.0"].slots, slots)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_product_keys_in_the_place_of_a_feed_forward_network(family):
    model, ids = tiny(family), tokens(2, 7)
    before = model(ids).logits
    handle = mkt.attach(model, mkt.ProductKeys([1], n=6, heads=2, k=3, mode="replace"))
    place = handle.place
    called = []
    inner = next(iter(place.feed_forward(1).children()))
    watch = inner.register_forward_pre_hook(lambda m, a: called.append(1))
    replaced = model(ids).logits
    assert not called and not torch.allclose(replaced, before, atol=1e-3)
    with handle.disabled():
        assert torch.equal(model(ids).logits, before) and called
    watch.remove()
    handle.detach()
    assert torch.equal(model(ids).logits, before) and "forward" not in vars(place.feed_forward(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_memory_attention_reads_what_was_read_in(family):
    """Against attention over all that was read, in float64: k is as many as there are slots."""
    model, text, ids = tiny(family).double(), tokens(24, seed=4), tokens(1, 5)
    noted = watched(model, family, 1)
    for piece in text.split(10):
        model(piece[None])
    key, value = (torch.cat(noted[name], 1)[0] for name in "kv")  # [N, Hkv, K]
    handle = mkt.attach(model, mkt.MemoryAttention(1, size=20, k=20, gate=0.3))
    assert handle.read_in(None, text, window=10) == 24
    memory = handle.memories[0]
    assert memory.filled == 20
    key, value = key[-20:], value[-20:]  # the first four are gone
    into: list[torch.Tensor] = []
    attention = handle.place.attention(1)
    output = attention.c_proj if family == "gpt2" else attention.o_proj
    output.register_forward_pre_hook(lambda m, a: into.append(a[0]), prepend=True)
    output.register_forward_pre_hook(lambda m, a: into.append(a[0]))
    noted["q"].clear()
    with_memory = model(ids).logits
    query = noted["q"][0][0]  # [T, H, K]
    local, got = (x[0].unflatten(-1, (4, 8)) for x in into)
    scale = model.config.query_pre_attn_scalar**-0.5 if family == "gemma3" else 8**-0.5
    for head in range(4):
        shared = head if family == "gpt2" else head // 2
        weights = torch.softmax(query[:, head] @ key[:, shared].T * scale, -1)
        wanted = local[:, head] + 0.3 * (weights @ value[:, shared] - local[:, head])
        torch.testing.assert_close(got[:, head], wanted, atol=1e-9, rtol=0)
    told = handle.reads["0.1"]
    assert told.slots.shape == (1, 5, 4, 20)
    torch.testing.assert_close(told.weights.sum(-1), torch.ones(1, 5, 4, dtype=torch.float64))
    memory.forget()
    without = model(ids).logits
    assert not torch.allclose(without, with_memory, atol=1e-6)
    with handle.disabled():
        assert torch.equal(model(ids).logits, without)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_memory_attention_tells_the_slots_that_it_read(family):
    """The 3 best of 20 by the model's own queries and keys, best first, and the tokens that they came from."""
    model, text, ids = tiny(family).double(), tokens(24, seed=4), tokens(2, 5)
    noted = watched(model, family, 1)
    for piece in text.split(10):
        model(piece[None])
    key = torch.cat(noted["k"], 1)[0, -20:]  # [N, Hkv, K] of the tokens 4..23
    handle = mkt.attach(model, mkt.MemoryAttention(1, size=20, k=3, gate=0.3))
    handle.read_in(None, text, window=10)
    noted["q"].clear()
    model(ids)
    query, told = noted["q"][0], handle.reads["0.1"]  # [B, T, H, K]
    key = key.repeat_interleave(4 // key.shape[1], 1)
    scale = model.config.query_pre_attn_scalar**-0.5 if family == "gemma3" else 8**-0.5
    best, at = (torch.einsum("bthk,nhk->bthn", query, key) * scale).topk(3, -1)
    assert torch.equal(told.slots, (at + 4) % 20)  # the token 20 took the place of the token 0
    torch.testing.assert_close(told.weights, torch.softmax(best, -1), atol=1e-9, rtol=0)


CHANGES = {  # of a cache after 6 tokens of 3 streams: what is done, and the streams that it leaves
    "crop": (lambda cache: cache.crop(-2), [0, 1, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "reset": (lambda cache: cache.reset(), [0, 1, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_was_read_follows_the_cache(change):
    model, ids = tiny("llama"), tokens(3, 9)
    handle = mkt.attach(model, mkt.ProductKeys([1], n=6, heads=2, k=3))
    stir(handle)
    act, streams = CHANGES[change]
    model(ids[streams], use_cache=False)
    wanted = handle.reads["0.1"]
    begun = torch.cat([ids[:, :6], ids[:, 1:3]], 1) if change == "crop" else ids[:, :6]
    cache = cache_of(model(begun, use_cache=True))
    act(cache)
    rest = ids[streams] if change == "reset" else ids[streams, 6:]
    model(rest, use_cache=True, **{cache_name(model): cache})
    told = handle.reads["0.1"]
    assert told.slots.shape == wanted.slots.shape
    if change == "reset" and cache.get_seq_length() != ids.shape[1]:
        return  # transformers 4 keeps the keys, as zeros
    assert torch.equal(told.slots, wanted.slots)
    torch.testing.assert_close(told.weights, wanted.weights, atol=1e-5, rtol=0)


@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once():
    """Windows see no other window, so that their sizes matter to the model, and not to the order of the slots."""
    model = tiny("llama")
    handle = mkt.attach(model, mkt.MemoryAttention(0, size=16, k=4))  # the first block: keys without a context
    text = tokens(22, seed=3)
    handle.read_in(None, text, window=22)
    whole = handle.memories[0].keys.clone()
    handle.memories[0].forget()
    for piece in text.split([3, 12, 7]):
        handle.read_in(None, piece, window=5)
    again = handle.memories[0].keys
    order = (torch.arange(22 - 16, 22) % 16)[None].expand(2, -1)
    torch.testing.assert_close(again[:, 0, order[0]], whole[:, 0, order[0]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_ngrams_read_rows_from_files(tmp_path):
    """A table on disk gives what the parameter gave, in pieces too."""
    model, ids = tiny("llama"), tokens(2, 9)
    known = TokenMap(torch.arange(97) // 2)
    handle = mkt.attach(model, mkt.Ngrams([0, 1], 50, token_map=known, **ROWS))
    stir(handle)
    wanted = model(ids).logits
    memory = handle.memories[0]
    paths = [str(tmp_path / f"rows{layer}") for layer in (0, 1)]
    for layer, path in zip((0, 1), paths):
        memory.parts[str(layer)].save_table(path).close()
    state = {k: v for k, v in memory.state_dict().items() if not k.endswith(".weight") or "value" in k or "key" in k}
    handle.detach()
    on_disk = mkt.Ngrams([0, 1], 50, token_map=known.map.tolist(), tables=paths, tier="mmap", **ROWS)
    handle = mkt.attach(model, on_disk)
    on_disk.load_state_dict(state)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)
    handle.save(tmp_path / "saved")
    handle.detach()
    mkt.load(model, tmp_path / "saved")
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="Ngrams: the model must be given input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, WIDTH))
    with pytest.raises(ValueError, match="Ngrams: tables must be one per layer, 2, got 1"):
        mkt.Ngrams([0, 1], 50, tables=[RowTable])


@pytest.mark.parametrize("kind", ("streaming", "product keys", "n-grams"))
def test_a_memory_learns_what_a_frozen_model_does_not_know(kind):
    """Random texts are learned by heart by the memory alone."""
    handle = give(tiny("llama"), kind)
    losses = handle.fit(tokens(4, 16), steps=60, lr=3e-2, progress=False)
    assert losses[0] > 4 and losses[-1] < 1, (losses[0], losses[-1])


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: mkt.ProductKeys([0], 8, mode="x"), "ProductKeys: mode must be one of"),
        (lambda: mkt.ProductKeys([0], 0), "ProductKeys: n must be at least 1, got 0"),
        (lambda: mkt.ProductKeys([0], 8, key_dim=3), "ProductKeys: key_dim must be even, got 3"),
        (lambda: mkt.MemoryAttention(0, 0), "MemoryAttention: size must be at least 1, got 0"),
        (lambda: mkt.MemoryAttention(0, 8, gate=1.0), "MemoryAttention: gate must lie in 0..1, below 1, got 1.0"),
    ],
)
def test_options_that_make_no_sense(make, said):
    with pytest.raises(ValueError, match=said):
        make()
