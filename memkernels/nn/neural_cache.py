"""NeuralCache: a language model remembers what followed each of its last hidden states.

    p(w after t) = (1 - mix) softmax(logits_t)[w] + mix * sum_{j < t: x_(j+1) = w} softmax_j(theta * <h_t, h_j>)

over the last N entries ``(h_j, x_(j+1))``.

Source: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import cache_logprobs, cache_nll, causal_range
from ._sizes import check_sizes


class CacheState(NamedTuple):
    """The entries of a cache, oldest first, without gradient.

    keys: ``[..., N, K]``, hidden states. tokens: int64 ``[..., N]``, the token that followed each; -1 is empty.
    """

    keys: Tensor
    tokens: Tensor


class NeuralCache(nn.Module):
    """The last ``size`` hidden states of a model, each voting for the token that followed it.

    ``p(w) = (1 - mix) softmax(logits_t)[w] + mix * sum_{j: x_(j+1) = w} softmax_j(theta * <h_t, h_j>)``

    Any trained model can be given a cache. ``mix`` in (0, 1) and ``theta`` > 0 are its only parameters and may be
    trained alone. State is functional: :meth:`nll` and :meth:`append` return the next cache.

    Args:
        size: N, entries. width: K, of the hidden states.
        mix, theta: initial values of the parameters; theta is ``width ** -0.5`` by default.
        backend: passed to :func:`memkernels.cache_nll` and :func:`memkernels.cache_logprobs`.

    Raises:
        ValueError: a size below 1, ``mix`` not between 0 and 1, ``theta`` not above 0.

    Source: Grave et al. 2017, Improving Neural Language Models with a Continuous Cache.
    """

    def __init__(
        self, size: int, width: int, *, mix: float = 0.2, theta: float | None = None, backend: str | None = None
    ):
        super().__init__()
        check_sizes("NeuralCache", size=size, width=width)
        theta = width**-0.5 if theta is None else theta
        if not 0 < mix < 1:
            raise ValueError(f"NeuralCache: mix must lie between 0 and 1, got {mix}")
        if not theta > 0:
            raise ValueError(f"NeuralCache: theta must be above 0, got {theta}")
        self.size, self.width, self.backend = size, width, backend
        self.mix_logit = nn.Parameter(torch.tensor(math.log(mix / (1 - mix))))
        self.log_theta = nn.Parameter(torch.tensor(math.log(theta)))

    @property
    def mix(self) -> Tensor:
        """The share of the cache, ``[]``."""
        return torch.sigmoid(self.mix_logit)

    @property
    def theta(self) -> Tensor:
        """The factor of the dot products of hidden states, ``[]``."""
        return self.log_theta.exp()

    def initial_state(self, *streams: int) -> CacheState:
        """An empty cache for each stream."""
        keys = self.log_theta.detach().new_zeros(*streams, self.size, self.width)
        return CacheState(keys, torch.full(keys.shape[:-1], -1, device=keys.device))

    def append(self, hidden: Tensor, tokens: Tensor, state: CacheState) -> CacheState:
        """The cache after ``hidden`` ``[..., T, K]`` were followed by ``tokens`` ``[..., T]``; the oldest T drop out.

        Raises:
            ValueError: shapes do not fit each other or the cache.
        """
        return self._newest(*self._joined(state, hidden, tokens))

    def log_probs(self, logits: Tensor, hidden: Tensor, state: CacheState) -> Tensor:
        """Log-probabilities of the token after each position; every position reads ``state`` alone.

        Args:
            logits: ``[..., T, W]``, the model's own. hidden: ``[..., T, K]``.
            state: one cache for each of the leading dimensions.

        Returns:
            ``[..., T, W]``, float32 (float64 for float64). An empty cache has no share.

        Raises:
            ValueError, TypeError, RuntimeError: as :func:`memkernels.cache_logprobs`.
        """
        scores, mix = self._scores(logits, hidden, state.keys)
        return cache_logprobs(logits, scores, state.tokens.unsqueeze(-2), mix, backend=self.backend)

    def nll(self, logits: Tensor, hidden: Tensor, targets: Tensor, state: CacheState) -> tuple[Tensor, CacheState]:
        """The loss of every position of a text, and the cache after it.

        A position reads the ``size`` entries before it, those of the same text included: the result is that of
        :meth:`log_probs` and :meth:`append` position by position.

        Args:
            logits, hidden, state: as in :meth:`log_probs`. targets: int64 ``[..., T]``, the token after each position.

        Returns:
            ``(nll [..., T], state)``, nll in nats, float32 (float64 for float64).

        Raises:
            ValueError: shapes do not fit each other or the cache. ValueError, TypeError, RuntimeError: as
                :func:`memkernels.cache_nll`.
        """
        keys, tokens = self._joined(state, hidden, targets)  # [..., N + T, K]
        scores, mix = self._scores(logits, hidden, keys)
        before = causal_range(hidden.shape[-2], keys.shape[-2], window=self.size, offset=self.size - 1)
        first, stop = before.to(keys.device).split(1, -1)
        entry = torch.arange(keys.shape[-2], device=keys.device)
        scores = scores.masked_fill((entry < first) | (entry >= stop), -torch.inf)
        nll = cache_nll(logits, targets, scores, tokens.unsqueeze(-2), mix, backend=self.backend)
        return nll, self._newest(keys, tokens)

    def _scores(self, logits: Tensor, hidden: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """``theta * <h_t, h_j>`` ``[..., T, N]`` and the mix ``[T]``, in the dtype of the sums over ``logits``."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        scores = self.theta * (hidden.to(keys.dtype) @ keys.mT)
        return scores.to(exact), self.mix.to(exact).expand(hidden.shape[-2])

    def _joined(self, state: CacheState, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Entries of the cache, then those of a text: ``[..., N + T, K]``, ``[..., N + T]``."""
        lead = hidden.shape[:-2]
        if hidden.shape[-1] != self.width or tokens.shape != hidden.shape[:-1]:
            raise ValueError(
                f"NeuralCache: hidden must be [..., T, K={self.width}] and tokens [..., T], "
                f"got {list(hidden.shape)} and {list(tokens.shape)}"
            )
        if state.keys.shape != (*lead, self.size, self.width):
            wanted = [*lead, self.size, self.width]
            raise ValueError(f"NeuralCache: state.keys must be {wanted}, got {list(state.keys.shape)}")
        keys = torch.cat([state.keys, hidden.detach().to(state.keys.dtype)], dim=-2)
        return keys, torch.cat([state.tokens, tokens], dim=-1)

    def _newest(self, keys: Tensor, tokens: Tensor) -> CacheState:
        return CacheState(keys[..., -self.size :, :], tokens[..., -self.size :])

    def extra_repr(self) -> str:
        return f"size={self.size}, mix={self.mix.item():.3g}, theta={self.theta.item():.3g}"
