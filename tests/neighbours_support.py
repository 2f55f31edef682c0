"""A tokenizer of letters for the tiny models of transformers_support, texts, and a store of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers_support import WORDS

from memkernels.integrations import transformers as mkt

TEXTS = {
    "faq/one.txt": "the memory of a model is what it has read before; " * 3,
    "faq/two.txt": "a store keeps the token that followed each key, and finds it again. " * 2,
    "ref/three.txt": "nearest records vote for the token after them, the model for its own. " * 2,
}


class Letters:
    """One token per character; ``shift`` makes another vocabulary."""

    def __init__(self, shift: int = 0):
        self.shift = shift

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + (ord(letter) + self.shift) % (WORDS - 3) for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(33 + number + self.shift): number for number in range(WORDS)}

    def decode(self, ids: list[int]) -> str:
        letters = {self(chr(code))["input_ids"][0]: chr(code) for code in range(32, 126)}
        return "".join(letters[number] for number in ids)


def ids(text: str) -> torch.Tensor:
    return torch.tensor(Letters()(text)["input_ids"])


def store(model: Any, texts: Any = None, **options: Any) -> mkt.TokenStore:
    options = {"layer": -2, "dim": 16, "dtype": torch.float32, "window": 64, "progress": False, **options}
    return mkt.TokenStore.build(model, Letters(), TEXTS if texts is None else texts, **options)


def feed_forward_inputs(model: Any, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """``[T, width]``, by a hook and a whole forward pass of the model."""
    found = []
    block = (getattr(model.get_decoder(), "layers", None) or getattr(model.base_model, "h", None))[layer]
    handle = block.mlp.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(tokens[None])
    handle.remove()
    return found[0][0]
