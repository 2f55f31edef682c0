"""Calls of attention as a model of transformers makes them: noted in a pass of one block, and made again alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memkernels.integrations import transformers as mkt

NAMES = ("memkernels", "sdpa", "eager")


class Case(NamedTuple):
    """kind: of the model. tokens: of the pass. seen: tokens in the cache before it. lengths: of a padded batch."""

    title: str
    kind: str
    tokens: int
    seen: int = 0
    batch: int = 1
    lengths: tuple[int, ...] = ()
    backward: bool = False


CASES = (
    Case("causal, 512 tokens", "llama", 512),
    Case("causal, 2,048 tokens", "llama", 2048),
    Case("causal, 512 tokens, forward and backward", "llama", 512, backward=True),
    Case("window of 128, 4,096 tokens", "mistral", 4096),
    Case("window of 128, 4,096 tokens, heads of 256", "gemma3", 4096),
    Case("4 texts of 64 to 512 tokens, padded", "llama", 512, batch=4, lengths=(64, 200, 333, 512)),
    Case("256 tokens after 1,792", "llama", 256, seen=1792),
    Case("one token after 511", "llama", 1, seen=511),
    Case("one token after 2,047", "llama", 1, seen=2047),
    Case("one token after 511, 8 texts", "llama", 1, seen=511, batch=8),
    Case("one token, padded, 4 texts", "llama", 1, seen=511, batch=4, lengths=(64, 200, 333, 512)),
    Case("one token, window of 128, after 4,095", "mistral", 1, seen=4095),
)


def model(kind: str) -> Any:
    """One block with random weights: heads as in SmolLM2-135M, as in Mistral-7B, as in Gemma3-1B."""
    import transformers

    common = {"vocab_size": 100, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 8192}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}),
        "mistral": (
            "Mistral",
            {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 128},
        ),
        "gemma3": (
            "Gemma3",
            {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
            | {"sliding_window": 128, "layer_types": ["sliding_attention"]},
        ),
    }
    family, sizes = made[kind]
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config(**common, **sizes)).eval()


class Noted(NamedTuple):
    """attend: the call of the attention. mask: what made its mask, once per pass of the model."""

    attend: Callable[[], Tensor]
    mask: Callable[[], Any]


def noted(case: Case, name: str, dtype: torch.dtype) -> Noted:
    """What transformers calls for the last pass of a case, with the implementation of that name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.models.llama import modeling_llama as llama

    mkt.register_attention()
    attends, masks = AttentionInterface(), AttentionMaskInterface()
    attend: Any = llama.eager_attention_forward if name == "eager" else attends[name]
    make: Any = masks[name]
    given: list[Any] = []
    made: list[Any] = []

    def note(module: Any, *args: Any, **kwargs: Any) -> Any:
        given[:] = [module, args, kwargs]
        return attend(module, *args, **kwargs)

    def note_mask(*args: Any, **kwargs: Any) -> Any:
        made[:] = [args, kwargs]
        return make(*args, **kwargs)

    AttentionInterface.register("noted", note)
    AttentionMaskInterface.register("noted", note_mask)
    run = model(case.kind).to(dtype)
    run.set_attn_implementation("noted")
    length = case.seen + case.tokens
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (case.batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, own in zip(mask, case.lengths):
        row[: length - own] = 0
    with torch.no_grad():
        cache: dict[str, Any] = {}
        if case.seen:
            first = run.model(ids[:, : case.seen], attention_mask=mask[:, : case.seen], use_cache=True)
            from memkernels.integrations.transformers.cache import returned_cache
            from memkernels.integrations.transformers.windows import cache_name

            cache = {cache_name(run): returned_cache(first)}
        run.model(ids[:, case.seen :], attention_mask=mask, use_cache=bool(case.seen), **cache)
    module, args, kwargs = given
    masked = copy.copy(made)
    if not case.backward:
        return Noted(lambda: attend(module, *args, **kwargs)[0], lambda: make(*masked[0], **masked[1]))
    leaves = [x.detach().requires_grad_() for x in args[:3]]

    def both() -> Tensor:
        out = attend(module, *leaves, *args[3:], **kwargs)[0]
        torch.autograd.grad(out.sum(), leaves)
        return out

    return Noted(both, lambda: make(*masked[0], **masked[1]))
