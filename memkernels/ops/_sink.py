"""A sink: a logit per token that takes weight and gives nothing.

    lse'_t = log(exp(lse_t) + exp(sink_t)),      r'_t = r_t exp(lse_t - lse'_t)

A softmax with one slot more, whose value is 0. It follows from any read and its lse, so no kernel knows of it. A token
for which the memory holds nothing, so that its scores lie far below the sink, reads nothing.

Sources: Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks; OpenAI 2025, gpt-oss (a learned
logit per head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._options import number, token_numbers

SINK = "a number or a tensor that broadcasts to [..., T]"


def with_sink(name: str, sink: float | Tensor, read: Tensor, lse: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """``(read [..., T, V], lse [..., T], *weights [..., T, k])`` of the op ``name`` with the sink beside them.

    A sink of -inf changes nothing; one of +inf takes all. With no addressable slot and no sink, lse is -inf and
    gradients are 0.
    """
    tokens = list(lse.shape)
    if isinstance(sink, Tensor):
        sink = token_numbers(name, "sink", sink, read, tokens, SINK)
    else:
        sink = lse.new_full((), number(name, "sink", sink, SINK))
    top = torch.maximum(lse, sink).detach()  # detached: subtracting one number from both logits changes no weight
    infinite = torch.isinf(top)  # of both -inf, or one +inf: the read keeps nothing
    top_or_0 = top.masked_fill(infinite, 0)
    own = torch.exp(lse.masked_fill(infinite, -torch.inf) - top_or_0)
    total = own + torch.exp(sink.masked_fill(infinite, 0) - top_or_0)
    share = (own / total).unsqueeze(-1)
    whole = torch.where(infinite, top, top_or_0 + torch.log(total))
    return (read.to(share.dtype) * share).to(read.dtype), whole, *(w * share for w in weights)
