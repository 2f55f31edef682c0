"""MemoryTransformerLM: the reference model, a Transformer language model that reads an external memory.

    h   = encoder(embedding(x) * sqrt(d) + positions)             L post-norm layers
    o_t = h_t + W_r r_t,   r_t = sum_i softmax_i(q_t . k_i) v_i   the memory read, q_t = W_q h_t
    log P(. at t) = log_softmax(W o_t + b)

After a step h is written into the memory without gradient: v_i <- g[t, i] w_t + (1 - g[t, i]) v_i, g[t, i] =
sigmoid(q_t . k_i).

Sources: Vaswani et al. 2017, Attention Is All You Need; Sukhbaatar et al. 2015, End-To-End Memory Networks; Devlin et
al. 2019, BERT (the masked objective of the encoder form); Grave et al. 2017, Improving Neural Language Models with a
Continuous Cache (storing what followed a context under that context).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import ExternalMemory, MemoryState
from ._encoder import EncoderLayer, sinusoidal_positions


class LMOutput(NamedTuple):
    """log_probs: ``[B, T, vocab]``. hidden: ``[B, T, d]``, the last layer's output, from which memory is written."""

    log_probs: Tensor
    hidden: Tensor


class MemoryTransformerLM(nn.Module):
    """Transformer language model with an :class:`~memkernels.nn.ExternalMemory`.

    ``log P_t = log_softmax(W (h_t + W_r r_t) + b)`` with the encoder's outputs ``h`` and the memory reads ``r``.

    Two forms. ``causal=True`` predicts the next token and generates. ``causal=False`` is the encoder, which sees both
    sides. It is trained to predict a share ``mask_rate`` of the tokens, which are masked, because an encoder that saw
    its targets would only copy them.

    The memory never shows a prediction its own future: a batch reads the state it is given, which only earlier batches
    wrote, and ``loss`` returns the state that the next batch may read. In the causal form each stored vector is the
    output *after* a token, addressed by the output before it, so that a read returns what followed similar contexts.
    In the encoder form an output is stored under its own address.

    Args:
        vocab_size: number of tokens. d_model, layers, heads, d_hidden, dropout: of the encoder; d_hidden defaults to 4
            d_model.
        mem_size, mem_dim, scaled, gate_bias: of the memory; mem_dim defaults to d_model.
        max_length: longest sequence (number of positions).
        causal: the form. mask_rate: share of masked tokens in the encoder form.
        backend: passed to every memkernels operation; None means what :func:`memkernels.use_backend` says.

    Raises:
        ValueError: sizes that do not fit, a sequence longer than ``max_length``.

    Source: Vaswani et al. 2017, Attention Is All You Need; Sukhbaatar et al. 2015, End-To-End Memory Networks; Grave et
    al. 2017, Improving Neural Language Models with a Continuous Cache; Devlin et al. 2019, BERT.
    """

    positions: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        d_model: int = 128,
        layers: int = 2,
        heads: int = 4,
        d_hidden: int | None = None,
        dropout: float = 0.1,
        mem_size: int = 1024,
        mem_dim: int | None = None,
        scaled: bool = True,
        gate_bias: float = 0.0,
        max_length: int = 512,
        causal: bool = True,
        mask_rate: float = 0.15,
        backend: str | None = None,
    ):
        super().__init__()
        if not 0.0 < mask_rate < 1.0:
            raise ValueError(f"MemoryTransformerLM: mask_rate must lie between 0 and 1, got {mask_rate}")
        mem_dim = d_model if mem_dim is None else mem_dim
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.vocab_size, self.causal, self.mask_rate = vocab_size, causal, mask_rate
        self.embedding = nn.Embedding(
            vocab_size + (not causal), d_model
        )  # the last row of the encoder form is the mask symbol
        self.register_buffer("positions", sinusoidal_positions(max_length, d_model), persistent=False)
        self.layers = nn.ModuleList(
            EncoderLayer(d_model, heads, d_hidden, dropout, causal=causal, backend=backend) for _ in range(layers)
        )
        self.memory = ExternalMemory(mem_size, mem_dim, d_model, scaled=scaled, gate_bias=gate_bias, backend=backend)
        self.read_projection = nn.Linear(mem_dim, d_model, bias=False)
        self.output = nn.Linear(d_model, vocab_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)

    def initial_state(self, *streams: int) -> MemoryState:
        """What a text starts from: one memory shared by all, or for ``initial_state(B)`` one memory per stream."""
        return self.memory.initial_state(*streams)

    def encode(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The last layer's output: tokens int64 ``[B, T]`` -> ``[B, T, d]``. It does not depend on the memory.

        token_mask: bool ``[B, T]``, False for padding. Raises ValueError for more than ``max_length`` tokens.
        """
        longest = len(self.positions)
        if tokens.shape[-1] > longest:
            raise ValueError(f"MemoryTransformerLM: tokens must be [B, T <= {longest}], got {list(tokens.shape)}")
        width = self.embedding.embedding_dim
        x = self.dropout(self.embedding(tokens) * width**0.5 + self.positions[: tokens.shape[-1]])
        for layer in self.layers:
            x = layer(x, token_mask)
        return x

    def decode(self, hidden: Tensor, state: MemoryState) -> Tensor:
        """Log-probabilities of every position: hidden ``[B, T, d]`` -> ``[B, T, vocab]``, reading ``state``."""
        read = self.read_projection(self.memory.read(hidden, state))
        return F.log_softmax(self.output(hidden + self.dropout(read)), dim=-1)

    def forward(
        self, tokens: Tensor, state: MemoryState | None = None, *, token_mask: Tensor | None = None
    ) -> LMOutput:
        """Predict at every position.

        Args:
            tokens: int64 ``[B, T]``. Causal: ``log_probs[:, t]`` is over the token after ``t``; encoder: over the
                token at ``t``.
            state: values ``[N, V]`` (shared by all streams) or ``[B, N, V]``; default: the kept memory.
            token_mask: bool ``[B, T]``, False for padding, which must be at the end in the causal form.

        Returns:
            log-probabilities ``[B, T, vocab]`` and hidden ``[B, T, d]``.

        Raises:
            ValueError: ``tokens`` longer than ``max_length``. ValueError, TypeError: as
                :func:`memkernels.softmax_read`.
        """
        hidden = self.encode(tokens, token_mask)
        return LMOutput(self.decode(hidden, self.initial_state() if state is None else state), hidden)

    @torch.no_grad()
    def write(self, hidden: Tensor, state: MemoryState, *, token_mask: Tensor | None = None) -> MemoryState:
        """The state after ``hidden`` ``[B, T, d]`` was written, without gradient.

        token_mask: bool ``[B, T]``; padding, which is False there, writes nothing.
        """
        content, address, mask = self._pairs(hidden, token_mask)
        return self.memory.write(content, state, address=address, token_mask=mask)

    def _pairs(self, hidden: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Content, address and mask of the tokens that write."""
        if not self.causal:
            return hidden, hidden, token_mask
        return hidden[..., 1:, :], hidden[..., :-1, :], None if token_mask is None else token_mask[..., 1:]

    def loss(
        self, tokens: Tensor, state: MemoryState | None = None, *, token_mask: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """One step of a text: the mean negative log-likelihood, and the state that the next step reads.

        Causal: ``-mean_t log P(tokens_t+1 | tokens_<=t, state)`` over T - 1 predictions. Encoder: ``-mean_t log
        P(tokens_t | unmasked tokens, state)`` over the masked t.

        Args:
            tokens, state, token_mask: as in :meth:`forward`.

        Returns:
            ``(loss, state)``, loss in nats per predicted token; the state is new and carries no gradient.

        Raises:
            ValueError, TypeError: as :meth:`forward`.
        """
        state = self.initial_state() if state is None else state
        if self.causal:
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            inputs_mask = None if token_mask is None else token_mask[:, :-1]
            counted = None if token_mask is None else token_mask[:, 1:]
        else:
            counted = torch.rand(tokens.shape, device=tokens.device) < self.mask_rate
            if token_mask is not None:
                counted = counted & token_mask
            inputs, targets, inputs_mask = tokens.masked_fill(counted, self.vocab_size), tokens, token_mask
        log_probs, hidden = self(inputs, state, token_mask=inputs_mask)
        nll = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if counted is None:
            loss = nll.mean()
        else:
            loss = nll.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        return loss, self.write(hidden, state, token_mask=inputs_mask)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        state: MemoryState | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        write: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Continue each stream by ``count`` tokens. Causal form only; dropout is off.

        Every token is drawn from ``softmax(log_probs / temperature)``, restricted to the ``top_k`` most likely. With
        ``write`` the prompt and then each new token is written to memory before the next one is predicted.

        Args:
            tokens: int64 ``[B, T]``, T >= 1. Each prediction sees the last ``max_length`` of them, and the memory.
            state: values ``[N, V]`` (shared: streams write in order) or ``[B, N, V]``; default ``initial_state(B)``.
                It is not modified.
            temperature: 0 takes the most likely token. generator: of the random numbers.

        Returns:
            ``(tokens [B, T + count], state)``.

        Raises:
            ValueError: the encoder form, an empty prompt, temperature < 0, top_k < 1.
        """
        if not self.causal:
            raise ValueError("MemoryTransformerLM.generate: needs causal=True, got the encoder form")
        if tokens.dim() != 2 or tokens.shape[-1] == 0:
            raise ValueError(f"MemoryTransformerLM.generate: tokens must be [B, T >= 1], got {list(tokens.shape)}")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "MemoryTransformerLM.generate: temperature must be >= 0 and top_k >= 1, "
                f"got temperature={temperature} and top_k={top_k}"
            )
        state = self.initial_state(len(tokens)) if state is None else state.clone()
        training = self.training
        self.eval()
        try:
            unwritten = tokens.shape[-1]
            for _ in range(count):
                hidden = self.encode(tokens[:, -len(self.positions) :])
                if write:
                    content, address, _ = self._pairs(hidden, None)
                    state = self.memory.write_(content[:, -unwritten:], state, address=address[:, -unwritten:])
                log_probs = self.decode(hidden[:, -1:], state).squeeze(1)
                tokens = torch.cat([tokens, _sample(log_probs, temperature, top_k, generator)], dim=1)
                unwritten = 1
        finally:
            self.train(training)
        return tokens, state


def _sample(log_probs: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row: ``[B, vocab]`` -> int64 ``[B, 1]``."""
    if temperature == 0:
        return log_probs.argmax(-1, keepdim=True)
    candidates = log_probs.shape[-1] if top_k is None else min(top_k, log_probs.shape[-1])
    best, index = log_probs.topk(candidates, dim=-1)
    drawn = torch.multinomial(torch.softmax(best.float() / temperature, dim=-1), 1, generator=generator)
    return index.gather(-1, drawn)
