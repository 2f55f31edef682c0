"""Memories beside what people train with: Trainer, LoRA, 16 bits, the compiler."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers_support import FAMILIES, cache_name, stir, tiny, tokens

from memkernels.integrations import transformers as mkt

pytestmark = pytest.mark.filterwarnings("ignore")


def some():
    return mkt.Streaming([0], mem_size=8, heads=2), mkt.ProductKeys([1], n=8, heads=2, k=4)


def test_trainer_trains_memories_beside_frozen_weights(tmp_path):
    """Two steps are accumulated into one, blocks are checkpointed; a checkpoint of the Trainer holds the memory."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = tiny("llama")
    model.requires_grad_(False)
    handle = mkt.attach(model, *some())
    ids = tokens(8, 16)
    data = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]
    base = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("mk_memory")}
    with torch.no_grad():
        before = model(ids, labels=ids).loss.item()
    options = {"learning_rate": 2e-2, "max_steps": 16, "per_device_train_batch_size": 4, "use_cpu": True}
    quiet = {
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": 16,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    replay = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, **options, **quiet, **replay)
    Trainer(model, arguments, train_dataset=data).train()
    model.eval()
    with torch.no_grad():
        after = model(ids, labels=ids).loss.item()
    assert after < before - 1, (before, after)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-16" / "model.safetensors")
    memory = {k: v for k, v in model.state_dict().items() if k.startswith("mk_memory")}
    assert memory and all(torch.equal(saved[k], v) for k, v in memory.items())
    handle.save(tmp_path / "mem")
    handle.detach()
    mkt.load(model, tmp_path / "mem")
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == after


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = tiny("qwen3")
    handle = mkt.attach(model, *some())
    stir(handle)
    ids = tokens(4, 12)
    model(ids, labels=ids).loss.backward()
    whole = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    for half in ids.split(2):
        (model(half, labels=half).loss / 2).backward()
    torch.testing.assert_close([p.grad for p in handle.parameters()], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ("lora", "memory"))
def test_lora_beside_a_memory(first, tmp_path):
    """In either order; both learn, and the memory is loaded beside the bare model."""
    peft = pytest.importorskip("peft")
    bare = tiny("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    if first == "lora":
        model = peft.get_peft_model(bare, config)
        handle = mkt.attach(model, *some())
    else:
        handle = mkt.attach(bare, *some())
        model = peft.get_peft_model(bare, config)
        for parameter in handle.parameters():  # get_peft_model froze all that there was
            parameter.requires_grad_()
    stir(handle)
    ids = tokens(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in name for name in learned) and any("mk_memory" in name for name in learned)
    assert not [name for name in learned if "lora_" not in name and "mk_memory" not in name]
    wanted = model(input_ids=ids).logits  # lora_B is still zero: the adapters change nothing
    handle.save(tmp_path)
    fresh = tiny("llama")
    mkt.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(ids).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    """Weights of the memory stay in float32, hidden states in the model's dtype; cached is as uncached."""
    model = tiny(family, initializer_range=0.02).to(torch.bfloat16)
    ids = tokens(2, 9)
    before = model(ids).logits
    handle = mkt.attach(model, *some(), mkt.Ngrams([1], 50, heads=2, head_dim=8), mkt.MemoryAttention(2, 32, 4))
    assert torch.equal(model(ids).logits, before) and before.dtype == torch.bfloat16
    handle.read_in(None, tokens(20, seed=2))
    stir(handle, size=0.1)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in handle.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(ids, labels=ids).loss)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids, **how).shape == (2, 13)


def test_compiled_as_one_graph():
    """Without a cache; gradients too."""
    model = tiny("llama")
    handle = mkt.attach(model, *some(), mkt.Ngrams([1], 50, heads=2, head_dim=8))
    stir(handle)
    ids = tokens(2, 9)
    wanted = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_compiled_steps_with_a_cache():
    """One graph for a step, once the cache carries the memory: the first pass, which sees to that, is not compiled."""
    from transformers import StaticCache

    model = tiny("llama")
    stir(mkt.attach(model, *some()))
    ids, name = tokens(2, 9), cache_name(model)
    wanted = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)

    def positions(first: int, stop: int) -> dict[str, torch.Tensor]:
        at = torch.arange(first, stop)
        counted = "cache_position" in inspect.signature(model.forward).parameters  # older versions count by it
        return {"position_ids": at[None].expand(2, -1), **({"cache_position": at} if counted else {})}

    parts = [model(ids[:, :5], use_cache=True, **{name: cache}, **positions(0, 5)).logits]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for t in range(5, 9):  # the second step finds the graph of the first
        parts.append(compiled(ids[:, t : t + 1], use_cache=True, **{name: cache}, **positions(t, t + 1)).logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=0)
