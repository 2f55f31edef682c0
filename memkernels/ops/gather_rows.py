"""gather_rows: rows of a table, dequantised on the way.

    rows[j] = scale_{i, c} * values[i],    i = indices[j],    c the block of the column        (index -1 gives zeros)

Sources: Cheng et al. 2026, Conditional Memory via Scalable Lookup (Engram, arXiv 2601.07372); Rouhani et al. 2023,
Microscaling Data Formats for Deep Learning (blocks of columns with a scale that is a power of two).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import COMPRESSED, FLOATS, Arg, Op, Out, shaped, stats_dtype
from ._options import integer
from ._sparse_gradient import gather_rows_sparse, wants_sparse

_EIGHT_BITS = frozenset(COMPRESSED)
E8M0 = torch.float8_e8m0fnu


def chosen(rows: Tensor, indices: Tensor) -> Tensor:
    """``rows[indices]``, 8 bits as they are, anything where the index is -1. [N, D], [..., k] -> [..., k, D]."""
    if known(rows.shape[0] == 0):
        return rows.new_zeros(*indices.shape, rows.shape[1])
    if rows.dtype in FLOATS:
        return rows[indices.clamp(min=0)]
    return rows.view(torch.uint8)[indices.clamp(min=0)].view(rows.dtype)


def reference(values: Tensor, indices: Tensor, value_scale: Tensor | None, block: int, dtype: torch.dtype):
    exact = stats_dtype(dtype)
    if value_scale is None:
        rows = chosen(values.to(exact), indices)  # so that gradients add in that dtype
    else:
        scale = value_scale.view(E8M0) if value_scale.dtype == torch.uint8 else value_scale
        by_column = chosen(scale, indices).to(exact).repeat_interleave(block, -1)[..., : values.shape[-1]]
        rows = chosen(values, indices).to(exact) * by_column
    return (rows.to(dtype).masked_fill((indices == -1).unsqueeze(-1), 0),)


def _in_blocks(values, indices, value_scale, block, dtype) -> Tensor:
    """A scale per block of the columns of ``values``."""
    width = -(-values.shape[1] // block)
    return value_scale.repeat(1, width)[:, :width].contiguous() if value_scale.shape[1] else value_scale


OP = register(
    Op(
        name="gather_rows",
        args=(
            Arg("values", "N V", "memory", "table", flat=True),
            Arg("indices", "k", "tokens", "index"),
            Arg("value_scale", "N C", "memory", "block_scale", optional=True, flat=True, of="values"),
        ),
        params=(("block", "int"), ("dtype", "ScalarType")),
        usual={"block": lambda axes: max(-(-axes["V"] // axes["C"]), 1)},
        outputs=(Out("rows", "k V"),),
        reference=reference,
        over_slots="rows",
        equation="rows[j] = value_scale[i, v / block] * values[i, v], i = indices[j]",
    )
)


def gather_rows(
    values: Tensor,
    indices: Tensor,
    *,
    value_scale: Tensor | None = None,
    block: int | None = None,
    dtype: torch.dtype | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rows of a table as they are, or of one in 8 bits multiplied out on the way.

    ``rows[..., j] = value_scale[i] * values[i]`` with ``i = indices[..., j]``

    Args:
        values: ``[N, V]``, float32, bfloat16, float16 or float64, or int8 or float8_e4m3fn with ``value_scale``.
        indices: int64 or int32 ``[..., k]`` in ``[-1, N)``; -1 gives a row of zeros.
        value_scale: ``[N]``, one number per row, or with ``block`` ``[N, ceil(V / block)]``, one per block of columns;
            float32 or float8_e8m0fnu.
        block: columns that share a scale, such as 32; None: the whole row.
        dtype: of the result, any float; float64 only beside float64 or 8 bits. None: that of ``values``, float32 where
            they have 8 bits.
        sparse_grad: the gradient of ``values`` is a coalesced sparse COO tensor ``[N, V]`` of the rows that were named,
            sorted by slot, for ``torch.optim.SparseAdam``: a step costs what it touched, however large the table. It
            is made in eager mode: code that torch.compile traces breaks its graph here.
        backend: as in :func:`softmax_read`.

    Returns:
        rows ``[..., k, V]``. Differentiable in ``values`` where those are floats, to any order; the gradient of a row
        adds in the order of ``indices``, so it is the same bits on every run.

    Raises:
        ValueError, TypeError: a shape, dtype, device or block does not fit, or 8-bit values come without a scale, or
            floats with one. RuntimeError: an index outside ``[-1, N)``, or 8-bit values that require a gradient.
            NotImplementedError: the named backend cannot run the call.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """
    name = "gather_rows"
    floats = shaped(values) and values.dtype in FLOATS and values.dim() == 2
    plain = value_scale is None and dtype is None and block is None and not sparse_grad
    if floats and plain:  # small calls are bound by Python
        return call(OP, [values, indices, None], (max(values.shape[1], 1), values.dtype), backend)
    given = values.dtype if isinstance(values, Tensor) else torch.float32
    compressed = given in _EIGHT_BITS
    if compressed != (value_scale is not None) and isinstance(values, Tensor):
        wanted = "must be a tensor, got None" if compressed else "is for int8 and float8_e4m3fn, got one"
        raise TypeError(f"{name}: value_scale {wanted} beside values in {str(given).removeprefix('torch.')}")
    if compressed and torch.is_grad_enabled() and values.requires_grad:
        raise RuntimeError(f"{name}: values must not require a gradient in 8 bits, got one")
    dtype = _result_dtype(name, given, compressed, dtype)
    width = values.shape[-1] if shaped(values) and values.dim() == 2 else 1
    if compressed or block is not None:
        value_scale, block = _blocks(name, values, value_scale, block, width)
    if wants_sparse(name, sparse_grad, values):
        return gather_rows_sparse(OP, values, indices, dtype, backend)
    return call(OP, [values, indices, value_scale], (block or max(width, 1), dtype), backend)


def _result_dtype(name: str, given: torch.dtype, compressed: bool, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32 if compressed else given
    if dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{name}: dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}")
    if not compressed and (dtype == torch.float64) != (given == torch.float64) and given in FLOATS:
        wide, short = "float64", str(given).removeprefix("torch.")
        raise TypeError(f"{name}: dtype must {'not ' * (dtype == torch.float64)}be {wide} beside values in {short}")
    return dtype


def _blocks(
    name: str, values: Tensor, scale: Tensor | None, block: int | None, width: int
) -> tuple[Tensor | None, int]:
    """The scale as ``[N, C]``, and the columns of a block."""
    if block is not None:
        block = integer(name, "block", block, 1)
        if scale is None:
            raise ValueError(f"{name}: block is for values in 8 bits, got {block} without a value_scale")
    if not shaped(values, scale) or values.dim() != 2 or scale is None:
        return scale, block or 1
    rows = values.shape[0]
    wanted = (rows,) if block is None else (rows, -(-width // block))
    if tuple(scale.shape) != wanted:
        axes = "[N]" if block is None else f"[N, ceil(V / block)], block = {block}"
        raise ValueError(f"{name}: value_scale must be {axes}, {list(wanted)}, got {list(scale.shape)}")
    scale = scale.view(torch.uint8) if scale.dtype == E8M0 else scale
    return (scale.unsqueeze(-1), max(width, 1)) if block is None else (scale, block)
