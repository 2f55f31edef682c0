"""scaled_dot_product_attention on its flash back end alone."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from ..sdpa import read

NAME = "SDPA flash"
DIRECTIONS = ("forward", "backward")
QUICK = True
DEVICES = ("cuda",)

softmax_read = read(SDPBackend.FLASH_ATTENTION)
