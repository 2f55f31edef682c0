"""The table that most rows share, in memory and in a file."""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memkernels.store import _table_file
from memkernels.store._table_layout import Layout

from ..cases.gather_rows import dequantised
from ..contests import setting
from .memory import huge

WIDTH = 256
DTYPE, OUT = torch.float8_e4m3fn, torch.bfloat16
PIECE = 1 << 18  # rows that have other bytes; a table repeats them, each time with other scales


@dataclass(frozen=True)
class Content:
    """What a table of ``count`` rows holds, made again where it is checked. pattern uint8 [PIECE, V], scale [N]."""

    count: int
    pattern: Tensor
    scale: Tensor

    @classmethod
    def of(cls, count: int) -> Content:
        generator = torch.Generator().manual_seed(30)
        pattern = torch.randint(256, (min(count, PIECE), WIDTH), dtype=torch.uint8, generator=generator)
        pattern[pattern & 127 == 127] ^= 1  # NaN is no number of a table
        return cls(count, pattern, 0.5 + torch.rand(count, generator=generator))

    @property
    def nbytes(self) -> int:
        """Of the rows."""
        return self.count * WIDTH

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows uint8 [M, V] and scales [M], in order."""
        for first in range(0, self.count, PIECE):
            scale = self.scale[first : first + PIECE]
            yield self.pattern[: len(scale)], scale

    def rows(self, slots: Tensor, dtype: torch.dtype = OUT) -> Tensor:
        """The rows of slots, by the definition of their dtype."""
        return dequantised(self.pattern[slots % PIECE], self.scale[slots], dtype)

    def text(self) -> str:
        return f"a table of {self.nbytes / (1 << 30):.2g} GiB" if self.count >= PIECE else "a small table"


@dataclass(frozen=True)
class Table:
    """values [N, V] and scale [N] in memory."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, content: Content) -> Table:
        memory = huge(content.nbytes).view(-1, WIDTH)
        scale = huge(4 * content.count).view(torch.float32)
        for first, (rows, scales) in zip(itertools.count(0, PIECE), content.chunks()):
            memory[first : first + len(rows)] = rows
            scale[first : first + len(rows)] = scales
        return cls(memory.view(DTYPE), scale)


@dataclass(frozen=True)
class Setting(setting.Setting):
    @functools.cached_property
    def content(self) -> Content:
        """4 GiB of rows."""
        return Content.of(self.size(1 << 24, 1 << 12))

    @functools.cached_property
    def table(self) -> Table:
        """In memory, until a row that needs the room lets it go."""
        return Table.of(self.content)

    def let_go(self) -> None:
        """The memory of the table."""
        self.__dict__.pop("table", None)

    @functools.cached_property
    def file(self) -> Path:
        """A file of RowTable with the same content."""
        return write(self.folder / "table", self.content)


def write(path: Path, content: Content) -> Path:
    """A file of RowTable. The rows have the bytes of the content as they are, so nothing is quantised."""
    layout = Layout(content.count, WIDTH, DTYPE, "row")
    chunks = ((rows.contiguous(), scale.unsqueeze(1)) for rows, scale in content.chunks())
    _table_file.write(path, layout, uuid.uuid4(), 0, chunks)
    return path
