"""Readers beside a writer: one generation per call, never an earlier one, and no page used again under them."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from crash import judge
from store_support import PAGE, K, V, abandon, new, rows, two_pages

from memkernels.store import (
    MemoryStore,
    StoreDamaged,
    StoreError,
    StoreFormat,
    _database,
    _engine,
    _extents,
    _io,
    _writer,
)

SLOTS = 10 * PAGE
PATIENCE = 60  # seconds


def forked(work) -> int:
    """A process that runs ``work`` on one thread; its exit status is 0 where that ends well."""

    def alone() -> None:
        torch.set_num_threads(1)
        work()

    return judge.forked(alone)


def wait_for(children: list[int]) -> list[int]:
    return [judge.status_of(child) for child in children]


def rewrite(store: MemoryStore, step: int) -> None:
    """One commit that changes every slot."""
    store.write(torch.arange(SLOTS), torch.full((SLOTS, K), float(step)), torch.full((SLOTS, V), float(step)))


def follow(path, seconds: float, enough: int) -> None:
    """Whole reads, each of one step, no earlier than the last: for so long, and on until so many steps were seen.

    A machine may keep the writer waiting for longer than any reader looks, so that no number of steps is sure to come
    within a time.
    """
    seen, last = 0, -1.0
    begun = time.monotonic()
    with MemoryStore.open(path, ram_bytes=3 * two_pages() // 2) as store:
        while (waited := time.monotonic() - begun) < seconds or seen < enough:
            assert waited < PATIENCE, f"{seen} steps in {waited:.0f} s"
            keys, values = store.read(torch.arange(SLOTS))
            read = store.softmax_read(torch.ones(1, K))
            step = float(keys[0, 0])
            assert bool((keys == step).all()) and bool((values == step).all()), "a mixture"
            assert step >= last and float(read[0, 0]) >= step - 1e-3, "went back"
            seen, last = seen + (step > last), step


def test_readers_see_whole_commits_in_their_order(memory_path, monkeypatch):
    """By way of the log, of pages, and of folds of the log into pages."""
    monkeypatch.setattr(_writer, "SMALL", 20_000)
    path = memory_path / "s"
    store = new(path, page_slots=PAGE)
    store.append(torch.zeros(SLOTS, K), torch.zeros(SLOTS, V))
    store.close()

    def write() -> None:
        end, step = time.monotonic() + PATIENCE, 0
        with MemoryStore.open(path, mode="w") as store:
            while not (memory_path / "followed").exists() and time.monotonic() < end:
                step += 1
                _writer.SMALL = 20_000 if step % 2 else 1_000
                rewrite(store, step)
                if step % 4 == 1:
                    store._engine.fold(3)

    writer, readers = forked(write), [forked(lambda: follow(path, seconds=1.5, enough=4)) for _ in range(3)]
    ends = wait_for(readers)
    (memory_path / "followed").touch()
    assert [*wait_for([writer]), *ends] == [0] * 4
    with MemoryStore.open(path, mode="w") as store:
        assert store.verify() == [] and not list((path / "readers").iterdir())
        assert (path / "keys.pages").stat().st_size <= 4096 * 10 * 20  # not one place for each commit


def test_no_extent_is_used_again_while_a_reader_may_need_it(memory_path, monkeypatch):
    monkeypatch.setattr(_writer, "SMALL", 100)
    path = memory_path / "s"
    store = new(path)
    store.append(torch.zeros(SLOTS, K), torch.zeros(SLOTS, V))
    reader = MemoryStore.open(path)
    table = reader._engine.tables["keys"]["extent"][:10].copy()
    before = (path / "keys.pages").read_bytes()[: 10 * 4096]
    for step in range(1, 6):
        rewrite(store, step)
    assert (path / "keys.pages").read_bytes()[: 10 * 4096] == before  # what the reader's table names
    assert reader.read(torch.arange(SLOTS))[0].unique().tolist() == [5.0]  # it sees the last, and lets the rest go
    assert set(reader._engine.tables["keys"]["extent"][:10]).isdisjoint(table)
    size = (path / "keys.pages").stat().st_size
    for step in range(6, 12):
        rewrite(store, step)
        reader.gather(0)
    assert (path / "keys.pages").stat().st_size == size
    abandon(reader)
    store.close()


def test_a_reader_whose_page_was_rewritten_reads_the_table_again(memory_path, monkeypatch):
    """As after a pin that was lost: the checksum tells, and the call begins again."""
    monkeypatch.setattr(_writer, "SMALL", 100)
    path = memory_path / "s"
    store = new(path)
    store.append(torch.zeros(SLOTS, K), torch.zeros(SLOTS, V))
    reader = MemoryStore.open(path)
    monkeypatch.setattr(_extents, "oldest_pin", lambda directory, none: none)
    monkeypatch.setattr(type(store._engine), "oldest", lambda self: 1 << 62)
    engine = reader._engine
    version = engine.db.data_version()
    for step in range(1, 4):
        rewrite(store, step)
    engine.seen = engine.db.data_version()  # it does not know that anything changed
    assert engine.seen != version
    assert reader.read(torch.arange(SLOTS))[0].unique().tolist() == [3.0]
    reader.close()
    store.close()


def test_pins_of_dead_readers_hold_nothing(memory_path):
    path = memory_path / "s"
    new(path, 5).close()

    def die() -> None:
        MemoryStore.open(path)
        os._exit(0)  # without a close

    assert wait_for([forked(die)]) == [0]
    assert len(list((path / "readers").iterdir())) == 1
    with MemoryStore.open(path, mode="w") as store:
        with MemoryStore.open(path) as living:
            assert store._engine.oldest() == living._engine.version
        assert store._engine.oldest() == 1 << 62 and not list((path / "readers").iterdir())


def test_a_reader_follows_deletions_compaction_and_new_numbers(memory_path):
    path = memory_path / "s"
    store = new(path, 60)
    reader = MemoryStore.open(path)
    store.delete(list(range(20, 60)))
    assert len(reader) == 20
    store.compact()
    assert reader.capacity == 20 and len(reader) == 20
    with pytest.raises(IndexError):
        reader.read(20)
    slots = store.append(*rows(30, seed=1))
    assert slots.tolist() == list(range(20, 50)) and torch.equal(reader.gather(slots), rows(30, seed=1)[1])
    store.delete([0])
    store.compact()
    assert store.append(*rows(1, seed=2)).tolist() == [0] and torch.equal(reader.gather([0]), rows(1, seed=2)[1])
    assert torch.equal(reader.read(slots)[0], rows(30, seed=1)[0]) and reader.verify() == []
    reader.close()
    store.close()


def test_a_reader_of_a_store_that_became_empty(memory_path):
    store = new(memory_path / "s", 60)
    store.delete(list(range(60)))
    store.compact()
    for _ in range(2):
        with MemoryStore.open(memory_path / "s") as reader:
            assert len(reader) == reader.capacity == 0 and reader.verify() == []
        store.append(*rows(3))
        store.delete([0, 1, 2])
        store.compact()
    store.close()


def test_a_table_may_have_blocks_ahead(memory_path, monkeypatch):
    """A writer's table grows by a quarter at a time."""
    for module in (_database, _engine, _writer):
        monkeypatch.setattr(module, "BLOCK", 2, raising=False)
    store = new(memory_path / "s")
    for seed in range(30):
        store.append(*rows(PAGE, seed))
        store._engine.fold_all()
    assert store._engine.state["table_blocks"] > -(-30 // 2)
    with MemoryStore.open(memory_path / "s") as reader:
        assert torch.equal(reader.gather(range(29 * PAGE, 30 * PAGE)), rows(PAGE, 29)[1]) and reader.verify() == []
    store.close()


def test_a_snapshot_is_read_while_it_is_dropped(memory_path, monkeypatch):
    monkeypatch.setattr(_writer, "SMALL", 100)
    path = memory_path / "s"
    store = new(path)
    store.append(torch.zeros(SLOTS, K), torch.zeros(SLOTS, V))
    store.snapshot("old")
    reader = MemoryStore.open(path, snapshot="old", ram_bytes=two_pages())
    store.drop_snapshot("old")
    for step in range(1, 6):
        rewrite(store, step)
    assert not reader.read(torch.arange(SLOTS))[0].any() and len(reader) == SLOTS
    reader.close()
    size = (path / "keys.pages").stat().st_size
    for step in range(6, 12):
        rewrite(store, step)
    assert (path / "keys.pages").stat().st_size == size
    store.close()


def test_a_lost_end_of_the_log_is_damage(memory_path):
    store = new(memory_path / "s", 5)
    store.write([0], values=torch.ones(1, V))
    shutil.copytree(memory_path / "s", memory_path / "copy")
    store.close()
    (memory_path / "copy" / "index.db-wal").write_bytes(b"")
    with pytest.raises(StoreDamaged, match="ends at generation 0, and generation 2 was acknowledged"):
        MemoryStore.open(memory_path / "copy")


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(memory_path, monkeypatch, kind):
    mounts = f"30 1 0:1 / / rw - ext4 /dev/a rw\n31 30 0:2 / {memory_path}/far\\040away rw - {kind} host:/x rw\n"
    there = memory_path / "far away"
    assert _io.filesystem(memory_path, mounts) == "ext4" and _io.filesystem(there / "s", mounts) == kind
    real = _io.filesystem
    monkeypatch.setattr(_io, "filesystem", lambda path: real(path, mounts))
    there.mkdir()
    with pytest.raises(StoreFormat, match=f"is on {kind}, a network file system"):
        MemoryStore.create(there / "s", K, V)
    monkeypatch.setattr(_io, "filesystem", real)
    new(there / "s").close()
    monkeypatch.setattr(_io, "filesystem", lambda path: real(path, mounts))
    with pytest.raises(StoreError, match="use a local disk"):
        MemoryStore.open(there / "s")
