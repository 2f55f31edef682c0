"""MemoryCell: a recurrent state with a forget gate and an input gate for each channel.

    f_t = sigmoid(W_f [h_(t-1), x_t] + b_f),   i_t = sigmoid(W_i [h_(t-1), x_t] + b_i)
    h_t = f_t * h_(t-1) + i_t * tanh(W [h_(t-1), x_t] + b)

Sources: Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Gers et al. 2000, Learning to Forget.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import cell_scan
from ._sizes import check_sizes


class MemoryCell(nn.Module):
    """All states of a gated memory cell over a sequence, in one call.

    ``h_t = f_t * h_(t-1) + i_t * tanh(W [h_(t-1), x_t] + b)``, with a forget gate and an input gate computed from the
    same pair. What depends on ``x`` is one product for all tokens; only the product with ``h_(t-1)`` goes step by step.

    State is functional: the last state is the ``initial`` of the next tokens; ``.detach()`` ends backpropagation there.

    Args:
        input_size: width of ``x``. hidden_size: D, width of the state.
        forget_bias: where ``b_f`` begins. Above 0 the cell keeps what it holds until it learns when to forget.
        backend: passed to :func:`memkernels.cell_scan`.

    Raises:
        ValueError: a size below 1.

    Source: Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Gers et al. 2000, Learning to Forget.
    """

    def __init__(self, input_size: int, hidden_size: int, *, forget_bias: float = 1.0, backend: str | None = None):
        super().__init__()
        check_sizes("MemoryCell", input_size=input_size, hidden_size=hidden_size)
        self.hidden_size, self.forget_bias, self.backend = hidden_size, forget_bias, backend
        self.input_projection = nn.Linear(input_size, 3 * hidden_size)  # rows of f, of i, of the candidate
        self.weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters: recurrent blocks orthogonal, the bias of the forget gate ``forget_bias``."""
        self.input_projection.reset_parameters()
        with torch.no_grad():
            for block in self.weight.split(self.hidden_size):
                nn.init.orthogonal_(block)
            self.input_projection.bias.zero_()
            self.input_projection.bias[: self.hidden_size] = self.forget_bias

    def forward(self, x: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            x: ``[..., T, input_size]``. initial: ``h_0``, ``[..., D]``; default 0.

        Returns:
            ``(states [..., T, D], last [..., D])``; ``last`` is ``initial`` where T is 0.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not fit.
        """
        inputs = self.input_projection(x)
        if initial is None:
            initial = inputs.new_zeros(*x.shape[:-2], self.hidden_size)
        states = cell_scan(inputs, self.weight, initial, backend=self.backend)
        return states, states[..., -1, :] if x.shape[-2] else initial

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}"
