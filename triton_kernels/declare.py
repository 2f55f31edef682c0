"""What the file of an op declares: its operators, and examples of calls that between them launch all its kernels.

    @operator
    def merge_reads(reads, lses): ...

    def examples(x: Inputs) -> Iterator[Example]:
        yield Example(merge_reads, (x(2, 3, x.tokens, x.width), x(2, 3, x.tokens, dtype=torch.float32)), main=True)

Nothing else is declared. Running the examples on tensors without memory finds the kernels and their rows of the table
of configurations; ``bench`` compiles and measures what they launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 4  # tokens or slots of a call that fills no block
SCALE = 0.125
COMPRESSED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def operator(launcher: Callable) -> Callable:
    """Marks the launcher of the operator of its name, in the line above ``def``: ``operators()`` of this package finds
    it in the text of the file, which it does not import."""
    return launcher


@dataclass(frozen=True)
class Example:
    """A call, forward and, where the operator has one, backward.

    launcher: of the forward operator. arguments: its tensors and numbers. variant: what sets the call apart, in words.
    main: the shape that a configuration is chosen for; others reach variants of the same kernels. heavy: needs more
    registers than main calls do. gradients: the results that have one in the backward pass, None for all that may;
    without any there is no backward pass.
    """

    launcher: Callable
    arguments: tuple
    variant: str = ""
    main: bool = False
    heavy: bool = False
    gradients: tuple[str, ...] | None = None

    @property
    def operator(self) -> str:
        return self.launcher.__name__

    @property
    def name(self) -> str:
        return f"{self.operator}, {self.variant}" if self.variant else self.operator


@dataclass(frozen=True)
class Inputs:
    """Makes the tensors of examples: ``x(2, x.tokens, x.width)`` are normal numbers of ``dtype`` on ``device``, and on
    the ``meta`` device only their shapes."""

    dtype: torch.dtype
    width: int
    device: str
    tokens: int = 1024
    slots: int = 4096

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return x if x.is_meta else x.normal_()

    def integers(self, *shape: int, below: int) -> Tensor:
        """Numbers of slots or words, ``0 .. below``."""
        x = torch.empty(shape, dtype=torch.int64, device=self.device)
        return x if x.is_meta else x.random_(0, below)

    def ranges(self, *shape: int) -> Tensor:
        """Of every token: the slots before a place that moves on with the tokens."""
        x = torch.zeros((*shape, 2), dtype=torch.int64, device=self.device)
        x[..., 1] = torch.arange(1, shape[-1] + 1, device=self.device) * (self.slots // self.tokens)
        return x

    def compressed(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Rows of 8-bit slots."""
        return torch.zeros(shape, dtype=dtype, device=self.device)
