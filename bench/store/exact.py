"""Results in float64, by plain products over pieces of a memory: what every variant is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.testing.compare import table

from ..contests.finding import Wrong

PIECE = 1 << 16  # slots of one product


def scores(query: Tensor, keys: Tensor) -> Tensor:
    return query.double() @ keys.double().mT * keys.shape[-1] ** -0.5


def topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and slots ``[T, k]`` of the best, best first."""
    best, slots = torch.zeros(len(query), 0, dtype=torch.float64), torch.zeros(len(query), 0, dtype=torch.int64)
    for first in range(0, len(keys), PIECE):
        part = scores(query, keys[first : first + PIECE])
        numbers = torch.arange(first, first + part.shape[1]).expand_as(part)
        best, slots = torch.cat([best, part], 1), torch.cat([slots, numbers], 1)
        best, at = best.topk(min(k, best.shape[1]))
        slots = slots.gather(1, at)
    return best, slots


def softmax_read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``[T, V]``."""
    largest = topk(query, keys, 1)[0]
    total, read = torch.zeros_like(largest), torch.zeros(len(query), values.shape[-1], dtype=torch.float64)
    for first in range(0, len(keys), PIECE):
        weights = (scores(query, keys[first : first + PIECE]) - largest).exp()
        total += weights.sum(1, keepdim=True)
        read += weights @ values[first : first + PIECE].double()
    return read / total


def near(what: str, got: Tensor, wanted: Tensor) -> None:
    """Numbers of a sum, within the tolerance of their dtype."""
    if got.shape != wanted.shape:
        raise Wrong(f"{what} must be {list(wanted.shape)}, got {list(got.shape)}")
    error = float((got.double() - wanted).abs().max() / wanted.abs().max())
    if not error <= table(got.dtype, got.dtype):
        raise Wrong(f"{what}: error {error:.1e}")


def best(found: tuple[Tensor, Tensor], query: Tensor, keys: Tensor, wanted: Tensor) -> None:
    """Scores and slots of a search: the scores are the best ones, and those of the slots, each named once."""
    got, slots = found
    near("scores", got, wanted)
    if any(len(row.unique()) != len(row) for row in slots):
        raise Wrong("a slot is found twice")
    own = torch.stack([scores(q.unsqueeze(0), keys[row])[0] for q, row in zip(query, slots)])
    near("scores of the slots", own.to(got.dtype), wanted)
