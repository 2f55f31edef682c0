"""What the peers of ``softmax_read`` share that are attention over [B, H, T, K]: SDPA on any of its back ends, and
FlexAttention."""

from __future__ import annotations

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def over_heads(attention):
    """A peer's ``softmax_read`` from ``attention(query, keys, values)``.

    A memory [N, K] that all heads share is read as one head with the tokens of all, the best that attention can do.
    """

    def softmax_read(query, keys, values):
        if keys.dim() > 2:
            return lambda: attention(query, keys, values)
        tokens, shape = query.reshape(1, 1, -1, query.shape[-1]), (*query.shape[:-1], values.shape[-1])
        keys, values = keys[None, None], values[None, None]
        return lambda: attention(tokens, keys, values).reshape(shape)

    return softmax_read


def read(backend: SDPBackend):
    """The same on one back end of SDPA and no other; the call raises where it cannot run it."""

    def attention(query, keys, values):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, keys, values)

    return over_heads(attention)
