"""The arguments of a call on a table of rows: slots of any shape, and the tensor that the rows go to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._columns import FLOATS, dtype_name
from ._table_layout import Layout

CPU = torch.device("cpu")


def slots_of(op: str, x: object) -> Tensor:
    """``x`` as an int64 tensor, on its device."""
    if not isinstance(x, Tensor):
        if isinstance(x, (bool, str, bytes)) or x is None:
            raise TypeError(f"{op}: slots must be integers, got {type(x).__name__}")
        try:
            found = np.asarray(x)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{op}: slots must be integers of one shape ({error})") from None
        if found.dtype.kind not in "iu" and found.size:
            raise TypeError(f"{op}: slots must be integers, got {found.dtype}")
        x = torch.from_numpy(np.ascontiguousarray(found.astype(np.int64)).reshape(found.shape))
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: slots must be int64 or int32, got {dtype_name(x.dtype)}")
    if x.layout != torch.strided or x.is_meta:
        raise TypeError(f"{op}: slots must be a dense tensor with memory")
    return x.to(torch.int64)


def in_range(op: str, slots: Tensor, rows: int) -> None:
    """Slots ``[...]`` that are -1 or name a row."""
    if slots.numel():
        wrong = (slots < -1) | (slots >= rows)
        if wrong.any():
            raise out_of_range(op, int(slots[wrong][0]), rows)


def out_of_range(op: str, slot: int, rows: int) -> IndexError:
    return IndexError(f"{op}: slots must be in [-1, {rows}), got {slot}")


def result(op: str, out: Any, slots: Tensor, t: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``out``, where rows of these slots fit into it; a new tensor for None."""
    shape = [*slots.shape, t.width]
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    wanted = f"[{', '.join(map(str, shape))}] on {device}"
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: out must be a tensor {wanted}, got {type(out).__name__}")
    if list(out.shape) != shape or out.device != device:
        raise ValueError(f"{op}: out must be {wanted}, got {list(out.shape)} on {out.device}")
    if out.dtype not in readable(t):
        names = " or ".join(dtype_name(d) for d in readable(t))
        raise TypeError(f"{op}: out must be {names}, got {dtype_name(out.dtype)}")
    if not out.is_contiguous():
        raise ValueError(f"{op}: out must be contiguous, got strides {list(out.stride())}")
    return out


def readable(t: Layout) -> tuple[torch.dtype, ...]:
    """The dtypes in which rows can be read: float64 beside float64 alone."""
    if t.scale:
        return FLOATS
    return (torch.float64,) if t.dtype == torch.float64 else FLOATS[:3]
