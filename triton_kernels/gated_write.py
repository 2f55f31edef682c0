"""gated_write on a GPU: a = sigmoid(scale <q_t, k_i> + mask_i). Its kernels are those of dense writes: write.py."""

from __future__ import annotations

from torch import Tensor

from . import write as dense
from .write_tiles import Write


def gated_write(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, erase_scale: float,
):  # fmt: skip
    """New values ``[..., N, V]``, retained ``[..., N]``."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    return dense.forward(Write("gated_write", "sigmoid", *args), values)


def gated_write_(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, erase_scale: float,
) -> Tensor:  # fmt: skip
    """The same into ``values``; returns retained."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    return dense.in_place(Write("gated_write_", "sigmoid", *args), values)


def gated_write_backward(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, retained: Tensor, d_values: Tensor | None, d_retained: Tensor | None,
    scale: float, erase_scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of values, keys, query, write, erase and a float mask; ``retained`` is not looked at."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    x = Write("gated_write_backward", "sigmoid", *args)
    x.call.require(len(wants) == 6, "wants must have 6 entries")
    return dense.backward(x, values, d_values, d_retained, wants)
