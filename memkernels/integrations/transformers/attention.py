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
    if mask is None or torch.compiler.is_compiling():
        return mask
    if mask.shape[-2] == 1 and bool(mask.all()):
        return None  # one token that attends to all, such as behind a window
    return as_range(mask)


def as_range(mask: Tensor) -> Tensor:
    """Ranges ``[..., T, 2]`` of a bool mask ``[..., T, N]``; the mask itself where a row has a gap."""
    if mask.shape[-1] == 0:
        return torch.zeros(*mask.shape[:-1], 2, dtype=torch.int64, device=mask.device)
    marks = mask.view(torch.uint8)  # of equal values max tells the first
    some, first = marks.max(-1)
    stop = torch.where(some > 0, mask.shape[-1] - marks.flip(-1).max(-1).indices, 0)
    starts = int((mask[..., 1:] > mask[..., :-1]).count_nonzero())  # a row with a gap has more than it needs
    whole = starts == int(((some > 0) & (first > 0)).count_nonzero())
    return torch.stack([first, stop], -1) if whole else mask


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
    _refuse_caps(kwargs)
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
        ranges = causal_range(tokens).to(query.device)  # from the first key: the rest of a static cache is empty
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


def read_with_lse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What the attention of a model reads ``[B, Hkv, G, T, K]``, and its log-sum-exp ``[B, Hkv, G, T]``.

    Args:
        mask: as ``eager``, ``sdpa`` or ``memkernels`` have it: None, bool, added to the scores, or ranges. dropout: of
            the weights; the log-sum-exp is that without it.

    Raises:
        NotImplementedError: the model caps its scores. TypeError: another mask.
    """
    _refuse_caps(options)
    if mask is not None and not is_range(mask):
        if mask.dim() != 4:
            raise TypeError(f"memkernels attention: mask must be [B, 1, T, N] or ranges, got {list(mask.shape)}")
        mask = mask[..., : key.shape[-2]]
        if mask.is_floating_point() and bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()):
            mask = mask == 0
        mask = as_range(mask) if mask.dtype == torch.bool else mask
    if (mask is None or is_range(mask)) and not dropout:
        return _read(module, query, key, value, mask, scaling, options, return_lse=True)
    return _explicit(module, query, key, value, mask, scaling, dropout, options)


def _explicit(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The same by all weights ``[B, Hkv, G, T, N]``, for masks with gaps and for dropout."""
    tokens, slots, heads = query.shape[-2], key.shape[-2], key.shape[1]
    if mask is None and tokens > 1 and getattr(module, "is_causal", True):
        mask = causal_range(tokens, slots).to(query.device)[None, None]
    if mask is not None and is_range(mask):
        mask = _as_bool(mask, slots)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query.to(exact) @ key.to(exact).repeat_interleave(query.shape[1] // heads, 1).mT) * scale
    scores = (scores if mask is None else scores + mask).unflatten(1, (heads, -1))
    sink = options.get("s_aux")
    lse = torch.logsumexp(scores, -1)
    lse = lse if sink is None else torch.logaddexp(lse, sink.to(exact).reshape(heads, -1, 1))
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse).unsqueeze(-1))
    weights = nn.functional.dropout(weights, dropout)
    return (weights.to(value.dtype) @ value.unsqueeze(2)), lse


def _refuse_caps(options: dict[str, Any]) -> None:
    if options.get("softcap") is not None:
        raise NotImplementedError(f"memkernels attention: softcap must be None, got {options['softcap']}")


def _as_bool(ranges: Tensor, slots: int) -> Tensor:
    """The bool mask ``[..., T, N]`` of ranges."""
    at = torch.arange(slots, device=ranges.device)
    return (at >= ranges[..., :1]) & (at < ranges[..., 1:])


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any, dropout: float, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = _as_bool(mask, key.shape[-2]) if is_range(mask) else mask
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
