"""Tiny models of transformers with random weights, and how the tests call them whatever the version."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "gpt2", "qwen3", "gemma3")
WORDS, WIDTH, BLOCKS, PAD = 97, 32, 3, 0
_COMMON = {
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny(family: str, **options: Any):
    """A causal language model of random weights, in evaluation mode, without dropout."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    options = {"initializer_range": 0.3, "tie_word_embeddings": False, **options}  # so that tokens depend on the past
    if family == "gpt2":
        del (common := dict(_COMMON))["max_position_embeddings"]
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128}
        model = GPT2LMHeadModel(GPT2Config(**common, **size, **still, **options))
    elif family == "gemma3":
        sliding = {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON, **_SIZES, **{**sliding, **options}))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_COMMON, **{**_SIZES, **options}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_COMMON, **{**_SIZES, **options}))
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids that are neither padding nor another special token."""
    return torch.randint(3, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def cache_name(model: Any) -> str:
    """Of the argument that is the cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    return output.get("cache", None) if "cache" in output else output.past_key_values


def stir(memories: Any, seed: int = 1, size: float = 0.5) -> None:
    """Give every parameter of the memories random numbers, so that they change the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memories.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def watched(model, family: str, layer: int) -> dict[str, list]:
    """What the attention of a block computes before any rotation: q, k, v ``[B, T, heads, 8]``, for each pass."""
    noted: dict[str, list] = {"q": [], "k": [], "v": []}
    if family == "gpt2":

        def joint(module, args, output):
            for name, x in zip("qkv", output.chunk(3, -1)):
                noted[name].append(x.unflatten(-1, (-1, 8)))

        model.transformer.h[layer].attn.c_attn.register_forward_hook(joint)
        return noted
    attention = model.model.layers[layer].self_attn
    for name in "qkv":

        def note(module, args, output, name=name):
            x = output.unflatten(-1, (-1, 8)) if output.dim() == 3 else output
            noted[name].append(x.transpose(1, 2) if x.shape[1] in (2, 4) and family == "gemma3" and name != "v" else x)

        getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj")).register_forward_hook(note)
    return noted
