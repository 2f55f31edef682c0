"""scaled_dot_product_attention on its cudnn back end alone."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from ..sdpa import read

NAME = "SDPA cuDNN"
DIRECTIONS = ("forward", "backward")
QUICK = True
DEVICES = ("cuda",)

softmax_read = read(SDPBackend.CUDNN_ATTENTION)
