"""MultiHopRead: a memory read several times, where the result of one read is the query of the next.

    u_1 = query
    r_h = sum_i softmax_i(scale * <u_h, k_i>) v_i,   u_(h+1) = W u_h + r_h        for h = 1 .. hops

Source: Sukhbaatar et al. 2015, End-To-End Memory Networks (several hops, with the weights tied from hop to hop).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from ..ops import softmax_read
from ._sizes import check_sizes


class MultiHopRead(nn.Module):
    """``hops`` softmax reads of one memory; the result of each is part of the query of the next.

    ``u_(h+1) = W u_h + sum_i softmax_i(scale * <u_h, k_i>) v_i``, from ``u_1 = query``. The map ``W`` is shared by all
    hops and begins as the identity, so that every hop adds its read to its query. Which slots hop h read is
    ``memkernels.address(queries[h], keys, scale=module.scale)``.

    Args:
        hops: reads, at least 1. width: of queries, keys and values alike, because a value becomes part of a query.
        scaled: True for ``scale = width ** -0.5``, False for ``scale = 1``.
        backend: passed to :func:`memkernels.softmax_read`.

    Raises:
        ValueError: a size below 1.

    Source: Sukhbaatar et al. 2015, End-To-End Memory Networks.
    """

    def __init__(self, hops: int, width: int, *, scaled: bool = True, backend: str | None = None):
        super().__init__()
        check_sizes("MultiHopRead", hops=hops, width=width)
        self.hops, self.backend = hops, backend
        self.scale = width**-0.5 if scaled else 1.0
        self.carry = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.carry.weight)

    @overload
    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        slot_mask: Tensor | None = None,
        return_queries: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        slot_mask: Tensor | None = None,
        return_queries: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        slot_mask: Tensor | None = None,
        return_queries: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        slot_mask: Tensor | None = None,
        return_queries: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read ``hops`` times.

        Args:
            query: ``[..., T, width]``. keys, values: ``[..., N, width]``, the memory, the same for every hop.
            slot_mask: ``[..., N]``, as in :func:`memkernels.softmax_read`.
            return_queries: also return the query of each hop.

        Returns:
            ``u_(hops + 1)`` ``[..., T, width]``; with ``return_queries`` also ``u_1 .. u_hops`` stacked,
            ``[hops, ..., T, width]``.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not fit.
        """
        queries = []
        for _ in range(self.hops):
            queries.append(query)
            read = softmax_read(query, keys, values, scale=self.scale, slot_mask=slot_mask, backend=self.backend)
            query = self.carry(query) + read
        return (query, torch.stack(queries)) if return_queries else query

    def extra_repr(self) -> str:
        return f"hops={self.hops}, scale={self.scale:g}"
