"""The parts of a pretrained model that a memory is put beside, and a fingerprint by which the model is known again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_ATTENTION = ("self_attn", "attn", "attention")
_SAMPLED, _PER_TENSOR = 64, 16  # tensors of a fingerprint, numbers of each


@dataclass(frozen=True)
class Place:
    """A causal language model as a memory sees it.

    model: the causal language model. decoder: what maps tokens to hidden states. blocks: its layers, in order.
    width: of the hidden states.
    """

    model: nn.Module
    decoder: nn.Module
    blocks: tuple[nn.Module, ...]
    width: int

    @classmethod
    def of(cls, model: Any) -> Place:
        """Find them; a PEFT model is entered.

        Raises:
            TypeError: it has no decoder of blocks with a language model's head.
        """
        base = getattr(model, "get_base_model", None)
        model = base() if callable(base) else model
        kind, find = type(model).__name__, getattr(model, "get_decoder", None)
        decoder = find() if callable(find) else None
        if decoder is model:  # transformers 4 knows the decoder of few models
            decoder = getattr(model, "base_model", None)
        blocks = getattr(decoder, "layers", None)
        blocks = getattr(decoder, "h", None) if blocks is None else blocks
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not isinstance(
            blocks, nn.ModuleList
        ):
            raise TypeError(f"attach: model must be a decoder with blocks in .layers or .h, got {kind}")
        if not isinstance(decoder, nn.Module) or decoder is model or model.get_output_embeddings() is None:
            raise TypeError(f"attach: model must have a language model's head (AutoModelForCausalLM), got {kind}")
        return cls(model, decoder, tuple(blocks), model.get_input_embeddings().weight.shape[1])

    def layer(self, memory: str, layer: int) -> int:
        """The number of a block; negative ones count from the end.

        Raises:
            ValueError: there is no such block.
        """
        count = len(self.blocks)
        if not -count <= layer < count:
            raise ValueError(f"{memory}: layers must lie in -{count}..{count - 1}, got {layer}")
        return layer % count

    def factory(self, layer: int) -> dict[str, Any]:
        """Device and dtype of new parameters beside a block: float32 where the model has 16 bits, for training."""
        found = next((p for p in self.blocks[layer].parameters() if p.is_floating_point()), None)
        found = next(self.model.parameters()) if found is None else found
        return {"device": found.device, "dtype": torch.promote_types(found.dtype, torch.float32)}

    def attention(self, layer: int) -> nn.Module:
        """The self-attention of a block. TypeError: it is not known by its name."""
        return self._part(layer, "attention", _ATTENTION)

    def feed_forward(self, layer: int) -> nn.Module:
        """The feed-forward network of a block. TypeError: it is not known by its name."""
        return self._part(layer, "feed-forward network", _FEED_FORWARD)

    def _part(self, layer: int, what: str, names: tuple[str, ...]) -> nn.Module:
        for name in names:
            if isinstance(part := getattr(self.blocks[layer], name, None), nn.Module):
                return part
        kind = type(self.blocks[layer]).__name__
        raise TypeError(f"attach: block {layer} must have its {what} in .{', .'.join(names)}, got a {kind}")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one pretrained model from another: names and shapes of all weights, numbers from some of them.

    The numbers are rounded to bfloat16, so that a model may be loaded in 16 bits or in 32. Weights of memories and of
    low-rank adapters do not count.
    """
    weights = _weights(model)
    shapes = "\n".join(f"{name} {list(weight.shape)}" for name, weight in weights.items())
    config: Any = getattr(model, "config", None)
    return {
        "kind": type(model).__name__,
        "type": getattr(config, "model_type", ""),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "numbers": _numbers(list(weights.values())).view(torch.uint8).numpy().tobytes().hex(),
    }


def differs(saved: dict[str, Any], model: nn.Module) -> str | None:
    """Why ``model`` is not that of a fingerprint; None if it is."""
    found = fingerprint(model)
    if saved["type"] != found["type"] or saved["shapes"] != found["shapes"]:
        return f"a {saved['kind']} of its names and shapes of weights, got a {found['kind']} of others"
    then, now = (_from_hex(x["numbers"]) for x in (saved, found))
    if not torch.allclose(then, now, rtol=2.0**-7, atol=1e-6, equal_nan=True):
        return f"the {saved['kind']} that it was trained beside, got one with other numbers in its weights"
    return None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the pretrained model by name, whether or not adapters are wrapped around its layers."""
    own: dict[str, Tensor] = {}
    for name, weight in sorted(model.named_parameters()):
        if not name.startswith("mk_memory.") and "lora_" not in name:
            own[name.replace(".base_layer.", ".")] = weight.detach()
    return own


def _numbers(weights: list[Tensor]) -> Tensor:
    """bfloat16, from at most 64 tensors spread over the model."""
    chosen = weights[:: -(-len(weights) // _SAMPLED)]
    parts = []
    for weight in chosen:
        flat = weight.reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(_PER_TENSOR, flat.numel()), dtype=torch.float64).long()
        parts.append(flat[at.to(flat.device)].to("cpu", torch.bfloat16))
    return torch.cat(parts)


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float()


def token_ids(name: str, place: Place, text: Any, tokenizer: Any) -> Tensor:
    """int64 ``[T]`` of a text, or of ids in any shape of one row, on the device of the model.

    Raises:
        TypeError: a text without a tokenizer. ValueError: ids that the model has not: the tokenizer is another one's.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError(f"{name}: tokenizer must be given with a text, got None")
        text = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    embeddings: Any = place.model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.as_tensor(text, dtype=torch.int64).reshape(-1)
    words = embeddings.weight.shape[0]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise ValueError(f"{name}: tokenizer must be that of the model, of {words} tokens, got the id {int(ids.max())}")
    return ids.to(embeddings.weight.device)
