"""flash-linear-attention: the chunked state of a linear attention with gates as keys, decaying by 1 - gate.

Its ``chunk_fwd_h`` takes gates and the sums of log-decays within a chunk as tensors, so they are formed first, [T, N].
"""

from __future__ import annotations

import torch

NAME = "flash-linear-attention"
DIRECTIONS = ("forward",)
QUICK = True
DEVICES = ("cuda",)
CHUNK = 64  # tokens, the width that fla takes by itself


def gated_write(values, keys, query, write):
    from fla.ops.common.chunk_h import chunk_fwd_h  # here: its absence concerns this case alone
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    scale = query.shape[-1] ** -0.5
    split = -(-query.shape[-2] // CHUNK) * CHUNK  # of states between chunks only the first is kept

    def run():
        gate, log_kept = gates(scale * query @ keys.mT)
        _, final = chunk_fwd_h(
            gate, one_head(write), gk=chunk_local_cumsum(log_kept, CHUNK, scale=RCP_LN2),
            h0=values.float().reshape(-1, 1, *values.shape[-2:]), output_final_state=True, split_size=split,
        )  # fmt: skip
        return final.reshape(values.shape).to(values.dtype)

    return run


def one_head(x):
    """[..., T, D] -> [B, T, 1, D], the order of fla: every head a stream of its own."""
    return x.reshape(-1, 1, *x.shape[-2:]).transpose(1, 2)


def gates(scores):
    """Gates in the dtype of the scores and the logarithms of 1 - gate in float32, both [B, T, 1, N]."""
    scores = one_head(scores)
    return torch.sigmoid(scores), torch.nn.functional.logsigmoid(-scores.float())
