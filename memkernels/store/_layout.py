"""The files of a new store, and its first state."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

import torch

from . import _database, _io, _mark
from ._columns import DTYPES, dtype_name
from ._database import COLUMNS

WIDEST = 1 << 20  # numbers in a row
MOST_SLOTS = 1 << 20  # in a page


def absolute(op: str, path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{op}: path must be a path, got {type(path).__name__}")
    return Path(os.path.abspath(os.fspath(path)))


def lay_out(directory: Path, key_dim, value_dim, key_dtype, value_dtype, page_slots) -> dict:
    """Write an empty store into an empty directory, durably; returns its state."""
    state = {
        "format": _database.FORMAT,
        "keys_dim": _size("key_dim", key_dim, WIDEST),
        "values_dim": _size("value_dim", value_dim, WIDEST),
        "keys_dtype": _dtype("key_dtype", key_dtype),
        "values_dtype": _dtype("value_dtype", value_dtype),
        "page_slots": _size("page_slots", page_slots, MOST_SLOTS),
        "version": 0,
        "maps_generation": 0,
        "log_from": 1,
        "capacity": 0,
        "live": 0,
        "table_blocks": 0,
        "map_blocks": 0,
    }
    (directory / "readers").mkdir()
    for name in (*(f"{column}.pages" for column in COLUMNS), "writer.lock"):
        with open(directory / name, "wb") as file:
            os.fsync(file.fileno())
    _mark.write(directory, _mark.Mark())
    _database.create(directory, state)
    _io.sync_directory(directory)
    return state


def _size(name: str, value: Any, most: int) -> int:
    return whole("create", name, value, 1, most)


def whole(op: str, name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}") from None
    if not least <= number <= most:
        raise ValueError(f"{op}: {name} must be in {least}..{most}, got {number}")
    return number


def _dtype(name: str, value: object) -> str:
    if not isinstance(value, torch.dtype) or value not in DTYPES.values():
        got = dtype_name(value) if isinstance(value, torch.dtype) else type(value).__name__
        raise TypeError(f"create: {name} must be {' or '.join(DTYPES)}, got {got}")
    return dtype_name(value)
