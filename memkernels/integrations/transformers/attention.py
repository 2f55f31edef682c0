"""register_attention: the attention of a model itself on softmax_read, its masks as ranges of slots.

    out_t = sum_i softmax_i(scale * <q_t, k_i>) v_i        over first_t <= i < stop_t

Causal, sliding, padded and packed masks are ranges: two integers per token instead of a row of the mask. What is no
range, and attention dropout, go to PyTorch's scaled_dot_product_attention.

Source: Vaswani et al. 2017, Attention Is All You Need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops import causal_range, softmax_read

NAME = "memkernels"


def register_attention(name: str = NAME) -> str:
    """Make ``attn_implementation="memkernels"`` known to transformers; returns the name.

    A model that is loaded with it, or given it by ``model.set_attn_implementation``, computes
    ``out_t = sum_i softmax_i(scale * <q_t, k_i>) v_i`` by :func:`memkernels.softmax_read` with a ``slot_range``. Heads
    that share keys read them without a copy.

    Args:
        name: under which transformers knows it.

    Raises:
        NotImplementedError, in a pass: the model caps its scores (``softcap``).

    Source: Vaswani et al. 2017, Attention Is All You Need.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, range_mask)
    return name


def range_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a pass: ranges int64 ``[B, 1, T, 2]``; None: causal; bool ``[B, 1, T, N]`` where it is no range."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, **kwargs)
    return mask if mask is None or torch.compiler.is_compiling() else as_range(mask)


def as_range(mask: Tensor) -> Tensor:
    """Ranges ``[..., T, 2]`` of a bool mask ``[..., T, N]``; the mask itself where a row has a gap."""
    slots = torch.arange(mask.shape[-1], device=mask.device)
    count = mask.sum(-1)
    first = torch.where(mask, slots, mask.shape[-1]).amin(-1)
    last = torch.where(mask, slots, -1).amax(-1)
    first = torch.where(count == 0, 0, first)
    whole = (count == 0) | (last - first + 1 == count)
    return torch.stack([first, first + count], -1) if bool(whole.all()) else mask


def is_range(mask: Any) -> bool:
    """Is this one of our ranges, and no mask to be added or applied?"""
    return isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[-1] == 2


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query ``[B, H, T, K]``, key and value ``[B, Hkv, N, K]`` to ``[B, T, H, K]``."""
    if kwargs.get("softcap") is not None:
        raise NotImplementedError(f"memkernels attention: softcap must be None, got {kwargs['softcap']}")
    ranged = attention_mask is None or is_range(attention_mask)
    if not ranged or dropout:
        return _sdpa(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    out = _read(module, query, key, value, attention_mask, scaling, kwargs)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def _read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: Tensor | None,
    scaling: float | None,
    options: dict[str, Any],
    **more: Any,
) -> Any:
    """``[B, Hkv, G, T, K]`` for ranges ``[B, 1, T, 2]``, or None where the mask is causal by its absence."""
    tokens, heads = query.shape[-2], key.shape[1]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if ranges is not None:
        ranges = ranges.unsqueeze(1)  # [B, 1, 1, T, 2]
    elif causal and tokens > 1:
        key, value = key[..., :tokens, :], value[..., :tokens, :]  # the rest of a static cache is empty
        ranges = causal_range(tokens).to(query.device)
    sink = options.get("s_aux")  # a learned logit per head that takes weight and gives nothing
    return softmax_read(
        query.unflatten(1, (heads, -1)),  # [B, Hkv, G, T, K]
        key.unsqueeze(2),
        value.unsqueeze(2),
        scale=scaling,
        slot_range=ranges,
        sink=None if sink is None else sink.reshape(heads, -1, 1),
        **more,
    )


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any, dropout: float, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if is_range(mask):
        slots = torch.arange(key.shape[-2], device=key.device)
        mask = (slots >= mask[..., :1]) & (slots < mask[..., 1:])
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
