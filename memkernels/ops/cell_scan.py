"""cell_scan: the memory cell, all tokens of a stream in one call.

    z_t = inputs_t + weight h_{t-1},                three blocks of D: z_t = [zf_t, zi_t, zc_t]
    h_t = sigmoid(zf_t) * h_{t-1} + sigmoid(zi_t) * tanh(zc_t)       for t = 1 .. T, h_0 = initial

Sources: Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Gers et al. 2000, Learning to Forget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype


def reference(inputs: Tensor, weight: Tensor, initial: Tensor | None):
    exact = stats_dtype(inputs.dtype)
    x, w = inputs.to(exact), weight.to(exact)
    h = torch.zeros(w.shape[-1], dtype=exact, device=w.device) if initial is None else initial.to(exact)
    lead = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2], h.shape[:-1])
    states = [h.expand(*lead, w.shape[-1])]
    for t in range(x.shape[-2]):
        h = states[-1]
        f, i, c = (x[..., t, :] + (w @ h.unsqueeze(-1)).squeeze(-1)).chunk(3, -1)
        states.append(torch.sigmoid(f) * h + torch.sigmoid(i) * torch.tanh(c))
    return (torch.stack(states, -2)[..., 1:, :].to(inputs.dtype),)


OP = register(
    Op(
        name="cell_scan",
        args=(
            Arg("inputs", "T 3D", "tokens", "lead"),
            Arg("weight", "3D D", "memory", fill="recurrent"),
            Arg("initial", "D", "tokens", "same", optional=True),
        ),
        outputs=(Out("states", "T D"),),
        saved=("states",),
        reference=reference,
        flops=lambda s: 6 * s["T"] * s["D"] ** 2,
        backward_flops=lambda s: 18 * s["T"] * s["D"] ** 2,  # forward again, d_weight, d_states
        autocast=("inputs", "weight", "initial"),
        equation="h_t = sigmoid(zf) h_{t-1} + sigmoid(zi) tanh(zc), [zf, zi, zc] = x_t + W h_{t-1}",
    )
)


def cell_scan(
    inputs: Tensor,
    weight: Tensor,
    initial: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """All states of the memory cell: ``h_t = f_t * h_{t-1} + i_t * c_t``.

    ``[f_t, i_t, c_t]`` are the three blocks of ``inputs_t + weight @ h_{t-1}``: forget gate (sigmoid), input gate
    (sigmoid) and candidate (tanh).

    Args:
        inputs: ``[..., T, 3D]``, float32, bfloat16, float16 or float64: what the tokens contribute, a linear map of
            them with its bias.
        weight: ``[3D, D]``, the recurrent weight, same dtype; with leading dimensions, one for each of them.
        initial: ``h_0``, ``[..., D]``, same dtype; default 0.
        backend: as in :func:`softmax_read`.

    Returns:
        the states ``h_1 .. h_T``, ``[..., T, D]`` in the dtype of ``inputs``. The last one is the ``initial`` of the
        tokens that follow. Leading dimensions broadcast. Differentiable in every argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Gers et al. 2000, Learning to Forget.
    """
    return call(OP, [inputs, weight, initial], (), backend)
