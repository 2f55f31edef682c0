"""CRC-32C (Castagnoli), the checksum of every page, log row and table block.

    crc32c(a + b) = crc32c(b, crc32c(a)),      crc32c(b"123456789") = 0xe3069283

The ``crc32c`` package computes it with the processor's instruction, many times faster than a disk reads. Where that
package is absent numpy computes the same numbers, at about the speed of a disk: a store opens everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

POLYNOMIAL = 0x82F63B78  # bits reversed
LANE = 64  # bytes of a lane of the numpy version


@functools.cache
def _table() -> np.ndarray:
    """[256]: what a byte adds to the state."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _past(zeros: int) -> np.ndarray:
    """[4, 256]: what each byte of a state becomes after ``zeros`` zero bytes (LANE times a power of two)."""
    if zeros > LANE:
        return _shift(_past(zeros // 2), _past(zeros // 2))
    state = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    for _ in range(zeros):
        state = (state >> 8) ^ _table()[state & 255]
    return state


def _shift(state: np.ndarray, past: np.ndarray) -> np.ndarray:
    return past[0][state & 255] ^ past[1][state >> 8 & 255] ^ past[2][state >> 16 & 255] ^ past[3][state >> 24]


def by_numpy(data, crc: int = 0) -> int:
    """Lanes of 64 bytes side by side, then pairs of lanes joined, again and again; what is left, byte by byte."""
    data = np.frombuffer(data, dtype=np.uint8)
    table, state = _table(), crc ^ 0xFFFFFFFF
    while len(data) >= 2 * LANE:
        lanes = 1 << ((len(data) // LANE).bit_length() - 1)
        columns = np.ascontiguousarray(data[: lanes * LANE].reshape(lanes, LANE).T)
        part = np.zeros(lanes, dtype=np.uint32)
        part[0] = state
        for column in columns:
            part = (part >> 8) ^ table[(part & 255) ^ column]
        width = LANE
        while len(part) > 1:
            part = _shift(part[0::2], _past(width)) ^ part[1::2]
            width *= 2
        state = int(part[0])
        data = data[lanes * LANE :]
    for byte in data.tolist():
        state = (state >> 8) ^ int(table[(state ^ byte) & 255])
    return state ^ 0xFFFFFFFF


def of_rows(rows: np.ndarray) -> np.ndarray:
    """The checksums of many short texts of one length. uint8 [n, bytes] -> uint32 [n]."""
    table, state = _table(), np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        state = (state >> 8) ^ table[(state & 255) ^ column]
    return state ^ np.uint32(0xFFFFFFFF)


try:
    from crc32c import crc32c as by_processor
except ImportError:
    SOURCE = "numpy"
    crc32c: Callable[..., int] = by_numpy
else:
    SOURCE = "the crc32c package"
    crc32c = by_processor
