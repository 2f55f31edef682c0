"""A bit per slot: which are live, which numbers may be given out again, which changed since the index was built."""

from __future__ import annotations

import numpy as np

from ._database import MAP_BLOCK
from ._memory import zeros

BLOCK_BYTES = MAP_BLOCK // 8
BIT = np.left_shift(1, np.arange(8)).astype(np.uint8)
ONES = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


def ones(packed: np.ndarray) -> int:
    return int(ONES[packed].sum(dtype=np.int64))


class Bitmap:
    """Grows by whole blocks of 65,536 slots. Slot i is bit i % 8 of byte i // 8."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, dtype=np.uint8)
        self.count = 0
        self.dirty: set[int] = set()  # blocks that differ from the disk
        self.changes = 0  # how often a bit may have changed

    def copy(self) -> Bitmap:
        other = Bitmap()
        other.bytes, other.count, other.dirty = self.bytes.copy(), self.count, set(self.dirty)
        return other

    def grow(self, capacity: int) -> None:
        blocks = -(-capacity // MAP_BLOCK)
        if blocks * BLOCK_BYTES > len(self.bytes):
            larger = zeros(blocks * BLOCK_BYTES)
            larger[: len(self.bytes)] = self.bytes
            self.bytes = larger

    def has(self, slots: np.ndarray) -> np.ndarray:
        return (self.bytes[slots >> 3] & BIT[slots & 7]) != 0

    def set(self, slots: np.ndarray, to: bool = True) -> np.ndarray:
        """Set or clear bits; returns the slots whose bit changed."""
        slots = slots[self.has(slots) != to]
        if len(slots) > 1:
            slots = np.unique(slots)
        if len(slots):
            self.changes += 1
            bits = np.left_shift(1, slots & 7).astype(np.uint8)
            np.bitwise_xor.at(self.bytes, slots >> 3, bits)
            self.count += len(slots) if to else -len(slots)
            self.dirty |= set(np.unique(slots // MAP_BLOCK).tolist())
        return slots

    def slots(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """The numbers whose bit is set, in order, int64."""
        begin = first // 8
        end = len(self.bytes) if stop is None else -(-stop // 8)
        bits = np.unpackbits(self.bytes[begin:end], bitorder="little")
        found = np.flatnonzero(bits).astype(np.int64) + begin * 8
        return found[(found >= first) & (found < (len(self.bytes) * 8 if stop is None else stop))]

    def block(self, block: int) -> bytes:
        """Its bytes; a single one where all are alike."""
        here = self.bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        return here[:1].tobytes() if (here == here[0]).all() else here.tobytes()

    def load_alike(self, blocks: np.ndarray, alike: np.ndarray) -> None:
        """Blocks of a map that is still empty, each of which holds one byte throughout. int64 [n], uint8 [n]."""
        self.grow((int(blocks.max(initial=-1)) + 1) * MAP_BLOCK)
        rows = self.bytes.reshape(-1, BLOCK_BYTES)
        for value in np.unique(alike[alike != 0]).tolist():
            for run in runs(np.sort(blocks[alike == value])):
                rows[run] = value
        self.changes += 1
        self.count += BLOCK_BYTES * int(ONES[alike].sum(dtype=np.int64))

    def load_block(self, block: int, blob: bytes) -> None:
        self.grow((block + 1) * MAP_BLOCK)
        here = self.bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        new = np.frombuffer(blob, dtype=np.uint8)
        self.count += ones(new) * (BLOCK_BYTES // len(new)) - ones(here)
        self.changes += 1
        here[:] = new

    def clear(self) -> None:
        self.dirty |= set(np.flatnonzero(self.bytes.reshape(-1, BLOCK_BYTES).any(1)).tolist())
        self.bytes[:] = 0
        self.count = 0
        self.changes += 1


def numbers(packed: np.ndarray) -> np.ndarray:
    """The numbers of the bits that are set, in order, int64: few of many."""
    some = np.flatnonzero(packed)
    bits = np.flatnonzero(np.unpackbits(packed[some], bitorder="little"))
    return some[bits >> 3] * 8 + (bits & 7)


def runs(numbers: np.ndarray) -> list[slice]:
    """Ascending numbers as slices of those that follow each other."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [slice(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts) if len(part)]


def page_bits(packed: np.ndarray, pages: np.ndarray, slots: int) -> np.ndarray:
    """The bits of some pages of ``slots`` slots each. uint8 packed -> bool [len(pages), slots]."""
    if slots % 8 == 0:
        width = slots // 8
        whole = packed[: len(packed) // width * width].reshape(-1, width)
        short = (int(pages.max(initial=-1)) + 1) - len(whole)
        if short > 0:
            whole = np.zeros((len(whole) + short, width), np.uint8)
            whole.reshape(-1)[: len(packed)] = packed[: whole.size]
        return np.unpackbits(whole[pages], axis=1, bitorder="little").view(bool)
    at = pages[:, None] * slots + np.arange(slots)
    inside = at < 8 * len(packed)
    at = np.where(inside, at, 0)
    return (((packed[at >> 3] >> (at & 7).astype(np.uint8)) & 1) != 0) & inside


def pages_with_bits(packed: np.ndarray, slots: int) -> np.ndarray:
    """The numbers of the pages of ``slots`` slots in which any bit is set, in order, int64."""
    if slots % 8 == 0:
        width = slots // 8
        whole = len(packed) // width * width
        found = np.flatnonzero(packed[:whole].reshape(-1, width).any(1))
        return np.append(found, whole // width) if packed[whole:].any() else found
    return np.unique(np.flatnonzero(np.unpackbits(packed, bitorder="little")) // slots)
