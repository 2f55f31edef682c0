"""AdditiveAttention: a decoder's context from the outputs of an encoder, by scores of a small network.

    e[t, i] = v . tanh(W [h_t; o_i]) = v . tanh(W_h h_t + W_o o_i)
    c_t     = sum_i softmax_i(e[t, i]) o_i

Source: Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align and Translate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import additive_read
from ._sizes import check_sizes


class AdditiveAttention(nn.Module):
    """The context of each decoder state: a mean of the encoder's outputs, weighted by a one-layer network.

    ``c_t = sum_i softmax_i(v . tanh(W [h_t; o_i])) o_i``. The encoder's half ``W_o o_i`` is the same for every ``t``:
    a decoder that goes step by step computes it once (:meth:`keys`).

    Args:
        hidden_size: width of the decoder's state. output_size: width of the encoder's outputs.
        attention_size: rows of ``W``. backend: passed to :func:`memkernels.additive_read`.

    Raises:
        ValueError: a size below 1.

    Source: Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align and Translate.
    """

    def __init__(self, hidden_size: int, output_size: int, attention_size: int, *, backend: str | None = None):
        super().__init__()
        check_sizes(
            "AdditiveAttention", hidden_size=hidden_size, output_size=output_size, attention_size=attention_size
        )
        self.backend = backend
        self.hidden_projection = nn.Linear(hidden_size, attention_size, bias=False)
        self.output_projection = nn.Linear(output_size, attention_size, bias=False)
        self.score_vector = nn.Parameter(torch.empty(attention_size))
        nn.init.normal_(self.score_vector, std=attention_size**-0.5)

    def keys(self, outputs: Tensor) -> Tensor:
        """``W_o o_i``: ``[..., N, output_size]`` -> ``[..., N, attention_size]``."""
        return self.output_projection(outputs)

    def forward(
        self, hidden: Tensor, outputs: Tensor, *, keys: Tensor | None = None, slot_mask: Tensor | None = None
    ) -> Tensor:
        """The contexts.

        Args:
            hidden: ``[..., T, hidden_size]``. outputs: ``[..., N, output_size]``.
            keys: what :meth:`keys` made of ``outputs``; default: made now.
            slot_mask: ``[..., N]``, bool (False: padding) or float, added to the scores.

        Returns:
            ``[..., T, output_size]``; 0 where every output is masked.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not fit.
        """
        keys = self.keys(outputs) if keys is None else keys
        query = self.hidden_projection(hidden)
        return additive_read(query, keys, outputs, self.score_vector, slot_mask=slot_mask, backend=self.backend)
