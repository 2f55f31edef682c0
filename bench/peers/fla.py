"""flash-linear-attention: the chunked state of a linear attention with gates as keys, decaying by 1 - gate.

Its ``chunk_fwd_h`` takes gates and log-decays as tensors, so they are formed first, [T, N].
"""

from __future__ import annotations

import torch

NAME = "flash-linear-attention"
DIRECTIONS = ("forward",)
QUICK = True
DEVICES = ("cuda",)


def gated_write(values, keys, query, write):
    from fla.ops.common.chunk_h import chunk_fwd_h  # here: its absence concerns this case alone

    scale = query.shape[-1] ** -0.5

    def run():
        scores = (scale * query @ keys.mT).float()  # [T, N]
        gate, log_kept = torch.sigmoid(scores).to(query.dtype), torch.nn.functional.logsigmoid(-scores)
        _, final = chunk_fwd_h(
            gate[None, :, None], write[None, :, None], gk=log_kept[None, :, None], h0=values.float()[None, None],
            output_final_state=True,
        )  # fmt: skip
        return final[0, 0].to(values.dtype)

    return run
