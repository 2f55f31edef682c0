"""SimilarityLM: the next word is one that is similar to the words before it.

    P(w | w_<i) = softmax_w(beta * sum_{j < i} s(w_j, w)),   s(u, w) = <a_u, b_w>
    with forgetting, channel by channel:   sum_{j < i} d^(i-1-j) * a_(w_j)   in place of   sum_{j < i} a_(w_j)

Sources: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache (predicting by similarity with the
history); Martin and Cundy 2018, Parallelizing Linear Recurrent Neural Nets Over Sequence Length (the sum as a scan).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn._sizes import check_sizes
from ..ops import gated_scan


class SimilarityOutput(NamedTuple):
    """What the words so far predict.

    logits: ``[B, T, vocab]``, of the word after each position. hidden: ``[B, T, D]``, the sums that were compared, at
    root mean square 1, as a :class:`~memkernels.nn.NeuralCache` wants them.
    """

    logits: Tensor
    hidden: Tensor


class SimilarityLM(nn.Module):
    """A language model without layers: a running sum of embeddings, compared with every word.

    ``P(w | w_<i) = softmax_w(beta * sum_{j < i} <a_(w_j), b_w>)`` with two embeddings per word. With ``forget`` every
    channel of the sum decays at a rate of its own, ``h_i = d * h_(i-1) + a_(w_i)`` with ``d`` in (0, 1) learned, so
    that some channels hold the last word and others the subject of the text.

    State is functional: the sum ``[B, D]`` that a text has reached; ``.detach()`` cuts it.

    Args:
        vocab_size: number of words. width: D, of the embeddings.
        forget: learn the decays; initially they range from forgetting at once to keeping ten words. False is the plain
            sum.
        backend: passed to :func:`memkernels.gated_scan`.

    Raises:
        ValueError: a size below 1.

    Source: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache.
    """

    def __init__(self, vocab_size: int, width: int, *, forget: bool = True, backend: str | None = None):
        super().__init__()
        check_sizes("SimilarityLM", vocab_size=vocab_size, width=width)
        self.backend = backend
        self.embedding = nn.Embedding(vocab_size, width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.decay_logit = nn.Parameter(torch.linspace(-4.0, 2.2, width)) if forget else None
        nn.init.normal_(self.embedding.weight)

    @property
    def beta(self) -> Tensor:
        """The factor of the similarities, ``[]``."""
        return self.log_beta.exp()

    def initial_state(self, streams: int) -> Tensor:
        """The sum before the first word: 0, ``[B, D]``."""
        return self.embedding.weight.new_zeros(streams, self.embedding.embedding_dim)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[SimilarityOutput, Tensor]:
        """Predict the word after every position.

        Args:
            tokens: int64 ``[B, T]``. state: ``[B, D]``, of the words before; default none.

        Returns:
            ``(output, state)``; the log-probabilities are ``log_softmax(output.logits)``.

        Raises:
            ValueError, TypeError: as :func:`memkernels.gated_scan`.
        """
        state = self.initial_state(len(tokens)) if state is None else state
        words = self.embedding(tokens)
        decay = torch.ones_like(words[..., :1, :]) if self.decay_logit is None else torch.sigmoid(self.decay_logit)
        hidden = gated_scan(decay.expand_as(words), words, state, backend=self.backend)
        last = torch.cat([state.unsqueeze(1), hidden], 1)[:, -1]
        return SimilarityOutput(self.beta * self.output(hidden), F.rms_norm(hidden, hidden.shape[-1:])), last
