"""torch.nn.functional.scaled_dot_product_attention: torch's own fused softmax read."""

from __future__ import annotations

from torch.nn.functional import scaled_dot_product_attention

from ..sdpa import over_heads

NAME = "SDPA"
DIRECTIONS = ("forward", "backward")
QUICK = True

softmax_read = over_heads(scaled_dot_product_attention)
