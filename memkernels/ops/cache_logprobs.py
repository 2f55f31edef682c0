"""cache_logprobs: the distribution of a language model mixed with that of a cache of what it has seen.

    p(w) = (1 - mix) softmax(logits)[w] + mix * sum_{j: token_j = w} softmax(cache_scores)_j

Sources: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache; Khandelwal et al. 2020,
Generalization through Memorization: Nearest Neighbor Language Models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import LSE_REST, Arg, Op, Out, shaped, stats_dtype
from ._formula import softmax
from ._options import fraction, single, stays_tensor


def mixture(logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p [..., T, W], and lse of the logits [..., T] with its rounding error. No gradient passes where p is 0."""
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in (logits, cache_scores, cache_tokens)), mix.shape)
    z = logits.to(stats_dtype(logits.dtype)).expand(*lead, -1)
    tokens, c = cache_tokens.expand(*lead, -1), cache_scores.to(z.dtype).expand(*lead, -1)

    shares, total, _ = softmax(c.masked_fill(tokens == -1, -torch.inf))
    mix = mix.expand(lead).masked_fill(torch.isneginf(total), 0).unsqueeze(-1)  # an empty cache has weight 0
    cached = torch.zeros_like(z).scatter_add(-1, tokens.masked_fill(tokens == -1, 0), shares)

    log_own = torch.log_softmax(z, -1)
    p = (1 - mix) * torch.exp(log_own) + mix * cached
    both = torch.log(p.masked_fill(p == 0, 1)).masked_fill(p == 0, -torch.inf)
    alone = log_own + torch.log1p(-mix.masked_fill(mix == 1, 0)).masked_fill(mix == 1, -torch.inf)
    log_p = torch.where(cached == 0, alone, both)
    return log_p.masked_fill(torch.isneginf(log_p), -torch.inf), *softmax(z)[1:]


def reference(logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: Tensor):
    return mixture(logits, cache_scores, cache_tokens, mix)


OP = register(
    Op(
        name="cache_logprobs",
        args=(
            Arg("logits", "T W", "tokens", "lead"),
            Arg("cache_scores", "T N", "tokens", "content"),
            Arg("cache_tokens", "T N", "tokens", "index", of="W"),
            Arg("mix", "T", "tokens", "stats", fill="uniform"),
        ),
        outputs=(Out("logprobs", "T W", dtype="stats"), Out("lse", "T", dtype="stats", grad=False), LSE_REST),
        saved=("lse", "lse_rest"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * (s["W"] + s["N"]),
        backward_flops=lambda s: 4 * s["T"] * (s["W"] + s["N"]),
        equation="log((1 - mix) softmax(z_t)[w] + mix sum_{j: token_j = w} softmax(c_t)_j)",
    )
)


def cache_logprobs(
    logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """Log-probabilities of a language model mixed with a cache.

    ``log((1 - mix) * softmax(logits)[w] + mix * sum over entries j with token_j = w of softmax(cache_scores)_j)``

    Args:
        logits: ``[..., T, W]`` over a vocabulary of W words, float32, bfloat16, float16 or float64.
        cache_scores: ``[..., T, N]``, how well each of N entries fits the token; dtype of ``logits``, or float32 beside
            16-bit logits. An entry at -inf is empty.
        cache_tokens: int64 or int32 in [-1, W), ``[..., T, N]``, or ``[..., 1, N]`` or ``[N]`` where all tokens see
            the same entries: the word that followed. -1 is an empty entry; entries of one word add up.
        mix: the share of the cache: a number in [0, 1], or a float32 tensor ``[..., T]`` (float64 for float64) of such
            numbers. Where every entry is empty it counts as 0.
        backend: as in :func:`softmax_read`.

    Returns:
        log-probabilities ``[..., T, W]`` in float32 (float64 for float64). Differentiable in logits, cache_scores and
        mix, to any order; no gradient comes from words of probability 0. For a loss :func:`cache_nll` is cheaper.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or the number mix is not in [0, 1]. RuntimeError:
            a token outside [-1, W). NotImplementedError: the named backend cannot run the call.

    Source: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache; Khandelwal et al. 2020,
    Generalization through Memorization: Nearest Neighbor Language Models.
    """
    tokens, share = spread("cache_logprobs", logits, cache_scores, cache_tokens, mix)
    return call(OP, [logits, cache_scores, tokens, share], (), backend)[0]


MIX = "a number or a tensor [..., T]"


def spread(op: str, logits: Tensor, cache_scores: Tensor, cache_tokens: Tensor, mix: float | Tensor):
    """The tokens expanded to one row per row of the scores, and the mix to one number per token."""
    if shaped(cache_tokens, cache_scores) and cache_scores.dim() > 1:
        if cache_tokens.dim() == 1:
            cache_tokens = cache_tokens.unsqueeze(0)
        if cache_tokens.dim() > 1 and known(cache_tokens.shape[-2] == 1):
            cache_tokens = cache_tokens.expand(*cache_tokens.shape[:-2], cache_scores.shape[-2], -1)
    if isinstance(mix, Tensor) and (mix.is_nested or mix.dim()):
        return cache_tokens, mix
    if not stays_tensor(mix):
        mix = fraction(op, "mix", mix, MIX)
    if shaped(logits) and logits.dim() > 1:
        exact = stats_dtype(logits.dtype)
        if isinstance(mix, Tensor):
            mix = single(op, "mix", mix, logits, exact, MIX)
        else:
            mix = torch.full((), mix, dtype=exact, device=logits.device)
        mix = mix.expand(logits.shape[-2])
    return cache_tokens, mix
