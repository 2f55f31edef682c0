"""gated_scan: a linear recurrence over tokens, each channel on its own.

    h_t = f_t * h_{t-1} + u_t                                        for t = 1 .. T, h_0 = initial

Sources: Martin and Cundy 2018, Parallelizing Linear Recurrent Neural Nets Over Sequence Length; Blelloch 1990, Prefix
Sums and Their Applications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype


def reference(forget: Tensor, update: Tensor, initial: Tensor | None):
    exact = stats_dtype(forget.dtype)
    f, u = torch.broadcast_tensors(forget.to(exact), update.to(exact))
    h = torch.zeros(f.shape[-1], dtype=exact, device=f.device) if initial is None else initial.to(exact)
    lead = torch.broadcast_shapes(f.shape[:-2], h.shape[:-1])
    states = [h.expand(*lead, f.shape[-1])]
    for t in range(f.shape[-2]):
        states.append(f[..., t, :] * states[-1] + u[..., t, :])
    return (torch.stack(states, -2)[..., 1:, :].to(update.dtype),)


OP = register(
    Op(
        name="gated_scan",
        args=(
            Arg("forget", "T D", "tokens", "lead", fill="uniform"),
            Arg("update", "T D", "tokens", "content"),
            Arg("initial", "D", "tokens", "content", optional=True),
        ),
        outputs=(Out("states", "T D", dtype="update"),),
        saved=("states",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["D"],
        backward_flops=lambda s: 4 * s["T"] * s["D"],
        equation="h_t = f_t h_{t-1} + u_t, t = 1..T",
    )
)


def gated_scan(
    forget: Tensor,
    update: Tensor,
    initial: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """All states of a linear recurrence: ``h_t = f_t * h_{t-1} + u_t``, channel by channel.

    Args:
        forget: ``f``, ``[..., T, D]``, float32, bfloat16, float16 or float64. Meant to be in [0, 1]; outside, the
            states may grow without bound.
        update: ``u``, ``[..., T, D]``, dtype of ``forget``, or float32 beside a 16-bit ``forget``.
        initial: ``h_0``, ``[..., D]``, dtype of ``update``; default 0.
        backend: as in :func:`softmax_read`.

    Returns:
        the states ``h_1 .. h_T``, ``[..., T, D]`` in the dtype of ``update``. The last one is the ``initial`` of the
        tokens that follow. Leading dimensions broadcast. Differentiable in every argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Martin and Cundy 2018, Parallelizing Linear Recurrent Neural Nets Over Sequence Length.
    """
    return call(OP, [forget, update, initial], (), backend)
