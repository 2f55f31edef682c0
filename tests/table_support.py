"""What the tests of RowTable share: tables of every kind, and their numbers decoded from the bytes of the file."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import torch
from torch import Tensor

from memkernels.store import RowTable

N, V = 700, 40
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
KINDS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "int8 row": {"dtype": torch.int8, "scale": "row"},
    "int8 block:16 e8m0": {"dtype": torch.int8, "scale": "block:16", "scale_dtype": E8M0},
    "e4m3 row e8m0": {"dtype": E4M3, "scale": "row", "scale_dtype": E8M0},
    "e4m3 block:32": {"dtype": E4M3, "scale": "block:32"},
}
TIERS = ("ram", "shared", "mmap", "direct", "pinned", "device")
HOST = TIERS[:4]


def numbers(rows: int = N, width: int = V, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-4, 4, rows).unsqueeze(1)
    x[rows // 2] = 0
    return x.to(dtype)


def new(path, kind: str = "e4m3 block:32", rows: int = N, width: int = V, seed: int = 0, **options) -> RowTable:
    how = KINDS[kind]
    values = numbers(rows, width, seed, torch.float32 if "scale" in how else how["dtype"])
    return RowTable.create(path, rows, width, values=values, **how, **options)


def opened(path, tier: str, **options) -> RowTable:
    if tier in ("pinned", "device"):
        options["device"] = "cpu"
    return RowTable.open(path, tier=tier, **options)


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinity."""
    sign, exponent, fraction = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10))


E4M3_NUMBERS = np.array([e4m3(b) for b in range(256)])


def decoded(path, kind: str, rows: int = N, width: int = V) -> np.ndarray:
    """The rows of a file by its format: float64 [N, V], the product of number and scale without rounding."""
    how = KINDS[kind]
    data, dtype = path.read_bytes(), how["dtype"]
    assert data[:8] == b"mkrows\r\n" and struct.unpack_from("<QQ", data, 36) == (rows, width)
    item = dtype.itemsize
    raw = np.frombuffer(data, np.uint8, rows * width * item, 4096).reshape(rows, width * item)
    if dtype == torch.bfloat16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype in (torch.float32, torch.float64):
        return raw.view("<f4" if item == 4 else "<f8").astype(np.float64)
    values = E4M3_NUMBERS[raw] if dtype == E4M3 else raw.view(np.int8).astype(np.float64)
    scale = how["scale"]
    block = width if scale == "row" else int(scale[6:])
    columns = -(-width // block)
    begin = 4096 + -(-raw.size // 4096) * 4096
    if how.get("scale_dtype") == E8M0:
        scales = np.ldexp(1.0, np.frombuffer(data, np.uint8, rows * columns, begin).astype(np.int64) - 127)
    else:
        scales = np.frombuffer(data, "<f4", rows * columns, begin).astype(np.float64)
    return values * np.repeat(scales.reshape(rows, columns), block, 1)[:, :width]


def picked(rows: np.ndarray, slots: Tensor, dtype=torch.float32) -> Tensor:
    """Rows of slots, one after the other; zeros for -1. Products are rounded to float32 first, as a kernel does."""
    found = torch.zeros(*slots.shape, rows.shape[1], dtype=torch.float64)
    for at in itertools.product(*map(range, slots.shape)):
        if slots[at] >= 0:
            found[at] = torch.from_numpy(rows[int(slots[at])])
    return found if dtype == torch.float64 else found.float().to(dtype)


def some(*shape: int, rows: int = N, seed: int = 0) -> Tensor:
    """Slots, some of them -1 and some twice."""
    return torch.randint(-1, rows, shape, generator=torch.Generator().manual_seed(seed))
