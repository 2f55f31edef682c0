"""The Transformer encoder: sinusoidal positions and post-norm layers.

Source: Vaswani et al. 2017, Attention Is All You Need.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import causal_range, softmax_read


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """``p[t, 2j] = sin(t / 10000^(2j / width))``, ``p[t, 2j + 1] = cos`` of the same angle. [length, width]."""
    if width % 2:
        raise ValueError(f"sinusoidal_positions: width must be even, got {width}")
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(torch.get_default_dtype())


class EncoderLayer(nn.Module):
    """One post-norm layer: ``x <- norm(x + attention(x))``, then ``x <- norm(x + W_2 relu(W_1 x))``, dropout on both
    branches.

    Attention is a softmax read whose slots are the tokens, so it runs on the kernels of this library. Where it is
    causal, each token has the range of slots up to its own.

    Args:
        width: model width; ``heads`` divides it. hidden: width of the feed-forward part.
        causal: token t attends to tokens s <= t only. backend: passed to :func:`memkernels.softmax_read`.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, *, causal: bool, backend: str | None = None
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"EncoderLayer: heads must divide width {width}, got {heads}")
        self.heads, self.causal, self.backend = heads, causal, backend
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm_attention = nn.LayerNorm(width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def attention(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """x ``[B, T, width]``; token_mask bool ``[B, T]``: a token at False is not attended to."""
        query, key, value = self.project_in(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, K]
        slot_mask, slot_range = None, None
        if self.causal:  # padding is at the end, so no token's range has it
            slot_range = causal_range(x.shape[-2]).to(x.device)
        elif token_mask is not None:
            slot_mask = token_mask.unsqueeze(-2)  # [B, 1, T]
        read = softmax_read(query, key, value, slot_mask=slot_mask, slot_range=slot_range, backend=self.backend)
        return self.project_out(read.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        x = self.norm_attention(x + self.dropout(self.attention(x, token_mask)))
        return self.norm_feed_forward(x + self.dropout(self.feed_forward(x)))
