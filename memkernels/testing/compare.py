"""When a result counts as right: the one tolerance table, the error norm, and the check of chosen slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Op, stats_dtype

# Largest error of a result, by the dtype of the call (of the result, where that is a float32 statistic of a 16-bit
# call). A few hundred roundings for float32 and float64, which have long sums; two for the 16-bit types, which
# accumulate in float32 and are rounded at the end; none for integers. A result may also be twice as wrong as plain
# PyTorch at that dtype.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-13,
    torch.int64: 0.0,
}

# A result is measured against its own largest number, but never against less than this share of the largest number of
# all results (or this much, absolutely): where terms cancel to almost nothing only the size of the terms is meaningful.
FLOOR = 0.05

# Error that small rows may keep from large terms that cancel, as a share of the float32 (float64) entry of the table.
ROUNDING = 0.3


@dataclass(frozen=True)
class Verdict:
    """``error`` and ``tolerance`` of the worst result; ``problem`` says what is wrong, or is empty."""

    error: float
    tolerance: float
    problem: str = ""


def table(call: torch.dtype, result: torch.dtype) -> float:
    """The entry of ``TOLERANCE`` for a result of ``result`` dtype in a call of ``call`` dtype."""
    return TOLERANCE[result if result == stats_dtype(call) and call != torch.float64 else call]


def size(wanted: Tensor) -> float:
    """The largest finite number."""
    return float(torch.where(torch.isfinite(wanted), wanted.abs(), 0.0).amax()) if wanted.numel() else 0.0


def norms(wanted: Sequence[Tensor]) -> list[float]:
    """What the errors of these results are measured against."""
    own = [size(w) for w in wanted]
    largest = max(own, default=0.0)
    return [max(n, FLOOR * largest, FLOOR) for n in own]


def distance(got: Tensor, wanted: Tensor, norm: float) -> float:
    """``max |got - wanted| / norm`` over the numbers that are finite in both."""
    return size(got.double() - wanted) / norm


def small_ones(got: Tensor, wanted: Tensor, positive: bool, call: torch.dtype, norm: float, plain: Callable) -> str:
    """What is wrong with numbers that are small beside the largest of their result, or an empty string.

    positive: each number is a sum of positive terms, as a weight is. Nothing cancels, so each must be right to the
        digits of its dtype, however small. Twice the table is allowed, because the exponent rounds the score too.
    Other results are judged by rows, the last axis: a row by its own largest number, but allowed what rounding leaves
    of terms as large as ``norm``.
    plain: makes the same result by plain PyTorch at the dtype of the call; twice its error is allowed as well.
    """
    if not wanted.numel() or not wanted.dim():
        return ""
    error, size = _finite(got.double() - wanted), _finite(wanted)
    allowed = table(call, got.dtype)
    if positive:
        least = torch.finfo(torch.float32).tiny if got.dtype != torch.float16 else 2.0**-24  # below, 0 is right too
        size = size.clamp(min=least)
        limit = 2 * allowed * size + least
        if bool((error > limit).any()):
            theirs = (_finite(plain().double() - wanted) - least).clamp(min=0) / size
            limit = limit + 2 * theirs.amax() * size
    else:
        size, error = size.amax(-1, keepdim=True), error.amax(-1, keepdim=True)
        limit = allowed * size + ROUNDING * TOLERANCE[stats_dtype(call)] * norm
        if bool((error > limit).any()):
            limit = limit + 2 * _finite(plain().double() - wanted).amax()
    at = (error - limit).argmax()
    found, whole, most = (float(x.reshape(-1)[at]) for x in (error, size, limit))
    if found <= most:
        return ""
    what = "a number of" if positive else "a row of at most"
    return f"{what} {whole:.1e} is off by {found:.1e}, at most {most:.1e}"


def _finite(x: Tensor) -> Tensor:
    """Absolute values, and 0 for what is not finite."""
    return torch.where(torch.isfinite(x), x.abs(), 0.0)


def special_values(got: Tensor, wanted: Tensor, *, nan_must_stay: bool) -> str:
    """What is wrong with NaN and infinities, or an empty string."""
    got_finite, wanted_finite = torch.isfinite(got), torch.isfinite(wanted)
    if bool((got_finite & wanted_finite).all()):
        return ""
    got_nan, wanted_nan = got.isnan(), wanted.isnan()
    if bool((got_nan & ~wanted_nan).any()):
        return f"{int((got_nan & ~wanted_nan).sum())} NaN where the reference has none"
    if nan_must_stay and bool((wanted_nan & ~got_nan).any()):
        return "a number where the reference is NaN"
    if bool((~(wanted_nan | got_nan | (got_finite & wanted_finite)) & (got.double() != wanted)).any()):
        return "infinities differ from the reference"
    return ""


def wrong_choice(op: Op, tensors: Sequence[Tensor | None], params: Sequence, indices: Tensor, exact: bool) -> str:
    """What is wrong with the slots that ``op`` chose, judged by the declared scores in float64; empty when nothing is.

    Slots whose scores differ by less than float32 rounding may be ranked either way, unless ``exact``: then arithmetic
    is exact and the indices must be those of the reference, ties to the smaller one.
    """
    assert op.choice is not None and op.choice.judge is not None
    s = op.choice.judge(*tensors, *params)
    slots = s.shape[-1]
    if bool(((indices < -1) | (indices >= slots)).any()):
        return f"an index outside [-1, {slots})"
    if exact:
        wanted = op.reference(*tensors, *params)[op.outputs.index(op.choice)]
        return "" if torch.equal(indices, wanted) else "ties are not broken to the smaller index"
    if not slots or not indices.numel():
        return ""
    lead = torch.broadcast_shapes(s.shape[:-1], indices.shape[:-1])
    s, indices = s.expand(*lead, -1), indices.expand(*lead, -1)
    clean = ~s.isnan().any(-1)
    open_slots = (~torch.isneginf(s)).sum(-1).clamp(max=indices.shape[-1])
    position = torch.arange(indices.shape[-1], device=indices.device)
    if bool((((indices >= 0) != (position < open_slots.unsqueeze(-1))).any(-1) & clean).any()):
        return "-1 is not where addressable slots run out"
    counts = torch.zeros((*lead, slots), device=s.device).scatter_add_(-1, indices.clamp(min=0), (indices >= 0).float())
    if bool(((counts > 1).any(-1) & clean).any()):
        return "a slot is chosen twice"
    slack = TOLERANCE[torch.float32] * torch.where(torch.isfinite(s), s.abs(), 0.0).amax(-1, keepdim=True).clamp(
        min=1.0
    )
    chosen = torch.gather(s, -1, indices.clamp(min=0))
    best = torch.sort(s, -1, descending=True).values[..., : chosen.shape[-1]]
    chosen = chosen[..., : best.shape[-1]]
    behind = (chosen < best - slack) & (indices[..., : best.shape[-1]] >= 0)
    if bool((behind.any(-1) & clean).any()):
        return "a better slot was left out, or the order is wrong"
    return ""
