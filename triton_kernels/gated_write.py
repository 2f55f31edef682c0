"""gated_write on a GPU: a = sigmoid(scale <q_t, k_i> + mask_i). Its kernels are those of dense writes: write.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from . import write as dense
from .declare import FEW, Example, Inputs, operator
from .write_tiles import Write


@operator
def gated_write(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, erase_scale: float,
):  # fmt: skip
    """New values ``[..., N, V]``, retained ``[..., N]``."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    return dense.forward(Write("gated_write", "sigmoid", *args), values)


@operator
def gated_write_(
    values: Tensor, keys: Tensor, query: Tensor, write: Tensor, erase: Tensor | None, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, erase_scale: float,
) -> Tensor:  # fmt: skip
    """The same into ``values``; returns retained."""
    args = (values, keys, query, write, erase, slot_mask, token_mask, scale, erase_scale)
    return dense.in_place(Write("gated_write_", "sigmoid", *args), values)


@operator
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


def examples(x: Inputs) -> Iterator[Example]:
    T, N, write = x.tokens, x.slots, functools.partial(dense.example, gated_write, x)
    yield write(T, N, main=True)
    yield write(T, N // 16, x(2, T, x.width), variant="erase tensor", main=True)
    yield write(T, N, 0.0, variant="erase 0")
    yield write(T, N, 0.5, True, variant="erase 0.5, retained", heavy=True)
    yield write(T, FEW, 1.0, True, variant="retained, few slots")
    yield write(FEW, N, x(2, FEW, x.width), True, variant="erase tensor, retained")
