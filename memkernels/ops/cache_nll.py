"""cache_nll: the loss of a language model mixed with a cache, without the mixed distribution.

    nll_t = -log((1 - mix) softmax(logits_t)[y_t] + mix * sum_{j: token_j = y_t} softmax(cache_scores_t)_j)

Sources: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache; Khandelwal et al. 2020,
Generalization through Memorization: Nearest Neighbor Language Models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import LSE_REST, Arg, Op, Out
from .cache_logprobs import mixture, spread


def reference(logits: Tensor, targets: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor):
    log_p, lse, rest = mixture(logits, cache_scores, cache_tokens, mix)
    lead = torch.broadcast_shapes(log_p.shape[:-1], targets.shape)
    log_p, ignored = log_p.expand(*lead, -1), (targets == -1).expand(lead)
    chosen = torch.gather(log_p, -1, targets.expand(lead).masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return -chosen.masked_fill(ignored, 0), lse.expand(lead), rest.expand(lead)


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
        outputs=(Out("nll", "T", dtype="stats"), Out("lse", "T", dtype="stats", grad=False), LSE_REST),
        saved=("lse", "lse_rest"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * (s["W"] + s["N"]),
        backward_flops=lambda s: 4 * s["T"] * (s["W"] + s["N"]),
        equation="-log((1 - mix) softmax(z_t)[y_t] + mix sum_{j: token_j = y_t} softmax(c_t)_j)",
    )
)


def cache_nll(
    logits: Tensor,
    targets: Tensor,
    cache_scores: Tensor,
    cache_tokens: Tensor,
    mix: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood of ``targets`` under a language model mixed with a cache.

    ``nll_t = -cache_logprobs(logits, cache_scores, cache_tokens, mix)[t, targets_t]``, without that matrix.

    Args:
        logits: ``[..., T, W]`` over a vocabulary of W words, float32, bfloat16, float16 or float64.
        targets: int64 or int32 ``[..., T]`` in [-1, W). A target of -1 is ignored: loss 0 and no gradient.
        cache_scores, cache_tokens, mix, backend: as in :func:`cache_logprobs`.

    Returns:
        nll ``[..., T]`` in nats, float32 (float64 for float64), not reduced. Differentiable in logits, cache_scores and
        mix, to any order; a target of probability 0 costs +inf and gives no gradient.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or the number mix is not in [0, 1]. RuntimeError:
            a token or a target outside [-1, W). NotImplementedError: the named backend cannot run the call.

    Source: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache; Khandelwal et al. 2020,
    Generalization through Memorization: Nearest Neighbor Language Models.
    """
    tokens, share = spread("cache_nll", logits, cache_scores, cache_tokens, mix)
    return call(OP, [logits, targets, cache_scores, tokens, share], (), backend)[0]
