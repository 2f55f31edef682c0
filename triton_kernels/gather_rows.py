"""gather_rows on a GPU: rows[j] = scale_{i, c} * values[i], i = indices[j], c the block of the column; 0 where i is -1.

A program takes several entries and a block of columns, so that many scattered rows are in flight at once: bound by
bandwidth. Columns that share a scale form an axis of the tile of their own where their count is a power of two, so that
each scale is loaded once. An 8-bit number times its scale is rounded once, and once more to the dtype of the result:
the numbers of plain PyTorch, to the bit. A result larger than the L2 cache is stored with evict_first, so that it does
not push popular rows out.

Backward: a sum over the entries of each row, sorted by row (segments.py). An index outside [-1, N) fails an assertion
on the device, without a synchronisation, and is never followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import COMPRESSED, FEW, Example, Inputs, operator
from .launch import launch, plan
from .layout import FLOATS, Call, Gradient
from .segments import Segments
from .sparse_read import check_indices
from .tiles import decoded, tokens

CACHED = 1 << 24  # bytes of a result that the L2 cache may keep


@triton.jit
def _factor(x):
    """What multiplies a block: a float32, or a power of two stored as its exponent in float8_e8m0fnu."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int32)
        power = tl.where(bits == 0, 0x00400000, bits << 23)  # 2^-127 is no normal number
        return tl.where(bits == 255, 0x7FC00000, power).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def _converted(x, factor, dtype: tl.constexpr):
    """``factor`` None: floats, rounded once."""
    if factor is not None:
        return (decoded(x, tl.float32) * factor).to(dtype)
    elif x.dtype == dtype:
        return x
    else:
        return x.to(tl.float32).to(dtype)


