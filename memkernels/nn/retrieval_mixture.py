"""RetrievalMixture: one prediction with each of the k best records, mixed by the softmax of their scores.

    s_j, i_j = the k best records by scale * <query, key_i>,    w = softmax(s)
    M(x, records) = sum_j w_j M(x, record_(i_j)),   or for log-probabilities   log sum_j w_j exp(M(x, record_(i_j)))

Sources: Lewis et al. 2020, Retrieval-Augmented Generation; Guu et al. 2020, REALM (training the retriever through the
mixture weights).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import topk_search
from ._sizes import check_sizes


class RetrievalMixture(nn.Module):
    """``sum_j w_j model(x, record_j)`` over the k records whose keys score best, ``w`` the softmax of their scores.

    Differentiable through ``w`` in queries and keys, so that a retriever learns which records help the prediction, and
    through ``model`` in its parameters, ``x`` and the records. Only the k records are touched.

    Args:
        model: called as ``model(x, record)`` with ``x`` ``[..., T, 1, *X]`` beside ``record`` ``[..., T, k, *R]``;
            returns ``[..., T, k, *Y]``. If it is a module, it becomes a submodule.
        neighbours: k, records per prediction.
        log_probs: ``model`` returns log-probabilities. Their probabilities are mixed, and the result is a
            log-probability.
        scale: multiplies the scores; default ``K ** -0.5``. backend: passed to :func:`memkernels.topk_search`.

    Raises:
        ValueError: ``neighbours`` below 1.

    Source: Lewis et al. 2020, Retrieval-Augmented Generation.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        neighbours: int,
        *,
        log_probs: bool = False,
        scale: float | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        check_sizes("RetrievalMixture", neighbours=neighbours)
        self.model, self.neighbours, self.log_probs = model, neighbours, log_probs
        self.scale, self.backend = scale, backend

    def retrieve(self, query: Tensor, keys: Tensor, *, slot_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(weights [..., T, k], indices int64 [..., T, k])``, best first. With fewer than k addressable records,
        the rest has weight 0 and index -1. Arguments and errors as in :meth:`forward`."""
        log_weights, indices = self._search(query, keys, slot_mask)
        return log_weights.exp() * (indices >= 0), indices

    def _search(self, query: Tensor, keys: Tensor, slot_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logarithms of the weights, and indices. A query that retrieves nothing gets placeholder weights, because
        the logarithm of 0 would make its gradients NaN."""
        scores, indices = topk_search(
            query, keys, self.neighbours, scale=self.scale, slot_mask=slot_mask, backend=self.backend
        )
        return torch.log_softmax(scores.masked_fill(_nothing(indices).unsqueeze(-1), 0), dim=-1), indices

    def forward(
        self, x: Tensor, query: Tensor, keys: Tensor, records: Tensor, *, slot_mask: Tensor | None = None
    ) -> Tensor:
        """The mixed prediction.

        Args:
            x: ``[..., T, *X]``, what is to be predicted from, handed to ``model``.
            query: ``[..., T, K]``. keys: ``[N, K]``, one per record.
            records: ``[N, *R]``, any dtype.
            slot_mask: ``[N]``, bool (True: the record may be retrieved) or float, added to the scores.

        Returns:
            ``[..., T, *Y]``. Without any record to retrieve: 0, or log-probabilities of -inf.

        Raises:
            ValueError: ``records`` has not one row per key. ValueError, TypeError: as :func:`memkernels.topk_search`.
        """
        if keys.dim() != 2 or len(records) != len(keys):
            raise ValueError(
                "RetrievalMixture: keys must be [N, K] and records [N, ...], "
                f"got {list(keys.shape)} and {list(records.shape)}"
            )
        log_weights, indices = self._search(query, keys, slot_mask)
        lead = indices.dim() - 1
        predictions = self.model(x.unsqueeze(lead), records[indices.clamp(min=0)])
        log_weights = _trailing(log_weights, predictions.dim())
        nothing = _trailing(_nothing(indices), predictions.dim() - 1)
        if self.log_probs:
            return torch.logsumexp(log_weights + predictions, dim=lead).masked_fill(nothing, -torch.inf)
        return (log_weights.exp() * predictions).sum(lead).masked_fill(nothing, 0)

    def extra_repr(self) -> str:
        return f"neighbours={self.neighbours}, log_probs={self.log_probs}"


def _nothing(indices: Tensor) -> Tensor:
    """Whether a query retrieved no record: ``[..., T, k]`` -> bool ``[..., T]``."""
    return (indices < 0).all(-1)


def _trailing(x: Tensor, dims: int) -> Tensor:
    """``x`` with dimensions of size 1 appended until it has ``dims``."""
    return x.reshape(*x.shape, *(1,) * (dims - x.dim()))
