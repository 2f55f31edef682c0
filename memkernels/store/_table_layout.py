"""What a table of rows is, and how its numbers become bytes.

    8 bits: row = round(x / scale), a scale for each row or for each block of B columns
    scale   = max |x| / 127 (int8) or / 448 (float8_e4m3fn), 1 where the block is zero or that is no normal float32
    e8m0:     the smallest power of two that is no less

A table of floats holds them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._columns import DTYPES, FLOATS, LARGEST, dtype_name
from ._io import round_up
from ._layout import WIDEST, whole

MOST_ROWS = 1 << 40
BLOCK = 1 << 20  # bytes under one checksum
HEADER = 4096  # bytes
SCALES = {"float32": torch.float32, "float8_e8m0fnu": torch.float8_e8m0fnu}
LEAST_E8M0 = -127  # the exponent of the smallest power of two


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of a table, and where its parts lie in a file: header, rows, scales, checksums."""

    rows: int
    width: int
    dtype: torch.dtype
    scale: str | None = None  # None, "row" or "block:B"
    scale_dtype: torch.dtype = torch.float32

    @cached_property
    def block(self) -> int:
        """Columns of a scale."""
        return int(self.scale[6:]) if self.scale and self.scale != "row" else self.width

    @cached_property
    def columns(self) -> int:
        """Scales of a row."""
        return -(-self.width // self.block) if self.scale else 0

    @cached_property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @cached_property
    def scale_bytes(self) -> int:
        return self.columns * self.scale_dtype.itemsize

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Bytes of all rows and of all scales, each up to the end of a block of the disk."""
        return round_up(self.rows * self.row_bytes), round_up(self.rows * self.scale_bytes)

    @cached_property
    def offsets(self) -> tuple[int, int]:
        return HEADER, HEADER + self.sizes[0]

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """Checksums of rows and of scales."""
        return -(-self.sizes[0] // BLOCK), -(-self.sizes[1] // BLOCK)

    @cached_property
    def sums(self) -> tuple[int, int]:
        """Offset and bytes of the checksums, which end the file."""
        return self.offsets[1] + self.sizes[1], round_up(4 * sum(self.blocks))

    @cached_property
    def file_bytes(self) -> int:
        return sum(self.sums)

    @cached_property
    def read_dtype(self) -> torch.dtype:
        return torch.float32 if self.scale else self.dtype

    def rows_of(self, memory: Tensor) -> Tensor:
        """uint8 [sizes[0]] as rows [N, V]."""
        return _shaped(memory[: self.rows * self.row_bytes], self.dtype, self.rows, self.width)

    def scales_of(self, memory: Tensor) -> Tensor | None:
        """uint8 [sizes[1]] as scales [N, columns]."""
        if not self.scale:
            return None
        return _shaped(memory[: self.rows * self.scale_bytes], self.scale_dtype, self.rows, self.columns)

    def check(self, op: str, x: object, count: int | None = None) -> Tensor:
        """Rows ``[M, V]`` that this table can hold, or the sentence that says what they must be."""
        wanted = f"[{'M' if count is None else count}, {self.width}]"
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta:
            raise TypeError(f"{op}: rows must be a dense tensor {wanted}, got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != self.width or count not in (None, len(x)):
            raise ValueError(f"{op}: rows must be {wanted}, got {list(x.shape)}")
        allowed = FLOATS if self.scale else (self.dtype,)
        if x.dtype not in allowed:
            names = " or ".join(dtype_name(d) for d in allowed)
            raise TypeError(f"{op}: rows must be {names}, got {dtype_name(x.dtype)}")
        x = x.detach()
        if self.scale and not torch.isfinite(x.float()).all():
            raise ValueError(f"{op}: rows in {dtype_name(self.dtype)} must be finite, got NaN or infinity")
        return x.cpu()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``[M, V]`` that were checked, as they lie in a table: of ``dtype``, and scales ``[M, columns]``."""
        if not self.scale:
            return x.contiguous(), None
        most, M = LARGEST[self.dtype], len(x)
        x = torch.nn.functional.pad(x.float(), (0, self.columns * self.block - self.width))
        x = x.view(M, self.columns, self.block)
        scale = quantum(x.abs().amax(2), most, self.scale_dtype)
        x = (x / scale.float().unsqueeze(2)).clamp(-most, most)
        x = (x.round() if self.dtype == torch.int8 else x).to(self.dtype)
        return x.view(torch.uint8).reshape(M, -1)[:, : self.width].contiguous().view(self.dtype), scale


def _shaped(memory: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """uint8 [bytes] as a tensor; torch gives no other dtype to one without elements."""
    return memory.view(dtype).view(shape) if len(memory) else memory.new_empty(shape, dtype=dtype)


def quantum(largest: Tensor, most: float, dtype: torch.dtype) -> Tensor:
    """The scale of blocks whose largest magnitudes these are, in ``dtype``."""
    if dtype == torch.float32:
        scale = largest / most
        return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
    fraction, exponent = torch.frexp(largest.double() / most)  # in [0.5, 1): a power of two has 0.5
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(min=LEAST_E8M0)
    exponent = torch.where(largest > 0, exponent, 0)
    return (exponent - LEAST_E8M0).to(torch.uint8).view(torch.float8_e8m0fnu)


def layout(op: str, rows: Any, width: Any, dtype: object, scale: object, scale_dtype: object) -> Layout:
    """The layout that the arguments describe, or the sentence that says why they describe none."""
    rows, width = whole(op, "rows", rows, 0, MOST_ROWS), whole(op, "width", width, 1, WIDEST)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        got = dtype_name(dtype) if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"{op}: dtype must be {' or '.join(DTYPES)}, got {got}")
    if scale_dtype not in SCALES.values():
        raise TypeError(f"{op}: scale_dtype must be {' or '.join(SCALES)}, got {scale_dtype}")
    if dtype not in LARGEST:
        if scale is not None:
            raise ValueError(f"{op}: scale must be None beside rows of {dtype_name(dtype)}, got {scale!r}")
        return Layout(rows, width, dtype)
    kind, _, size = scale.partition(":") if isinstance(scale, str) else ("", "", "")
    if scale != "row" and not (kind == "block" and size.isascii() and size.isdigit() and 1 <= int(size) <= width):
        wanted = f"'row' or 'block:B' with B in 1..{width}"
        raise ValueError(f"{op}: scale must be {wanted} beside rows of {dtype_name(dtype)}, got {scale!r}")
    found = scale if scale == "row" else f"block:{int(size)}"
    assert isinstance(found, str) and isinstance(scale_dtype, torch.dtype)
    return Layout(rows, width, dtype, found, scale_dtype)
