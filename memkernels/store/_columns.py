"""How rows of a column lie in memory, in a page and in the log.

A page of S slots is S rows side by side, then, where rows have 8 bits, S scales in float32, then zeros up to a multiple
of 4 KiB. A row in the log is the row and, where it has one, its scale.

    8 bits: row = round(x / scale),  scale = max |x| / 127 (int8) or / 448 (float8_e4m3fn), 1 for a row of zeros
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._copies import Copies
from ._crc import crc32c
from ._io import ALIGN, round_up
from ._memory import aligned

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SIXTEEN = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Column:
    """``keys`` or ``values``: its width, its dtype, and the slots of a page."""

    name: str
    dim: int
    dtype: torch.dtype
    slots: int

    @cached_property
    def scaled(self) -> bool:
        return self.dtype in LARGEST

    @cached_property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @cached_property
    def stored_bytes(self) -> int:
        return self.row_bytes + 4 * self.scaled

    @cached_property
    def extent_bytes(self) -> int:
        return round_up(self.slots * self.stored_bytes)

    @cached_property
    def direct(self) -> bool:
        """Do rows and scales of a page each fill whole blocks? Then a page is read past the system's cache."""
        return self.slots * self.row_bytes % ALIGN == 0 and (not self.scaled or self.slots * 4 % ALIGN == 0)

    @cached_property
    def read_dtype(self) -> torch.dtype:
        """What a caller gets."""
        return torch.float32 if self.scaled else self.dtype

    def check(self, where: str, x: object, count: int) -> Tensor:
        """``x`` as rows of this column, or the sentence that says what it must be."""
        wanted = f"[{count}, {self.name[0].upper()}={self.dim}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: {self.name} must be a tensor {wanted}, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested or x.is_meta:
            raise TypeError(f"{where}: {self.name} must be a dense tensor {wanted} with memory")
        if list(x.shape) != [count, self.dim]:
            raise ValueError(f"{where}: {self.name} must be {wanted}, got {list(x.shape)}")
        allowed = FLOATS if self.scaled else (self.dtype,)
        if x.dtype not in allowed:
            names = " or ".join(dtype_name(d) for d in allowed)
            raise TypeError(f"{where}: {self.name} must be {names}, got {dtype_name(x.dtype)}")
        x = x.detach()
        if self.scaled and not torch.isfinite(x).all():
            raise ValueError(f"{where}: {self.name} in {dtype_name(self.dtype)} must be finite, got NaN or infinity")
        if self.name == "keys" and torch.isnan(x).any():
            raise ValueError(f"{where}: keys must not be NaN, got NaN in row {int(torch.isnan(x).any(1).nonzero()[0])}")
        return x.cpu()

    def encode(self, x: Tensor) -> np.ndarray:
        """Rows as they stand in the log. [M, dim] -> uint8 [M, stored_bytes], a copy."""
        out = np.empty((len(x), self.stored_bytes), dtype=np.uint8)
        if self.scaled:
            x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            largest = LARGEST[self.dtype]
            scale = (x.abs().amax(1) / largest).float()
            scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
            x = (x / scale.unsqueeze(1)).clamp(-largest, largest)
            x = (x.round() if self.dtype == torch.int8 else x).to(self.dtype)
            out[:, self.row_bytes :] = scale.unsqueeze(1).view(torch.uint8).numpy()
        out[:, : self.row_bytes] = x.contiguous().view(torch.uint8).reshape(len(x), self.row_bytes).numpy()
        return out

    def decode(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """Rows as a caller reads them. [..., dim] of ``dtype`` -> [..., dim] of ``read_dtype``."""
        return rows if scales is None else rows.float() * scales.unsqueeze(-1)


def as_they_lie(column: Column, dtype: torch.dtype) -> bool:
    """Do reads with a query or weights of ``dtype`` take rows of the column without a conversion?"""
    return column.scaled or column.dtype == dtype or (column.dtype == torch.float32 and dtype in SIXTEEN)


class Pages:
    """Memory for ``count`` pages of a column: rows side by side in one tensor, and their scales in another.

    With ``copies`` in page-locked memory, out of which they go to a device.
    """

    @torch.inference_mode(False)  # a store outlives the mode in which it is first used
    def __init__(self, column: Column, count: int, copies: Copies | None = None):
        self.column, self.count = column, count
        self.sent: Any = None  # the event behind a copy to a device that reads them
        slots = count * column.slots
        memory = aligned if copies is None else copies.locked
        rows = memory(slots * column.row_bytes)
        self.bytes: Any = rows.numpy().reshape(count, column.slots, column.row_bytes)
        self.rows = rows.view(column.dtype).view(slots, column.dim)
        self.scales = memory(slots * 4).view(torch.float32) if column.scaled else None
        self.scale_numbers: Any = None if self.scales is None else self.scales.numpy().reshape(count, column.slots)

    def parts(self, at: int) -> list:
        """The bytes of a page in the order in which they stand on disk, without the padding."""
        parts = [self.bytes[at].reshape(-1)]
        return parts if self.scale_numbers is None else [*parts, self.scale_numbers[at].view(np.uint8)]

    def crc(self, at: int, padding: bytes | bytearray) -> int:
        """crc32c of a page and the padding after it."""
        crc = 0
        for part in (*self.parts(at), padding):
            crc = crc32c(part, crc)
        return crc

    def patch(self, at: int | np.ndarray, offsets: np.ndarray, stored: np.ndarray) -> None:
        """Put rows of the log into a page, or each into one of its own; of rows at one place the last stays."""
        self.bytes[at, offsets] = stored[:, : self.column.row_bytes]
        if self.scale_numbers is not None:
            scales = np.ascontiguousarray(stored[:, self.column.row_bytes :]).view(np.float32)
            self.scale_numbers[at, offsets] = scales[:, 0]

    def clear(self, at: int) -> None:
        self.bytes[at] = 0
        if self.scale_numbers is not None:
            self.scale_numbers[at] = 0

    def copy(self, at: int, other: Pages, from_: int) -> None:
        """A page of ``other``."""
        size = self.column.slots
        here, there = slice(at * size, (at + 1) * size), slice(from_ * size, (from_ + 1) * size)
        self.rows[here].copy_(other.rows[there])
        if self.scales is not None and other.scales is not None:
            self.scales[here].copy_(other.scales[there])


class DevicePages:
    """The same in the memory of a device, which copies fill."""

    @torch.inference_mode(False)
    def __init__(self, column: Column, count: int, copies: Copies):
        self.column, self.count = column, count
        slots = count * column.slots
        self.rows: Any = copies.empty(slots, column.dim, dtype=column.dtype)
        self.scales: Any = copies.empty(slots) if column.scaled else None

    def free(self) -> None:
        self.rows = self.scales = None