@triton.jit
def gather_rows_kernel(
    values, indices, scales, out, total, slots, V, inner, block,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Tiles [entries, columns]; [entries, blocks of BLOCK_V columns with a scale each, BLOCK_V] where BLOCK_C > 0.

    block: columns that share a scale, BLOCK_V where BLOCK_C > 0; None: the whole row.
    """
    pid = tl.program_id(0)
    width: tl.constexpr = BLOCK_V if BLOCK_C == 0 else BLOCK_C * BLOCK_V
    steps = tl.cdiv(V, width)
    t = (pid // steps) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = t < total
    slot = tl.load(tokens(indices, tl.full([], 0, tl.int32), 1, t, inner), mask=t_ok, other=-1)
    ok = (slot >= 0) & (slot < slots)
    slot = tl.where(ok, slot, 0)
    dtype: tl.constexpr = out[0].dtype.element_ty
    start = (pid % steps) * width
    factor = None
    if scales is not None and block is None:  # before slots become a tile, all columns of which would load it
        factor = _factor(tl.load(scales[0] + slot * scales[3], mask=ok, other=0))[:, None]
    if BLOCK_C == 0:
        d = (start + tl.arange(0, BLOCK_V))[None, :]
        row, slot, ok, t_ok = t[:, None], slot[:, None], ok[:, None], t_ok[:, None]
    else:
        c = (tl.arange(0, BLOCK_C) + start // BLOCK_V)[None, :, None]
        d = c * BLOCK_V + tl.arange(0, BLOCK_V)[None, None, :]
        row, slot, ok, t_ok = t[:, None, None], slot[:, None, None], ok[:, None, None], t_ok[:, None, None]
    x = tl.load(values[0] + slot * values[3] + d, mask=ok & (d < V), other=0)
    if scales is not None and block is not None:
        if BLOCK_C == 0:
            c = d // block
        place = scales[0] + slot * scales[3] + c
        factor = _factor(tl.load(place, mask=ok & (c * block < V), other=0))
    target = out[0] + row.to(tl.int64) * out[1] + d
    tl.store(target, _converted(x, factor, dtype), mask=t_ok & (d < V), eviction_policy=EVICT)


def _blocks(V: int, block: int, most: int, scaled: bool) -> tuple[int, int, int | None]:
    """BLOCK_C and BLOCK_V of rows of V columns in tiles of at most ``most``, and the columns that share a scale."""
    columns = min(most, triton.next_power_of_2(V))
    if not scaled or block >= V:
        return 0, columns, None
    if block & (block - 1) == 0 and block <= columns:
        return columns // block, block, block
    return 0, columns, block


def _call(op: str, values: Tensor, indices: Tensor, scale: Tensor | None, block: int, *more: tuple) -> Call:
    call = Call(op, [("indices", indices, (indices.shape[-1],)), *more], [("values", values, tuple(values.shape[-2:]))])
    call.require(values.dim() == 2 and block >= 1, "values must be [N, V], and block at least 1")
    eight = values.dtype in COMPRESSED.values()
    call.require(eight == (scale is not None), "8-bit values must have a scale, others must not")
    if not eight:
        call.floats(values)
    call.flat("value_scale", scale, values.shape[0], triton.cdiv(values.shape[1], block))
    factors = (torch.float32, torch.uint8)
    call.require(scale is None or scale.dtype in factors, "value_scale must be float32 or the bits of float8_e8m0fnu")
    check_indices(call, indices, values.shape[0])
    return call


@operator
def gather_rows(
    values: Tensor, indices: Tensor, value_scale: Tensor | None, block: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """rows ``[..., k, V]``."""
    call = _call("gather_rows", values, indices, value_scale, block)
    call.require(dtype in FLOATS, "dtype must be float32, bfloat16 or float16")
    k, (N, V) = indices.shape[-1], values.shape
    out = torch.empty((*call.whole, k, V), dtype=dtype, device=call.device)
    p, total = plan("gather_rows", V, values), call.F * k
    block_c, block_v, shared = _blocks(V, block, p.config.block_n, value_scale is not None)
    width = block_v * max(1, block_c)
    launch(
        gather_rows_kernel, triton.cdiv(total, p.config.block_t) * triton.cdiv(V, width),
        call.slots(values), call.numbers(indices), call.slots(value_scale), (out, V, 1), total, N, V,
        k if call.F > 1 else None, shared, plan=p, BLOCK_T=p.config.block_t, BLOCK_C=block_c, BLOCK_V=block_v,
        EVICT="evict_first" if out.numel() * out.element_size() > CACHED else "",
    )  # fmt: skip
    return out


@operator
def gather_rows_backward(
    values: Tensor, indices: Tensor, value_scale: Tensor | None, d_rows: Tensor | None, block: int,
    dtype: torch.dtype, wants: list[bool],
) -> Tensor:  # fmt: skip
    """The gradient of values."""
    N, V = values.shape[-2:]
    more = ("d_rows", d_rows, (indices.shape[-1], V))
    call = _call("gather_rows_backward", values, indices, value_scale, block, more)
    call.require(len(wants) == 1, "wants must have 1 entry")
    call.require(d_rows is not None, "d_rows must be given")
    call.floats(values, d_rows)
    d_values = Gradient(call, values, wants[0], "memory", N, V)
    if d_values.wanted:
        Segments(call, indices.unsqueeze(-1), N).sum(d_values, None, d_rows, 1.0)
    return d_values.result()


def examples(x: Inputs) -> Iterator[Example]:
    i, table = x.integers(2, x.tokens, below=x.slots), x(x.slots, x.width)
    large = x.integers(8 * x.tokens, 24, below=x.slots)
    yield Example(gather_rows, (table, large, None, x.width, x.dtype), main=True)
    yield Example(gather_rows, (table, i[:, :FEW], None, x.width, torch.float16), variant="to float16, few")
    for kind, dtype in COMPRESSED.items():
        packed, scale = x.compressed(x.slots, x.width, dtype=dtype), x(x.slots, 1, dtype=torch.float32)
        yield Example(gather_rows, (packed, i, scale, x.width, x.dtype), variant=kind, gradients=())
        exponents = torch.zeros(x.slots, x.width // 32, dtype=torch.uint8, device=x.device)
        blocks = (packed, large, exponents, 32, x.dtype)
        yield Example(gather_rows, blocks, variant=f"{kind} in blocks", main=kind == "float8", gradients=())
        odd = (packed, i, x(x.slots, triton.cdiv(x.width, 24), dtype=torch.float32), 24, x.dtype)
        yield Example(gather_rows, odd, variant=f"{kind} in odd blocks", gradients=())
