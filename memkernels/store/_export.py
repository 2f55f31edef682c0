"""Export to one file of the safetensors format, and back: a JSON header, then raw bytes.

keys, values      [L, K], [L, V] of the live slots; with key_scale, value_scale [L] where rows have 8 bits
slots             int64 [L], their numbers, rising
meta              uint8, a line of JSON per live slot
__metadata__      format, page_slots, capacity
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from . import _io, _layout, _rows, _verify
from ._bitmap import pages_with_bits
from ._columns import Column, dtype_name
from ._database import COLUMNS, translated
from ._engine import Engine
from ._errors import StoreError
from ._log import ALIVE, KEYS, VALUES, Change
from ._writer import Writer

NAMES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
NAMES |= {"float8_e4m3fn": "F8_E4M3", "int64": "I64", "uint8": "U8"}
DTYPES = {short: getattr(torch, name) for name, short in NAMES.items()}
SCALE = {"keys": "key_scale", "values": "value_scale"}
LARGEST_HEADER = 1 << 20
CHUNK = 1 << 24  # bytes of rows that load reads at once
FORMAT = "memkernels.store 1"


def export(engine: Engine, path: Path) -> None:
    """Write the file whole, or not at all."""
    live, columns = engine.maps["live"].slots(), engine.columns
    shapes: dict[str, tuple[str, list[int]]] = {}
    for name, column in columns.items():
        shapes[name] = NAMES[dtype_name(column.dtype)], [len(live), column.dim]
        if column.scaled:
            shapes[SCALE[name]] = "F32", [len(live)]
    shapes["slots"] = "I64", [len(live)]
    shapes["meta"] = "U8", [sum(len(line) for line in _lines(engine, live))]
    about = {"format": FORMAT, "page_slots": str(engine.page_slots), "capacity": str(engine.capacity)}
    header: dict[str, dict] = {"__metadata__": about}
    at, offsets = 0, {}
    for name, (dtype, shape) in shapes.items():
        size = DTYPES[dtype].itemsize * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        offsets[name], at = at, at + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    offsets = {name: offset + 8 + len(text) for name, offset in offsets.items()}
    with _io.new_file(path) as fd:
        _io.write_all(fd, struct.pack("<Q", len(text)) + text, 0)
        _write_rows(engine, fd, offsets)
        _io.write_all(fd, live.astype("<i8"), offsets["slots"])
        for line in _lines(engine, live):
            offsets["meta"] += _io.write_all(fd, line, offsets["meta"])


def _write_rows(engine: Engine, fd: int, offsets: dict[str, int]) -> None:
    packed, size = engine.maps["live"].bytes, engine.page_slots
    for run in _rows.stream(engine, COLUMNS, pages_with_bits(packed, size)):
        keep = _rows.mask(packed, run.pages, size)
        at = torch.arange(len(run.pages) * size) if keep is None else keep.nonzero().squeeze(1)
        for name in COLUMNS:
            rows = _rows.take(run.rows[name], at).view(torch.uint8).numpy()
            offsets[name] += _io.write_all(fd, np.ascontiguousarray(rows), offsets[name])
            if (scales := run.scales[name]) is not None:
                offsets[SCALE[name]] += _io.write_all(fd, scales[at].numpy(), offsets[SCALE[name]])


def _lines(engine: Engine, live: np.ndarray) -> Iterator[bytes]:
    with translated():
        for slot in live.tolist():
            yield (_verify.document(engine, slot) or "{}").encode() + b"\n"


class File:
    """A file that may hold anything: every size is checked against the file before memory is taken for it."""

    def __init__(self, path: Path):
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.fstat(self.fd).st_size
            self._parse()
        except BaseException:
            os.close(self.fd)
            raise

    def _parse(self) -> None:
        (length,) = struct.unpack("<Q", self._bytes(0, 8))
        if length > min(LARGEST_HEADER, self.size - 8):
            raise self._bad(f"its header would have {length} bytes")
        try:
            header = json.loads(self._bytes(8, length))
            about = header.pop("__metadata__", {})
            self.start = 8 + length
            self.tensors = {name: self._tensor(one) for name, one in header.items()}
            self.page_slots, self.capacity = int(about["page_slots"]), int(about["capacity"])
            known = about["format"] == FORMAT
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._bad(f"its header does not read ({type(error).__name__}: {error})") from None
        if not known:
            raise self._bad(f"its format is {about['format']!r}, not {FORMAT!r}")
        self.columns: dict[str, Column] = {}
        for name in COLUMNS:
            dtype, shape, _ = self._wanted(name, 2)
            self.columns[name] = Column(name, shape[1], dtype, self.page_slots)
        self.count = self.tensors["keys"][1][0]
        _, shape, _ = self._wanted("slots", 1, torch.int64)
        _, _, _ = self._wanted("meta", 1, torch.uint8)
        if shape != [self.count] or self.tensors["values"][1][0] != self.count:
            raise self._bad("keys, values and slots have different lengths")
        for name, column in self.columns.items():
            if column.scaled and self._wanted(SCALE[name], 1, torch.float32)[1] != [self.count]:
                raise self._bad(f"{SCALE[name]} and {name} have different lengths")
        tables = self.capacity * (3 / 8 + 32 / max(self.page_slots, 1))
        if not self.capacity >= 0 or tables > 64 * self.size + (64 << 20):
            raise self._bad(f"its capacity is {self.capacity}, with {self.count} slots")

    def _tensor(self, one: dict) -> tuple[torch.dtype, list[int], int]:
        dtype, shape, (begin, end) = DTYPES[one["dtype"]], [int(n) for n in one["shape"]], one["data_offsets"]
        size = dtype.itemsize
        for n in shape:
            if n < 0:
                raise ValueError("a negative size")
            size *= n
        if not 0 <= begin <= end <= self.size - self.start or end - begin != size:
            raise ValueError(f"shape {shape} in bytes {begin} to {end}")
        return dtype, shape, self.start + begin

    def _wanted(self, name: str, dims: int, dtype: torch.dtype | None = None) -> tuple[torch.dtype, list[int], int]:
        found = self.tensors.get(name)
        if found is None or len(found[1]) != dims or (dtype is not None and found[0] != dtype):
            raise self._bad(f"it has no {name} of {dims} dimensions")
        return found

    def _bad(self, why: str) -> StoreError:
        return StoreError(f"load: {self.path}: is no export of a store: {why}")

    def _bytes(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        if _io.read_into(self.fd, [data], offset) != size:
            raise self._bad(f"it ends within the {size} bytes at {offset}")
        return data

    def rows(self, name: str, first: int, stop: int) -> np.ndarray:
        """Rows as they stand in the log."""
        column = self.columns[name]
        parts = [self._part(name, first, stop, column.row_bytes)]
        if column.scaled:
            parts.append(self._part(SCALE[name], first, stop, 4))
            scales = parts[1].copy().view(np.float32)
            if not np.isfinite(scales).all():
                raise self._bad(f"{SCALE[name]} has NaN or infinity")
        rows = np.concatenate(parts, 1)
        numbers = torch.from_numpy(parts[0].copy()).view(column.dtype)
        if name == "keys" and column.dtype != torch.int8 and torch.isnan(numbers.float()).any():
            raise self._bad("keys have NaN")
        return rows

    def _part(self, name: str, first: int, stop: int, width: int) -> np.ndarray:
        data = self._bytes(self.tensors[name][2] + first * width, (stop - first) * width)
        return np.frombuffer(data, np.uint8).reshape(stop - first, width)

    def slots(self) -> np.ndarray:
        slots = np.frombuffer(self._bytes(self.tensors["slots"][2], 8 * self.count), "<i8").astype(np.int64)
        if len(slots) and (slots[0] < 0 or slots[-1] >= self.capacity or (np.diff(slots) <= 0).any()):
            raise self._bad("its slot numbers do not rise within the capacity")
        return slots

    def documents(self) -> Iterator[str]:
        _, (size,), offset = self.tensors["meta"]
        with open(self.path, "rb") as file:
            file.seek(offset)
            left = size
            while left:
                line = file.readline(min(left, 1 << 24))
                left -= len(line)
                if not line.endswith(b"\n"):
                    raise self._bad("a line of its metadata does not end")
                try:
                    text = line.decode()
                    whole = isinstance(json.loads(text), dict)
                except (ValueError, RecursionError):
                    whole = False
                if not whole:
                    raise self._bad("a line of its metadata is no JSON object")
                yield text.strip()


def load(path: Path, source: Path) -> None:
    """A new store at ``path`` with the slots of an export, whole or not at all."""
    file = File(source)
    try:
        with _io.new_directory(path) as making:
            keys, values = file.columns["keys"], file.columns["values"]
            _layout.lay_out(making, keys.dim, values.dim, keys.dtype, values.dtype, file.page_slots)
            engine = Writer(making, "w", None, None, "batch")
            try:
                _fill(engine, file)
            finally:
                engine.closed = True
                engine.release()
    finally:
        os.close(file.fd)


def _fill(engine: Writer, file: File) -> None:
    slots, documents = file.slots(), file.documents()
    step = max(1, CHUNK // (file.columns["keys"].stored_bytes + file.columns["values"].stored_bytes))
    for first in range(0, file.count, step):
        stop = min(first + step, file.count)
        rows = {name: file.rows(name, first, stop) for name in COLUMNS}
        docs = list(itertools.islice(documents, stop - first))
        if len(docs) != stop - first:
            raise file._bad("it has fewer lines of metadata than slots")
        engine.begin()
        try:
            engine.stage(Change(ALIVE | KEYS | VALUES, slots[first:stop].copy(), rows))
            some = [i for i, doc in enumerate(docs) if doc != "{}"]
            if some:
                engine.put_meta(slots[first:stop][some], [docs[i] for i in some])
        except BaseException:
            engine.abort()
            raise
        engine.commit()
    engine._grow(file.capacity)
    engine.capacity = file.capacity
    engine.fold_all()
    engine.publish({name: [] for name in COLUMNS}, engine.generation)
    engine.close_files()  # a checkpoint syncs index.db, whatever the commits did
