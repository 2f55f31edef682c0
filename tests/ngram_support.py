"""Layers, texts and a table for the tests of NgramMemory."""

from __future__ import annotations

import pytest
import torch
from support import close as close_to
from support import randn

from memkernels.nn import NgramMemory, TokenMap

D, ROWS, WORDS = 6, 11, 23


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-10) -> None:
    close_to(got.detach(), wanted.detach(), tolerance)


MAP = TokenMap(torch.tensor([i // 2 for i in range(WORDS)]))


def layer(**options) -> NgramMemory:
    """A layer in float64, every parameter drawn, so that nothing is hidden by a zero or a one."""
    made = NgramMemory(D, ROWS, **{"heads": 2, "head_dim": 3, **options}).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def text(*lead: int, branches: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and tokens ``lead``."""
    tokens = torch.randint(WORDS, lead, generator=torch.Generator().manual_seed(seed))
    return randn(*lead, *([branches] if branches > 1 else []), D, seed=seed), tokens


def wrong(call) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    return str(caught.value)


class Rows:
    """The rows of a layer behind the methods of a table; counts its reads."""

    def __init__(self, values: torch.Tensor):
        self.values, self.gathered, self.prefetched = values.detach().clone(), 0, 0
        self.rows, self.width = values.shape

    def gather(self, slots):
        self.gathered += 1
        return self._rows(slots)

    def prefetch(self, slots):
        self.prefetched += 1
        return Read(self._rows(slots))

    def _rows(self, slots):
        return self.values[slots.clamp(min=0)].masked_fill((slots < 0).unsqueeze(-1), 0)


class Read:
    def __init__(self, found):
        self.found = found

    def wait(self):
        return self.found
