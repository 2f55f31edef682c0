"""slot_write on a GPU: gates a [..., T, N] that are given. Its kernels are those of dense writes: write.py.

Tiles of gates are read where tiles of scores would be made, and da is stored a tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from . import write as dense
from .declare import FEW, Example, Inputs, operator
from .write_tiles import Write


def _write(
    op: str, values: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None,
    erase_scale: float,
) -> Write:  # fmt: skip
    return Write(op, "given", values, None, weights, write, erase, None, token_mask, 1.0, erase_scale)


@operator
def slot_write(
    values: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None, erase_scale: float
) -> Tensor:
    """New values ``[..., N, V]``."""
    x = _write("slot_write", values, weights, write, erase, token_mask, erase_scale)
    return dense.forward(x, values, retains=False)[0]


@operator
def slot_write_(
    values: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None, erase_scale: float
) -> None:
    """The same into ``values``."""
    x = _write("slot_write_", values, weights, write, erase, token_mask, erase_scale)
    dense.in_place(x, values, retains=False)


@operator
def slot_write_backward(
    values: Tensor, weights: Tensor, write: Tensor, erase: Tensor | None, token_mask: Tensor | None,
    d_values: Tensor | None, erase_scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of values, weights, write and erase."""
    x = _write("slot_write_backward", values, weights, write, erase, token_mask, erase_scale)
    x.call.require(len(wants) == 4, "wants must have 4 entries")
    of_values, of_weights, of_write, of_erase = wants
    wants = [of_values, False, of_weights, of_write, of_erase, False]
    d_values, _, d_weights, d_write, d_erase, _ = dense.backward(x, values, d_values, None, wants)
    return d_values, d_weights, d_write, d_erase


def examples(x: Inputs) -> Iterator[Example]:
    def write(N: int, erase: float | Tensor, **which) -> Example:
        vector, number = (erase, 1.0) if isinstance(erase, Tensor) else (None, erase)
        v, a, w = x(2, N, x.width), x(2, x.tokens, N), x(2, x.tokens, x.width)
        return Example(slot_write, (v, a, w, vector, None, number), **which)

    yield write(x.slots, 1.0, main=True)
    yield write(x.slots, 0.0, variant="erase 0")
    yield write(FEW, 0.5, variant="erase 0.5, few slots")
    yield write(x.slots // 16, x(2, x.tokens, x.width), variant="erase tensor")
