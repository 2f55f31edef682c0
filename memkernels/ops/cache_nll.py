"""cache_nll: the loss of a language model mixed with a cache, without the mixed distribution.

    nll_t = -log((1 - mix) softmax(logits_t)[y_t] + mix * sum_{j: token_j = y_t} softmax(cache_scores_t)_j)

and, from the same pass over the logits, how sure the model is: with q = softmax(logits_t)

    lse_t = log sum_w exp(logits_tw),     largest_t = max_w q_w,     entropy_t = -sum_w q_w log q_w

Sources: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache; Khandelwal et al. 2020,
Generalization through Memorization: Nearest Neighbor Language Models.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import LSE_REST, Arg, Op, Out, stats_dtype
from ._formula import softmax
from .cache_logprobs import mixture, spread


class LogitStats(NamedTuple):
    """Of the model's own distribution ``q = softmax(logits)``, each ``[..., T]``: ``lse``, the log-sum-exp of the
    logits; ``largest``, the largest q; ``entropy``, ``-sum q log q`` in nats."""

    lse: Tensor
    largest: Tensor
    entropy: Tensor


def statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, lse_rest, largest and entropy ``[..., T]``. Without a word above -inf: -inf, 0, 0, 0."""
    z = logits.to(stats_dtype(logits.dtype))
    q, lse, rest = softmax(z)
    if known(z.shape[-1] == 0):
        return lse, rest, torch.zeros_like(lse), torch.zeros_like(lse)
    lse = lse.masked_fill(torch.isposinf(lse), torch.nan)  # as the loss: an infinite logit gives no distribution
    nothing = torch.isneginf(lse)
    z, own = z.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, 0)
    largest = torch.exp((z.amax(-1) - own) - rest).masked_fill(nothing, 0)
    log_q = ((z - own.unsqueeze(-1)) - rest.unsqueeze(-1)).masked_fill(q == 0, 0)
    return lse, rest, largest, -(q * log_q).sum(-1)


def reference(logits: Tensor, targets: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor, stats: bool):
    log_p, _, _ = mixture(logits, cache_scores, cache_tokens, mix)
    lead = torch.broadcast_shapes(log_p.shape[:-1], targets.shape)
    log_p, ignored = log_p.expand(*lead, -1), (targets == -1).expand(lead)
    chosen = torch.gather(log_p, -1, targets.expand(lead).masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    lse, rest, largest, entropy = statistics(logits)
    if not stats:
        largest, entropy = torch.zeros_like(lse), torch.zeros_like(lse)
    return -chosen.masked_fill(ignored, 0), *(x.expand(lead) for x in (lse, rest, largest, entropy))


OP = register(
    Op(
        name="cache_nll",
        args=(
            Arg("logits", "T W", "tokens", "lead"),
            Arg("targets", "T", "tokens", "index", of="W"),
            Arg("cache_scores", "T N", "tokens", "content"),
            Arg("cache_tokens", "T N", "tokens", "index", of="W"),
            Arg("mix", "T", "tokens", "stats", fill="uniform"),
        ),
        params=(("stats", "bool"),),
        outputs=(
            Out("nll", "T", dtype="stats"),
            Out("lse", "T", dtype="stats"),
            LSE_REST,
            Out("largest", "T", dtype="stats"),
            Out("entropy", "T", dtype="stats"),
        ),
        saved=("lse", "lse_rest", "entropy"),
        usual={"stats": True},
        reference=reference,
        flops=lambda s: 2 * s["T"] * (s["W"] + s["N"]),
        backward_flops=lambda s: 4 * s["T"] * (s["W"] + s["N"]),
        equation="-log((1 - mix) softmax(z_t)[y_t] + mix sum_{j: token_j = y_t} softmax(c_t)_j)",
    )
)


@overload
def cache_nll(
    logits: Tensor,
    targets: Tensor,
    cache_scores: Tensor,
    cache_tokens: Tensor,
    mix: float | Tensor,
    *,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def cache_nll(
    logits: Tensor,
    targets: Tensor,
    cache_scores: Tensor,
    cache_tokens: Tensor,
    mix: float | Tensor,
    *,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, LogitStats]: ...


@overload
def cache_nll(
    logits: Tensor,
    targets: Tensor,
    cache_scores: Tensor,
    cache_tokens: Tensor,
    mix: float | Tensor,
    *,
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LogitStats]: ...


def cache_nll(
    logits: Tensor,
    targets: Tensor,
    cache_scores: Tensor,
    cache_tokens: Tensor,
    mix: float | Tensor,
    *,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LogitStats]:
    """Negative log-likelihood of ``targets`` under a language model mixed with a cache.

    ``nll_t = -cache_logprobs(logits, cache_scores, cache_tokens, mix)[t, targets_t]``, without that matrix.

    Args:
        logits: ``[..., T, W]`` over a vocabulary of W words, float32, bfloat16, float16 or float64; 16-bit logits are
            read as they are.
        targets: int64 or int32 ``[..., T]`` in [-1, W). A target of -1 is ignored: loss 0 and no gradient.
        return_stats: also return how sure the model is by itself, from the same pass over the logits. A mix that
            depends on it takes a first call without entries (N = 0), which also gives the model's own loss.
        cache_scores, cache_tokens, mix, backend: as in :func:`cache_logprobs`.

    Returns:
        nll ``[..., T]`` in nats, float32 (float64 for float64), not reduced. Differentiable in logits, cache_scores and
        mix, to any order; a target of probability 0 costs +inf and gives no gradient.

        With ``return_stats``: ``(nll, stats)``, where :class:`LogitStats` has ``lse``, ``largest`` and ``entropy`` of
        ``q = softmax(logits)``, each of the shape and dtype of nll and differentiable in logits, to any order: ``lse_t
        = log sum_w exp(logits_tw)``, ``largest_t = max_w q_w`` (words tied for it share its gradient), ``entropy_t =
        -sum_w q_w log q_w``. They do not depend on the targets, ignored ones included. Where every logit is -inf, or
        W = 0, they are -inf, 0 and 0, without gradient. NaN or +inf among the logits of a token makes its nll and its
        stats NaN.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or the number mix is not in [0, 1]. RuntimeError:
            a token or a target outside [-1, W). NotImplementedError: the named backend cannot run the call.

    Source: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache; Khandelwal et al. 2020,
    Generalization through Memorization: Nearest Neighbor Language Models.
    """
    tokens, share = spread("cache_nll", logits, cache_scores, cache_tokens, mix)
    nll, lse, _, largest, entropy = call(
        OP, [logits, targets, cache_scores, tokens, share], (bool(return_stats),), backend
    )
    return (nll, LogitStats(lse, largest, entropy)) if return_stats else nll
