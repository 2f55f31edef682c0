"""What callers give, checked: slot numbers, metadata, queries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._columns import FLOATS, Column, dtype_name
from ._engine import Engine

LONGEST = 1 << 24  # bytes of the metadata of a slot as JSON
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def numbers(op: str, slots: object) -> tuple[np.ndarray, torch.Size]:
    """Slot numbers as int64 [n], and the shape in which they came."""
    if not isinstance(slots, Tensor):
        if isinstance(slots, (bool, str)) or slots is None:
            raise TypeError(f"{op}: slots must be integers, got {type(slots).__name__}")
        if isinstance(slots, (list, tuple)) and len(slots) == 0:
            return np.zeros(0, dtype=np.int64), torch.Size([0])
        try:
            slots = torch.as_tensor(slots)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{op}: slots must be integers, got {type(slots).__name__}") from None
    if slots.dtype not in INTEGERS:
        raise TypeError(f"{op}: slots must be integers, got {dtype_name(slots.dtype)}")
    return slots.detach().cpu().to(torch.int64).reshape(-1).numpy(), slots.shape


def live(op: str, engine: Engine, slots: np.ndarray) -> None:
    """IndexError or KeyError where a number is none of a live slot."""
    if len(slots) == 0:
        return
    if slots.min() < 0 or slots.max() >= engine.capacity:
        outside = (slots < 0) | (slots >= engine.capacity)
        raise IndexError(f"{op}: slot {slots[outside][0]} is out of range, the capacity is {engine.capacity}")
    dead = ~engine.maps["live"].has(slots)
    if dead.any():
        raise KeyError(f"{op}: slot {slots[dead][0]} is deleted")


def rows(op: str, column: Column, x: object, count: int) -> np.ndarray:
    return column.encode(column.check(op, x, count))


def documents(op: str, meta: object, count: int) -> list[str]:
    """Metadata as JSON texts."""
    if isinstance(meta, (str, bytes, dict)) or not isinstance(meta, Sequence):
        raise TypeError(f"{op}: meta must be a list of {count} dicts, got {type(meta).__name__}")
    if len(meta) != count:
        raise ValueError(f"{op}: meta must have one dict per slot, {count}, got {len(meta)}")
    return [_document(op, i, one) for i, one in enumerate(meta)]


def _document(op: str, i: int, one: object) -> str:
    if not isinstance(one, dict) or not all(isinstance(key, str) for key in one):
        raise TypeError(f"{op}: meta[{i}] must be a dict with texts as keys, got {type(one).__name__}")
    try:
        text = json.dumps(one, allow_nan=False, ensure_ascii=True)
    except TypeError as error:
        raise TypeError(f"{op}: meta[{i}] must hold JSON values: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: meta[{i}] must hold JSON values: {error}") from None
    if len(text) > LONGEST:
        raise ValueError(f"{op}: meta[{i}] must have at most {LONGEST} bytes as JSON, got {len(text)}")
    return text


def query(op: str, engine: Engine, x: object) -> Tensor:
    """A query ``[..., T, K]`` where the call runs, of the dtype of the keys; under autocast made of any float."""
    column = engine.columns["keys"]
    wanted = f"[..., T, K={column.dim}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: query must be a tensor {wanted}, got {type(x).__name__}")
    if x.dim() < 2 or x.shape[-1] != column.dim:
        raise ValueError(f"{op}: query must be {wanted}, got {list(x.shape)}")
    if engine.autocast and x.dtype in FLOATS:
        return x.to(engine.home(x), column.read_dtype)
    allowed = FLOATS if column.scaled else (column.dtype,)
    if x.dtype not in allowed:
        names = " or ".join(dtype_name(d) for d in allowed)
        raise TypeError(
            f"{op}: query must be {names} beside keys in {dtype_name(column.dtype)}, got {dtype_name(x.dtype)}"
        )
    return x.to(engine.home(x))


def scaling(op: str, scale: Any, x: Tensor) -> float | Tensor:
    """The scale of a query: a number, or a tensor [T] beside the flattened queries, on their device."""
    if scale is None:
        return x.shape[-1] ** -0.5
    if isinstance(scale, Tensor) and (scale.dim() or scale.requires_grad):
        if not scale.is_floating_point():
            raise TypeError(f"{op}: scale must be a float tensor, got {dtype_name(scale.dtype)}")
        try:
            return scale.expand(x.shape[:-1]).reshape(-1).to(x.device)
        except RuntimeError:
            raise ValueError(
                f"{op}: scale must broadcast to {list(x.shape[:-1])}, [..., T], got {list(scale.shape)}"
            ) from None
    if isinstance(scale, (bool, str)):
        raise TypeError(f"{op}: scale must be a number or a tensor, got {type(scale).__name__}")
    try:
        number = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: scale must be a number or a tensor, got {type(scale).__name__}") from None
    if number != number:
        raise ValueError(f"{op}: scale must be a number, got nan")
    return number


def neighbours(op: str, k: object) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k.__index__() < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k.__index__()}")
    return k.__index__()
