"""A model of random weights and a tokenizer of letters: what real ones do, in seconds and without a download."""

from __future__ import annotations

from typing import Any

import torch

LETTERS = 128


class Letters:
    """One token per character of ASCII; what is beyond is the last one."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(letter), LETTERS - 1) for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(LETTERS)}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def language_model() -> tuple[Any, Letters]:
    """A Llama of four blocks and its tokenizer; the same weights at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=LETTERS, eos_token_id=0, **size)).eval(), Letters()
