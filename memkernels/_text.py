"""English text that every CPython has: its own language documentation."""

from __future__ import annotations

import pydoc_data.topics

import torch
from torch import Tensor


def documentation() -> bytes:
    """The language reference behind ``help()``, topics in alphabetical order.

    Topics quote each other; of equal paragraphs only the first is kept, so that no part of a split repeats another.
    """
    topics = pydoc_data.topics.topics
    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n") if p.strip())
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def split(text: bytes, held_out: float) -> tuple[Tensor, Tensor]:
    """Bytes as int64 tokens: the first part to train on, the last share ``held_out`` to score."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = int(len(tokens) * (1 - held_out))
    return tokens[:cut], tokens[cut:]


def streams(tokens: Tensor, count: int) -> Tensor:
    """``count`` consecutive pieces of equal length, side by side: ``[count, length]``."""
    length = len(tokens) // count
    return tokens[: count * length].view(count, length)


def windows(text: Tensor, width: int) -> list[Tensor]:
    """``text`` ``[B, length]`` as ``[B, width + 1]`` windows in order.

    Each ends with the first token of the next, so that every token is predicted once.
    """
    return [text[:, i : i + width + 1] for i in range(0, text.shape[1] - width, width)]
