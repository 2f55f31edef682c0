"""StreamingMemory: a causal layer whose tokens write into slots and read what the slots then hold.

    q_t = W_q x_t,   p_t = W_p x_t,   w_t = W_w x_t                      split into H heads
    v_i <- v_i (1 - a[t, i]) + a[t, i] w_t,                              a[t, i] = sigmoid(scale * <p_t, k_i> + b_i)
    r_t  = sum_i softmax_i(scale * <q_t, k_i> + b_i) v_i,                y_t = W_o r_t            for t = 1 .. T

Sources: Graves et al. 2014, Neural Turing Machines; Zhang et al. 2024, Gated Slot Attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import memory_scan
from ._sizes import check_sizes
from .external_memory import MemoryState


class StreamingMemory(nn.Module):
    """A layer for streaming language models: the past in a fixed number of slots, whatever its length.

    ``v_i <- v_i (1 - a[t, i]) + a[t, i] W_w x_t`` with ``a[t, i] = sigmoid(scale * <W_p x_t, k_i> + b_i)``, then
    ``y_t = W_o sum_i softmax_i(scale * <W_q x_t, k_i> + b_i) v_i``, for each token in order and each head.

    Every token writes into the slots of its head by sigmoid gates and reads them by a softmax; it sees what the tokens
    before it wrote, and nothing of those after it. The keys ``k_i`` and the bias ``b_i`` of a slot are learned. A slot
    with a small bias is rarely written and keeps its content long; one with a large bias follows the last tokens. The
    initial biases are spread from a gate of 1/2 down to one of ``1 / (2 mem_size)``.

    State is functional: :meth:`forward` takes a :class:`MemoryState` and returns the next one, so that a text in pieces
    equals the text at once, and ``state.detach()`` is truncated backpropagation. A new stream starts empty.

    Args:
        width: of ``x`` and of the result; ``heads`` divides it. mem_size: N, slots per head. heads: H.
        read_first: a token reads before it writes, so that it sees the tokens before it only.
        backend: passed to :func:`memkernels.memory_scan`.

    Raises:
        ValueError: a size below 1, ``heads`` that do not divide ``width``.

    Source: Graves et al. 2014, Neural Turing Machines; Zhang et al. 2024, Gated Slot Attention.
    """

    def __init__(
        self, width: int, mem_size: int, *, heads: int = 1, read_first: bool = False, backend: str | None = None
    ):
        super().__init__()
        check_sizes("StreamingMemory", width=width, mem_size=mem_size, heads=heads)
        if width % heads:
            raise ValueError(f"StreamingMemory: heads must divide width {width}, got {heads}")
        self.heads, self.read_first, self.backend = heads, read_first, backend
        self.project_in = nn.Linear(width, 3 * width, bias=False)  # rows of q, of p, of w
        self.project_out = nn.Linear(width, width, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, mem_size, width // heads))
        self.slot_bias = nn.Parameter(torch.empty(heads, mem_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters; biases from the logit of 1/2 down to that of 1 / (2 mem_size)."""
        self.project_in.reset_parameters()
        self.project_out.reset_parameters()
        nn.init.normal_(self.keys)
        with torch.no_grad():
            slots = self.slot_bias.shape[-1]
            self.slot_bias.copy_(torch.logit(torch.logspace(0, -1, slots, base=float(slots)) / 2))

    def initial_state(self, *streams: int) -> MemoryState:
        """An empty memory for each stream: values ``[*streams, H, N, width / H]``."""
        return MemoryState(torch.zeros_like(self.keys).expand(*streams, *self.keys.shape).clone())

    def forward(
        self, x: Tensor, state: MemoryState | None = None, *, token_mask: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Write and read, token by token.

        Args:
            x: ``[..., T, width]``. state: what the streams hold; default ``initial_state`` of the leading dimensions.
            token_mask: bool ``[..., T]``; a token at False writes nothing and reads 0.

        Returns:
            ``(y [..., T, width], state)``; differentiable back into the state that was given, which is not modified.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not fit.
        """
        state = self.initial_state(*x.shape[:-2]) if state is None else state
        projected = self.project_in(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2)  # [..., H, 3, T, K]
        read_query, write_query, write = projected.unbind(-3)
        reads, values = memory_scan(
            state.values,
            self.keys,
            read_query,
            write_query,
            write.to(state.values.dtype),
            slot_mask=self.slot_bias,
            token_mask=None if token_mask is None else token_mask.unsqueeze(-2),
            read_first=self.read_first,
            backend=self.backend,
        )
        return self.project_out(reads.transpose(-3, -2).flatten(-2)), MemoryState(values)

    def extra_repr(self) -> str:
        heads, slots, _ = self.keys.shape
        return f"mem_size={slots}, heads={heads}, read_first={self.read_first}"
