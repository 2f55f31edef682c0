"""Bitmaps that are loaded in one go are those that are loaded block by block, and their damage is found."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
import torch

from memkernels.store import MemoryStore, StoreDamaged, _bitmap, _crc
from memkernels.store._database import MAP_BLOCK

BLOCKS = 7


def test_checksums_of_rows_are_those_of_each():
    rows = np.random.default_rng(0).integers(0, 256, (300, 17)).astype(np.uint8)
    assert _crc.of_rows(rows).tolist() == [_crc.by_numpy(row.tobytes()) for row in rows]
    assert _crc.of_rows(np.frombuffer(b"123456789", np.uint8)[None]).tolist() == [0xE3069283]
    assert len(_crc.of_rows(np.zeros((0, 17), np.uint8))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_one_byte_load_as_each_would(seed):
    random = np.random.default_rng(seed)
    blocks = random.permutation(BLOCKS)[: random.integers(0, BLOCKS + 1)]
    alike = random.choice([0, 255, 1, 0x55], len(blocks)).astype(np.uint8)
    one, each = _bitmap.Bitmap(), _bitmap.Bitmap()
    one.load_alike(blocks, alike)
    for block, value in zip(blocks.tolist(), alike.tolist()):
        each.load_block(block, bytes([value]))
    assert one.count == each.count and np.array_equal(one.bytes, each.bytes)


@pytest.fixture
def path(memory_path):
    """Blocks that are all live, all dead, mixed, and the last one short."""
    with MemoryStore.create(memory_path, 1, 1) as store:
        count = 5 * MAP_BLOCK + 100
        store.append(torch.zeros(count, 1), torch.zeros(count, 1))
        store.delete(torch.arange(MAP_BLOCK, 2 * MAP_BLOCK))
        store.delete(torch.arange(3 * MAP_BLOCK + 5, 3 * MAP_BLOCK + 9))
        store.snapshot("now")
    return memory_path


@pytest.mark.parametrize("snapshot", [None, "now"])
def test_a_store_opens_with_what_it_had(path, snapshot):
    with MemoryStore.open(path, snapshot=snapshot) as store:
        live = torch.ones(store.capacity, dtype=torch.bool)
        live[MAP_BLOCK : 2 * MAP_BLOCK] = False
        live[3 * MAP_BLOCK + 5 : 3 * MAP_BLOCK + 9] = False
        got = np.unpackbits(store._engine.maps["live"].bytes, bitorder="little")
        assert np.array_equal(got[: len(live)], live.numpy()) and not got[len(live) :].any()
        assert len(store) == int(live.sum())


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE maps SET blob = x'FE' WHERE id = 0",
        "UPDATE maps SET blob = x'FF' WHERE id = 1",
        "UPDATE maps SET crc = crc + (1 << 32) WHERE id = 2",
        "UPDATE maps SET crc = -crc WHERE id = 2",
        "UPDATE maps SET version = version + 1 WHERE id = 2",
        "UPDATE maps SET version = 'x' WHERE id = 2",
        "UPDATE maps SET crc = 'x' WHERE id = 2",
        "UPDATE maps SET blob = 'x' WHERE id = 2",
        "UPDATE maps SET blob = x'' WHERE id = 2",
        "UPDATE maps SET blob = x'FFFF' WHERE id = 2",
        "UPDATE maps SET blob = zeroblob(8192) WHERE id = 3",
        "UPDATE maps SET id = 77 WHERE id = 2",
        "DELETE FROM maps WHERE id = 2",
    ],
)
def test_a_damaged_block_is_refused(path, damage):
    sql = sqlite3.connect(path / "index.db")
    sql.execute(damage)
    assert sql.total_changes == 1
    sql.commit()
    sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sql.close()
    (path / "generation.mark").unlink()  # which would find it first
    with pytest.raises(StoreDamaged, match="maps"):
        MemoryStore.open(path)
