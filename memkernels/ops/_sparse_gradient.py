"""Gradients of a table as sparse tensors: the rows that were named, sorted by slot, each once.

A dense gradient of a table of N rows costs N rows of memory and time, however few were named. Here the rows that the
entries name are numbered 0 .. U-1 in order of their slots, and their gradients are summed into a table of U rows by the
kernel that sums into one of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import backward_kernel, call, resolved
from ..spec import Op


def named(indices: Tensor) -> tuple[Tensor, Tensor]:
    """The slots that occur in ``indices``, ascending, and for each index the place of its slot among them, or -1."""
    slots, places = torch.unique(indices, sorted=True, return_inverse=True)
    none = (slots == -1).sum()
    return slots[slots >= 0], places - none


class SumRows(torch.autograd.Function):
    """``sums[u] = sum over places[j] = u of rows[j]``, in the order of j. [..., k, V] -> [U, V]."""

    @staticmethod
    def forward(ctx, rows: Tensor, places: Tensor, count: int, dtype: torch.dtype, op: Op, backend: str):
        ctx.save_for_backward(places)
        ctx.op, ctx.backend, ctx.dtype = op, backend, rows.dtype
        kernel = backward_kernel(op, rows, backend)
        table = rows.new_empty(count, rows.shape[-1], dtype=dtype)
        if kernel is None:
            live = rows.masked_fill((places < 0).unsqueeze(-1), 0).flatten(0, -2).to(dtype)
            return table.zero_().index_add_(0, places.clamp(min=0).flatten(), live)
        return kernel(table, places, None, rows, max(rows.shape[-1], 1), rows.dtype, [True])

    @staticmethod
    def backward(ctx, d_sums: Tensor):
        (places,) = ctx.saved_tensors
        width = max(d_sums.shape[-1], 1)
        return call(ctx.op, [d_sums, places, None], (width, ctx.dtype), ctx.backend), None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, dtype: torch.dtype, op: Op, backend: str):
        ctx.save_for_backward(indices)
        ctx.table, ctx.op, ctx.backend = (values.shape, values.dtype), op, backend
        return call(op, [values, indices, None], (max(values.shape[-1], 1), dtype), backend)

    @staticmethod
    def backward(ctx, d_rows: Tensor):
        (indices,), (shape, dtype) = ctx.saved_tensors, ctx.table
        slots, places = named(indices)
        sums = SumRows.apply(d_rows.contiguous(), places, slots.shape[0], dtype, ctx.op, ctx.backend)
        gradient = torch.sparse_coo_tensor(slots.unsqueeze(0), sums, shape, is_coalesced=True, check_invariants=False)
        return gradient, None, None, None, None


@torch.compiler.disable
def gather_rows_sparse(op: Op, values: Tensor, indices: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """:func:`gather_rows` of float values whose gradient is sparse."""
    return _Gather.apply(values, indices, dtype, op, resolved(backend))
