"""memory_gate: how much of a looked-up value a token takes, by the agreement of its hidden state with the value's key.

    g = <rms(hidden) * hidden_weight, rms(key) * key_weight> / sqrt(D),    rms(x) = x / sqrt(mean(x^2) + eps)
    g <- sign(g) sqrt(max(|g|, 1e-6))                                      (signed_sqrt; sign(0) = 0)
    out_b = sigmoid(g_b) value

Sources: Cheng et al. 2026, Conditional Memory via Scalable Lookup (Engram, arXiv 2601.07372), whose published code has
the signed square root; Zhang and Sennrich 2019, Root Mean Square Layer Normalization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, shaped, stats_dtype
from ._options import number

LEAST = 1e-6  # under the square root, whose slope would grow without bound


def reference(hidden, key, value, hidden_weight, key_weight, eps: float, signed_sqrt: bool):
    exact = stats_dtype(hidden.dtype)
    h, k, v = hidden.to(exact), key.to(exact), value.to(exact)
    hidden_rstd = torch.rsqrt(h.square().mean(-1) + eps)
    key_rstd = torch.rsqrt(k.square().mean(-1) + eps)
    h = h * hidden_rstd.unsqueeze(-1) * hidden_weight.to(exact)
    k = k * key_rstd.unsqueeze(-1) * key_weight.to(exact)
    score = (h * k).sum(-1) / max(h.shape[-1], 1) ** 0.5
    root = score.sign() * score.abs().clamp(min=LEAST).sqrt() if signed_sqrt else score
    gated = torch.sigmoid(root).unsqueeze(-1) * v.unsqueeze(-2)
    lead = gated.shape[:-1]
    stats = (x.expand(lead).contiguous() for x in (hidden_rstd, key_rstd, score))
    return gated.to(hidden.dtype), *stats


def _agreeing(hidden, key, *rest) -> Tensor:
    """A key close to the hidden state or its opposite: the root of a score near 0 has no digits."""
    for d in range(-1, -key.dim() - 1, -1):
        if -d <= hidden.dim() and hidden.shape[d] > key.shape[d]:
            hidden = hidden.narrow(d, 0, key.shape[d])
    sign = 1 - 2 * (torch.arange(key[..., 0].numel(), device=key.device) % 2).view(key.shape[:-1]).unsqueeze(-1)
    return (key / 4 + sign * hidden).to(key.dtype)


def _about_one(place: int):
    return lambda *tensors: (1 + tensors[place] / 4).to(tensors[place].dtype)


OP = register(
    Op(
        name="memory_gate",
        args=(
            Arg("hidden", "B D", "tokens", "lead"),
            Arg("key", "B D", "tokens", fill=_agreeing),
            Arg("value", "D", "tokens"),
            Arg("hidden_weight", "B D", "memory", "content", flat=True, fill=_about_one(3)),
            Arg("key_weight", "B D", "memory", "content", flat=True, fill=_about_one(4)),
        ),
        params=(("eps", "float"), ("signed_sqrt", "bool")),
        usual={"eps": 1e-6, "signed_sqrt": True},
        outputs=(
            Out("gated", "B D"),
            Out("hidden_rstd", "B", dtype="stats", grad=False),
            Out("key_rstd", "B", dtype="stats", grad=False),
            Out("score", "B", dtype="stats", grad=False),
        ),
        saved=("hidden_rstd", "key_rstd", "score"),
        reference=reference,
        flops=lambda s: 8 * s["B"] * s["D"],  # two sums of squares, the weighted product, the value
        backward_flops=lambda s: 14 * s["B"] * s["D"],  # <d, value>, d_value, d_hidden, d_key, the sum of d_weights
        equation="sigmoid(s) value, s = signed sqrt of <rms(hidden) w_h, rms(key) w_k> / sqrt(D)",
    )
)


def memory_gate(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_weight: Tensor,
    key_weight: Tensor,
    *,
    eps: float,
    signed_sqrt: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A value that was looked up, weighted by how well its key agrees with the hidden state, in one pass.

    ``g = <rms(hidden) * hidden_weight, rms(key) * key_weight> / sqrt(D)`` and ``sigmoid(sign(g) sqrt(max(|g|, 1e-6))) *
    value`` with ``rms(x) = x / sqrt(mean(x^2) + eps)``, for each of ``B`` branches of the hidden state.

    Args:
        hidden: ``[..., B, D]``, float32, bfloat16, float16 or float64.
        key: ``[..., B, D]``, one per branch, dtype of ``hidden``.
        value: ``[..., D]``, the same for all branches, dtype of ``hidden``.
        hidden_weight, key_weight: ``[D]`` or ``[B, D]``, the weights of both normalisations, dtype of ``hidden`` or
            float32 beside 16 bits.
        eps: added to the mean of squares.
        signed_sqrt: False: the gate is ``sigmoid(g)``, as the text of the paper has it; True as its code does.
        backend: as in :func:`softmax_read`.

    Returns:
        ``[..., B, D]`` in the dtype of ``hidden``. Differentiable in all five tensors, to any order. Where
        ``|g| < 1e-6`` the signed square root is constant and the gate has no gradient.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or eps is no number.
            NotImplementedError: the named backend cannot run the call.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """
    if type(eps) is not float or eps != eps:  # a shortcut: small calls are bound by Python
        eps = number("memory_gate", "eps", eps, "a number")
    if signed_sqrt is not True and signed_sqrt is not False:
        raise TypeError(f"memory_gate: signed_sqrt must be a bool, got {type(signed_sqrt).__name__}")
    weights = (_of_branches(weight, hidden) for weight in (hidden_weight, key_weight))
    return call(OP, [hidden, key, value, *weights], (eps, signed_sqrt), backend)[0]


def _of_branches(weight: Tensor, hidden: Tensor) -> Tensor:
    """A weight ``[D]`` is that of every branch."""
    if not shaped(weight, hidden) or weight.dim() != 1 or hidden.dim() < 2:
        return weight
    return weight.expand(hidden.shape[-2], weight.shape[0])
