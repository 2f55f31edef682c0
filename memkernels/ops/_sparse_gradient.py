"""Gradients of a table as sparse tensors: the rows that were named, sorted by slot, each once.

A dense gradient of a table of N rows costs N rows of memory and time, however few were named. Here the rows that the
entries name are numbered 0 .. U-1 in order of their slots, and their gradients are summed into a table of U rows by the
kernel that sums into one of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import outside_graphs
from ..registration import backward_kernel, call, first_derivative, resolved
from ..spec import Arg, Op, bare, several


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


def _sparse(slots: Tensor, sums: Tensor, shape: torch.Size) -> Tensor:
    """The tensor whose rows ``slots`` are ``sums`` and whose others are zero."""
    return torch.sparse_coo_tensor(slots.unsqueeze(0), sums, shape, is_coalesced=True, check_invariants=False)


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
        return _sparse(slots, sums, shape), None, None, None, None


def gather_rows_sparse(op: Op, values: Tensor, indices: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """:func:`gather_rows` of float values whose gradient is sparse."""
    return outside_graphs(_Gather.apply, values, indices, dtype, op, resolved(backend))


class _Read(torch.autograd.Function):
    """A read of chosen slots. Its backward pass runs on a memory of just those slots, numbered by place."""

    @staticmethod
    def forward(ctx, op: Op, params: tuple, backend: str, *tensors: Tensor | None):
        results = several(call(op, list(tensors), params, backend))
        ctx.op, ctx.params, ctx.backend = op, params, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(r for r, out in zip(results, op.outputs) if not out.grad))
        names = [out.name for out in op.outputs]
        ctx.save_for_backward(*tensors, *(results[names.index(name)] for name in op.saved))
        return bare(results)

    @staticmethod
    def backward(ctx, *d_results: Tensor | None):
        op, n = ctx.op, len(ctx.op.args)
        given, saved = ctx.saved_tensors[:n], list(ctx.saved_tensors[n:])
        chosen = op.saved.index(op.choice.name) if op.choice else None
        slots, places = named(given[op.index("indices")] if chosen is None else saved[chosen])
        few = [_few(arg, t, slots) for arg, t in zip(op.args, given)]
        if chosen is None:
            few[op.index("indices")] = places
        else:
            saved[chosen] = places
        wants = [needs for needs, arg in zip(ctx.needs_input_grad[3:], op.args) if arg.is_float]
        grads = [d for d, out in zip(d_results, op.outputs) if out.grad]
        like = next(t for arg, t in zip(op.args, given) if arg.dtype == "lead")
        kernel = backward_kernel(op, like, ctx.backend)
        if kernel is None:
            found = tuple(first_derivative(op, [*few, *saved], grads, ctx.params, wants))
        else:
            found = several(kernel(*few, *saved, *grads, *ctx.params, wants))
        by_name: dict[str, Tensor | None] = {
            arg.name: x if want else None for arg, x, want in zip(op.differentiable, found, wants)
        }
        return (None, None, None, *(_spread(arg, by_name.get(arg.name), slots, t) for arg, t in zip(op.args, given)))


def _few(arg: Arg, tensor: Tensor | None, slots: Tensor) -> Tensor | None:
    """The part of an argument that belongs to ``slots``."""
    if tensor is None or arg.side != "memory":
        return tensor
    return tensor[slots]


def _spread(arg: Arg, gradient: Tensor | None, slots: Tensor, like: Tensor | None) -> Tensor | None:
    """The gradient of a whole argument from that of ``slots``: sparse for rows, dense for a number per slot."""
    if gradient is None or like is None or arg.side != "memory":
        return gradient
    if like.dim() == 2:
        return _sparse(slots, gradient, like.shape)
    return torch.zeros_like(like).index_copy(0, slots, gradient)


def read_sparse(op: Op, tensors: list, params: tuple, backend: str | None):
    """``call(op, tensors, params)`` where the gradients of tables are sparse."""
    for arg, t in zip(op.args, tensors):
        if arg.side == "memory" and isinstance(t, Tensor) and t.dim() > len(arg.parsed):
            axes = ", ".join(arg.axes.split())
            raise ValueError(f"{op.name}: {arg.name} must be [{axes}] with sparse_grad, got {list(t.shape)}")
    return outside_graphs(_Read.apply, op, params, resolved(backend), *tensors)


def wants_sparse(name: str, sparse_grad: object, *tables: object) -> bool:
    """Whether a call makes a sparse gradient: one is asked for, and a table requires one."""
    if sparse_grad is False:
        return False
    if sparse_grad is not True:
        raise TypeError(f"{name}: sparse_grad must be a bool, got {type(sparse_grad).__name__}")
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tables)
