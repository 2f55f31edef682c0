"""Gradients of a table as sparse tensors: the rows that were named, sorted by slot, each once.

A dense gradient of a table of N rows costs N rows of memory and time, however few were named. Here the rows that the
entries name are numbered 0 .. U-1 in order of their slots, and their gradients are summed into a table of U rows by the
kernel that sums into one of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import is_dtensor, outside_graphs
from ..registration import backward_kernel, call, first_derivative, resolved
from ..spec import Arg, Op, bare, several
from ._options import SIXTEEN_BITS


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
        return _read(ctx, op, params, backend, tensors)

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
        by_name = _gradients(op, ctx.backend, [*few, *saved], grads, ctx.params, wants)
        return (None, None, None, *(_spread(arg, by_name.get(arg.name), slots, t) for arg, t in zip(op.args, given)))


def _read(ctx, op: Op, params: tuple, backend: str, tensors: tuple):
    """The results of a read, with what its backward pass needs kept in ``ctx``."""
    results = several(call(op, list(tensors), params, backend))
    ctx.op, ctx.params, ctx.backend = op, params, backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(r for r, out in zip(results, op.outputs) if not out.grad))
    names = [out.name for out in op.outputs]
    ctx.save_for_backward(*tensors, *(results[names.index(name)] for name in op.saved))
    return bare(results)


def _gradients(
    op: Op, backend: str, tensors: list, d_results: list, params: tuple, wants: list[bool]
) -> dict[str, Tensor | None]:
    """Gradients of the differentiable arguments by name; ``tensors``: arguments, then saved results."""
    like = next(t for arg, t in zip(op.args, tensors) if arg.dtype == "lead")
    kernel = backward_kernel(op, like, backend)
    if kernel is None:
        found = tuple(first_derivative(op, tensors, d_results, params, wants))
    else:
        found = several(kernel(*tensors, *d_results, *params, wants))
    return {arg.name: x if want else None for arg, x, want in zip(op.differentiable, found, wants)}


class _ReadTable(torch.autograd.Function):
    """A read of chosen slots whose ``values`` alone are rows of slots. ``sums``: the op sparse_read, whose backward
    pass sums ``weights[t, j] d_read_t`` into the rows that were read."""

    @staticmethod
    def forward(ctx, op: Op, sums: Op, params: tuple, backend: str, *tensors: Tensor | None):
        ctx.sums = sums
        return _read(ctx, op, params, backend, tensors)

    @staticmethod
    def backward(ctx, *d_results: Tensor | None):
        op, n = ctx.op, len(ctx.op.args)
        given, saved = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        wants = [needs and arg.name != "values" for needs, arg in zip(ctx.needs_input_grad[4:], op.args)]
        grads = [d for d, out in zip(d_results, op.outputs) if out.grad]
        by_name: dict[str, Tensor | None] = {}
        if any(wants):
            by_name = _gradients(op, ctx.backend, [*given, *saved], grads, ctx.params, wants)
        if ctx.needs_input_grad[4 + op.index("values")]:
            by_name["values"] = _ReadTable.of_values(ctx, given[op.index("values")], saved, d_results[0])
        return (None, None, None, None, *(by_name.get(arg.name) for arg in op.args))

    @staticmethod
    def of_values(ctx, values: Tensor, saved: tuple, d_read: Tensor | None) -> Tensor:
        indices, weights = (saved[ctx.op.saved.index(name)] for name in ("indices", "weights"))
        slots, places = named(indices)
        rows: Tensor | None = values.new_zeros((slots.shape[0], values.shape[-1]), dtype=weights.dtype)
        if d_read is not None:
            tensors, d_reads = [rows, places, weights], [d_read.to(weights.dtype)]
            rows = _gradients(ctx.sums, ctx.backend, tensors, d_reads, (), [True, False])["values"]
        assert rows is not None
        return _sparse(slots, rows.to(values.dtype), values.shape)


def _few(arg: Arg, tensor: Tensor | None, slots: Tensor) -> Tensor | None:
    """The part of an argument that belongs to ``slots``, which are sorted; ranges in terms of their places."""
    if tensor is not None and arg.dtype == "range":
        return torch.searchsorted(slots, tensor.contiguous())
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
    _check_flat(op, tensors, *(arg.name for arg in op.args if arg.side == "memory"))
    return outside_graphs(_Read.apply, op, params, resolved(backend), *tensors)


def read_table_sparse(op: Op, sums: Op, tensors: list, params: tuple, backend: str | None):
    """``call(op, tensors, params)`` where the gradient of ``values`` is sparse. ``sums``: the op sparse_read."""
    _check_flat(op, tensors, "values")
    return outside_graphs(_ReadTable.apply, op, sums, params, resolved(backend), *tensors)


def _check_flat(op: Op, tensors: list, *tables: str) -> None:
    for arg, t in zip(op.args, tensors):
        if arg.name in tables and isinstance(t, Tensor) and t.dim() > len(arg.parsed):
            axes = ", ".join(arg.axes.split())
            raise ValueError(f"{op.name}: {arg.name} must be [{axes}] with sparse_grad, got {list(t.shape)}")


def wants_sparse(name: str, sparse_grad: object, *tables: object) -> bool:
    """Whether a call makes a sparse gradient: one is asked for, and a table requires one."""
    if sparse_grad is False:
        return False
    if sparse_grad is not True:
        raise TypeError(f"{name}: sparse_grad must be a bool, got {type(sparse_grad).__name__}")
    if any(map(is_dtensor, tables)):
        raise ValueError(
            f"{name}: sparse_grad must be False for tables that are sharded over ranks, whose gradients are sharded "
            "like them, got True"
        )
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tables)


def check_scale(name: str, scale: object, query: Tensor) -> None:
    """Refuse a tensor of scales beside 16-bit queries, which doubles the keys (:func:`scaled`): their gradient would
    not be that of the table."""
    if isinstance(scale, Tensor) and query.dtype in SIXTEEN_BITS and scale.dim():
        raise ValueError(f"{name}: scale must be a number with sparse_grad and 16-bit keys, got a tensor")
