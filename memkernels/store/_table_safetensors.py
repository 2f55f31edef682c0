"""Tables as models ship them: rows and scales in safetensors files, one table in several tensors of several files.

The scale of ``X.weight`` is ``X.scale``, or stands beside it with one of the endings below. Slices are read one by one:
of a file no more is in memory than :data:`PIECE` bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._columns import LARGEST, dtype_name
from ._table_layout import Layout, layout

PIECE = 4 << 20  # bytes of rows
ENDINGS = (".scale", ".weight_scale", ".weight_scale_inv", "_scale", "_scale_inv")
NAMES = {"F32": "float32", "F64": "float64", "BF16": "bfloat16", "F16": "float16", "I8": "int8"}
NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}


class Tensors:
    """The tensors of several files by name, open while the block lasts."""

    def __init__(self, op: str, files: Any):
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError(f"{op}: needs the safetensors package (pip install safetensors)") from None
        paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        if not paths:
            raise ValueError(f"{op}: files must name at least one file, got none")
        self.op, self.stack = op, contextlib.ExitStack()
        self.found: dict[str, Any] = {}
        for path in [os.fspath(path) for path in paths]:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{op}: {path}: there is no file")
            try:
                file: Any = self.stack.enter_context(safe_open(path, framework="pt"))
            except Exception as error:
                raise ValueError(f"{op}: {path}: is no safetensors file ({error})") from None
            for name in file.keys():  # noqa: SIM118
                if name in self.found:
                    raise ValueError(f"{op}: {name} is in two of the files")
                self.found[name] = file

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def slice(self, name: object) -> Any:
        if not isinstance(name, str):
            raise TypeError(f"{self.op}: names must be texts or pairs of them, got {type(name).__name__}")
        if name not in self.found:
            raise KeyError(f"{self.op}: {name} is in none of the files")
        return self.found[name].get_slice(name)

    def scale_of(self, name: str) -> str:
        stem = name.removesuffix(".weight")
        beside = [base + ending for base in dict.fromkeys((stem, name)) for ending in ENDINGS]
        found = [other for other in beside if other in self.found]
        if not found:
            raise ValueError(
                f"{self.op}: scale of {name} is missing, it must be one of {', '.join(beside)} or be given"
            )
        return found[0]


class Source:
    """Some rows of the table: one tensor, and its scale."""

    def __init__(self, tensors: Tensors, entry: Any):
        self.name, self.scale_name = entry if isinstance(entry, tuple) else (entry, None)
        self.rows = tensors.slice(self.name)
        op, self.shape = tensors.op, self.rows.get_shape()
        if len(self.shape) != 2:
            raise ValueError(f"{op}: {self.name} must be [N, V], got {self.shape}")
        self.dtype = torch_dtype(op, self.name, self.rows)
        self.scale: Any = None
        self.scale_dtype, self.scale_shape = torch.float32, []
        if self.dtype in LARGEST:
            self.scale_name = self.scale_name or tensors.scale_of(self.name)
            self.scale = tensors.slice(self.scale_name)
            self.scale_shape = self.scale.get_shape()
            self.scale_dtype = torch_dtype(op, self.scale_name, self.scale)
            if self.scale_dtype in (torch.bfloat16, torch.float16):
                self.scale_dtype = torch.float32
        elif self.scale_name is not None:
            raise ValueError(f"{op}: {self.name} has {dtype_name(self.dtype)}, which has no scale")

    def kind(self, op: str, block: int | None) -> str | None:
        """The scale of a layout that these scales are."""
        if self.scale is None:
            return None
        shape, (N, V) = self.scale_shape, self.shape
        if shape in ([], [1], [1, 1], [N], [N, 1]) and block is None:
            return "row"
        if len(shape) != 2 or shape[0] != N or not 1 <= shape[1] <= V:
            wanted = f"[{N}], [{N}, 1] or [{N}, blocks]"
            raise ValueError(f"{op}: {self.scale_name} must be {wanted} beside {self.name} {self.shape}, got {shape}")
        fitting = [b for b in range(-(-V // shape[1]), V + 1) if -(-V // b) == shape[1]]
        if block is not None:
            fitting = [b for b in fitting if b == block]
        elif V % shape[1] == 0 and (V // shape[1]).bit_count() == 1:
            fitting = [V // shape[1]]
        if len(fitting) != 1:
            got = f"{shape[1]} scales for {V} columns"
            wanted = f"one of {fitting[0]}..{fitting[-1]}" if fitting else "of another number of columns"
            raise ValueError(f"{op}: block must be {wanted} beside {got} of {self.scale_name}, got {block}")
        return f"block:{fitting[0]}"

    def chunks(self, t: Layout) -> Iterator[tuple[Tensor, Tensor | None]]:
        step = max(1, PIECE // t.row_bytes)
        for begin in range(0, self.shape[0], step):
            rows = self.rows[begin : begin + step]
            yield rows.contiguous(), None if self.scale is None else self._scales(t, begin, len(rows))

    def _scales(self, t: Layout, begin: int, count: int) -> Tensor:
        """[count, columns]"""
        if len(self.scale_shape) == 0 or self.scale_shape in ([1], [1, 1]):
            one = self.scale[:] if self.scale_shape else self.scale[...]
            found = one.view(-1).to(t.scale_dtype).view(torch.uint8).repeat(count, 1).view(t.scale_dtype)
        else:
            found = self.scale[begin : begin + count].to(t.scale_dtype)
        return found.reshape(count, t.columns).contiguous()


def torch_dtype(op: str, name: str, part: Any) -> torch.dtype:
    if part.get_dtype() not in NAMES:
        raise TypeError(f"{op}: {name} must be {', '.join(NAMES)}, got {part.get_dtype()}")
    return getattr(torch, NAMES[part.get_dtype()])


def sources(tensors: Tensors, names: Any, block: int | None) -> tuple[Layout, list[Source]]:
    """The tensors that are the table, and its layout."""
    op = tensors.op
    single = isinstance(names, (str, tuple)) and not (isinstance(names, tuple) and len(names) != 2)
    if not isinstance(names, (str, Sequence)):
        raise TypeError(f"{op}: names must be a name or a list of them, got {type(names).__name__}")
    entries = [names] if isinstance(names, str) or (single and isinstance(names, tuple)) else list(names)
    if not entries:
        raise ValueError(f"{op}: names must name at least one tensor, got none")
    found = [Source(tensors, entry) for entry in entries]
    first = found[0]
    for other in found[1:]:
        a, b = ((s.shape[1], dtype_name(s.dtype), dtype_name(s.scale_dtype)) for s in (first, other))
        if a != b or first.kind(op, block) != other.kind(op, block):
            raise ValueError(f"{op}: {other.name} must have rows and scales like those of {first.name}, {a}, got {b}")
    rows = sum(source.shape[0] for source in found)
    return layout(op, rows, first.shape[1], first.dtype, first.kind(op, block), first.scale_dtype), found
