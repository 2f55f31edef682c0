"""flash-linear-attention: gated linear attention with gates as keys and read weights as queries.

It is the half of its gated slot attention that writes and reads values; that one's own keys move, these do not. Gates,
decays and read weights are formed first, [T, N].
"""

from __future__ import annotations

import torch

from .fla import gates, one_head

NAME = "flash-linear-attention GLA"
DIRECTIONS = ("forward", "backward")
QUICK = True
DEVICES = ("cuda",)


def gated_write(values, keys, query, write):
    """The last state; what is read on the way is not asked for, but computed."""
    from fla.ops.gla import chunk_gla  # here: its absence concerns this case alone

    scale = query.shape[-1] ** -0.5

    def run():
        gate, log_kept = gates(scale * query @ keys.mT)
        _, final = chunk_gla(
            gate.detach(), gate, one_head(write), log_kept, scale=1.0, initial_state=_state(values),
            output_final_state=True,
        )  # fmt: skip
        return final.reshape(values.shape).to(values.dtype)

    return run


def memory_scan(values, keys, read_query, write_query, write):
    from fla.ops.gla import chunk_gla

    scale = keys.shape[-1] ** -0.5

    def run():
        gate, log_kept = gates(scale * write_query @ keys.mT)
        weights = one_head(torch.softmax(scale * read_query @ keys.mT, -1))
        reads, _ = chunk_gla(
            weights, gate, one_head(write), log_kept, scale=1.0, initial_state=_state(values), output_final_state=True
        )
        return reads.transpose(1, 2).reshape(write.shape)

    return run


def _state(values):
    """[..., N, V] -> [B, 1, N, V], in float32."""
    return values.float().reshape(-1, 1, *values.shape[-2:])
