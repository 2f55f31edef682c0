"""What the SDPA peers of a GPU share: one back end of scaled_dot_product_attention, and no other."""

from __future__ import annotations

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def read(backend: SDPBackend):
    """A peer's ``softmax_read`` on ``backend``; the call raises where the back end cannot run it."""

    def softmax_read(query, keys, values):
        def run():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values)

        return run

    return softmax_read
