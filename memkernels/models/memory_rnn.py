"""MemoryRNN: a recurrent network that reads and writes a memory at every step.

    h_t = GRU(x_t, h_(t-1))
    r_t = sum_i w^r[t, i] m_i,   y_t = h_t + r_t
    m_i <- m_i + w^w[t, i] (h_t - m_i)

    addressing by "location":   w^r[t] = softmax(A_r h_t + b_r),        w^w[t] = softmax(A_w h_t + b_w)
    addressing by "content":    w^r[t, i] = softmax_i(<A_r h_t, m_i>),  w^w[t, i] = softmax_i(<A_w h_t, m_i>)

Sources: Graves et al. 2014, Neural Turing Machines (both addressings, writing by interpolation); Cho et al. 2014,
Learning Phrase Representations using RNN Encoder-Decoder (the GRU).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn._sizes import check_sizes
from ..ops import softmax_read, softmax_write

ADDRESSINGS = ("location", "content")


class RNNState(NamedTuple):
    """What a :class:`MemoryRNN` carries from step to step. hidden: ``[B, W]``. memory: ``[B, N, W]``."""

    hidden: Tensor
    memory: Tensor

    def detach(self) -> RNNState:
        """The same content, detached from the graph: truncated backpropagation through time."""
        return RNNState(self.hidden.detach(), self.memory.detach())


class MemoryRNN(nn.Module):
    """A GRU with N memory slots as wide as its hidden state.

    At every step the hidden state reads the memory, is added to what it read, and is written over the slots it
    addresses: ``y_t = h_t + sum_i w^r_i m_i``, then ``m_i <- m_i + w^w_i (h_t - m_i)``. By *location* the weights are
    ``softmax(A h_t + b)``: the network learns which slot to use. By *content* they are ``softmax_i(<A h_t, m_i>)``:
    the network finds a slot by what it holds. Both are one softmax read and one softmax write, whose keys are the rows
    of ``A`` or the slots themselves.

    State is functional: it comes in as an argument and goes out as a result. The memory that a stream starts from is
    the parameter ``memory`` ``[N, W]``, random so that slots differ from each other, and trained.

    Args:
        input_size: width of ``x``. hidden_size: W. mem_size: N, slots.
        addressing: ``"location"`` or ``"content"``.
        backend: passed to every memkernels operation.

    Raises:
        ValueError: a size below 1, an unknown addressing.

    Source: Graves et al. 2014, Neural Turing Machines.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mem_size: int,
        *,
        addressing: str = "content",
        backend: str | None = None,
    ):
        super().__init__()
        check_sizes("MemoryRNN", input_size=input_size, hidden_size=hidden_size, mem_size=mem_size)
        if addressing not in ADDRESSINGS:
            raise ValueError(f"MemoryRNN: addressing must be one of {', '.join(ADDRESSINGS)}, got {addressing!r}")
        self.addressing, self.backend = addressing, backend
        self.cell = nn.GRUCell(input_size, hidden_size)
        rows = mem_size if addressing == "location" else hidden_size
        self.read_address = nn.Linear(hidden_size, rows, bias=addressing == "location")
        self.write_address = nn.Linear(hidden_size, rows, bias=addressing == "location")
        self.memory = nn.Parameter(torch.empty(mem_size, hidden_size))
        for weight in (self.memory, self.read_address.weight, self.write_address.weight):
            nn.init.normal_(weight, std=hidden_size**-0.5)

    def initial_state(self, streams: int) -> RNNState:
        """What ``streams`` sequences start from: hidden 0, the memory of the parameter ``memory``."""
        hidden = self.memory.new_zeros(streams, self.memory.shape[-1])
        return RNNState(hidden, self.memory.expand(streams, *self.memory.shape))

    def forward(self, x: Tensor, state: RNNState | None = None) -> tuple[Tensor, RNNState]:
        """Run over a sequence.

        Args:
            x: ``[B, T, input_size]``. state: where the sequences stand; default ``initial_state(B)``. Not modified.

        Returns:
            ``(y [B, T, W], state)``; differentiable back into the state that was given.

        Raises:
            ValueError: ``x`` does not have three dimensions.
        """
        if x.dim() != 3:
            raise ValueError(f"MemoryRNN: x must be [B, T, input_size], got {list(x.shape)}")
        hidden, memory = self.initial_state(len(x)) if state is None else state
        outputs = []
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
            token = hidden.unsqueeze(1)  # [B, 1, W]
            query, keys, bias = self._address(self.read_address, token, memory)
            read = softmax_read(query, keys, memory, scale=1.0, slot_mask=bias, backend=self.backend)
            query, keys, bias = self._address(self.write_address, token, memory)
            memory = softmax_write(
                memory, keys, query, token.to(memory.dtype), scale=1.0, slot_mask=bias, backend=self.backend
            )
            outputs.append(hidden + read.squeeze(1))
        y = torch.stack(outputs, 1) if outputs else hidden.new_zeros(len(x), 0, hidden.shape[-1])
        return y, RNNState(hidden, memory)

    def _address(self, address: nn.Linear, token: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query, keys and bias whose scores ``<query, key_i> + bias_i`` are those of the addressing."""
        if self.addressing == "location":  # A h + b, row by row of A
            return token, address.weight, address.bias
        query = address(token)
        return query, memory.to(query.dtype), None

    def extra_repr(self) -> str:
        return f"mem_size={len(self.memory)}, addressing={self.addressing!r}"
