"""merge_reads: reads of disjoint memories become the read of their union, exactly.

    lse = log sum_s exp(lse_s),      r = sum_s exp(lse_s - lse) r_s

Sources: Milakov and Gimelshein 2018, Online normalizer calculation for softmax; Juravsky et al. 2024, Hydragen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import FLOATS, Arg, Op, Out
from ._formula import softmax


def reference(reads: Tensor, lses: Tensor):
    weights, lse, _ = softmax(lses.mT)
    live = reads.to(weights.dtype).masked_fill((weights.mT == 0).unsqueeze(-1), 0)
    read = torch.einsum("...ts,...stv->...tv", weights, live)
    return read.to(reads.dtype), lse.expand(read.shape[:-1])


OP = register(
    Op(
        name="merge_reads",
        args=(Arg("reads", "S T V", "tokens", "lead"), Arg("lses", "S T", "tokens", "stats", hides=True)),
        outputs=(Out("read", "T V"), Out("lse", "T", dtype="stats")),
        reference=reference,
        flops=lambda s: 2 * s["S"] * s["T"] * s["V"],
        backward_flops=lambda s: 4 * s["S"] * s["T"] * s["V"],  # d_reads, d_weights
        equation="lse = log sum_s exp(lse_s);  r = sum_s exp(lse_s - lse) r_s",
    )
)


def merge_reads(
    reads: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merge reads of disjoint memories into the read of the whole, exactly.

    ``lse = log sum_s exp(lse_s)`` and ``read = sum_s exp(lse_s - lse) read_s``

    Args:
        reads: sequence of S reads ``[..., T, V]``, or one tensor ``[S, ..., T, V]``; float32, bfloat16,
            float16 or float64.
        lses: sequence of S log-sum-exps ``[..., T]``, or one tensor ``[S, ..., T]``; float32 (float64 for float64).
        backend: as in :func:`softmax_read`.

    Returns:
        ``(read [..., T, V], lse [..., T])`` in the dtypes of reads and lses. Differentiable in both arguments, to any
        order. A part with lse -inf counts for nothing.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or there is nothing to merge.
            NotImplementedError: the named backend cannot run the call.

    Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax.
    """
    stacked = _stack("reads", reads, -3), _stack("lses", lses, -2)
    return call(OP, list(stacked), (), backend)


def _stack(name: str, parts: Sequence[Tensor] | Tensor, dim: int) -> Tensor:
    if isinstance(parts, Tensor):
        if parts.is_nested or parts.layout != torch.strided:
            raise TypeError(f"merge_reads: {name} must be a dense tensor or several, got a nested or sparse one")
        if parts.dim() < -dim:
            raise ValueError(f"merge_reads: {name} must have at least {-dim} dimensions, got {list(parts.shape)}")
        return parts.movedim(0, dim)
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        raise TypeError(f"merge_reads: {name} must be a tensor or a sequence of tensors, got {type(parts).__name__}")
    parts = list(parts)
    if not parts:
        raise ValueError(f"merge_reads: {name} must hold at least one tensor, got none")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        parts = _promoted(parts)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"merge_reads: {name} must hold tensors, got {type(part).__name__}")
        if part.is_nested or part.layout != torch.strided:
            raise TypeError(f"merge_reads: {name} must hold dense tensors, got a nested or sparse one")
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype or part.dim() < -dim - 1:
            raise ValueError(
                f"merge_reads: {name} must all be like the first, {list(parts[0].shape)} {parts[0].dtype}, "
                f"got {list(part.shape)} {part.dtype}"
            )
    return torch.stack(parts, dim)


def _promoted(parts: list) -> list:
    """``parts`` in the widest of their dtypes, as torch.stack makes them where autocast is on."""
    if not all(isinstance(part, Tensor) and part.dtype in FLOATS for part in parts):
        return parts
    widest = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    return [part.to(widest) for part in parts]
