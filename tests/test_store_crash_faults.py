"""What the crash laboratory found, each fault as a test of its own."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3

import pytest
import torch
from store_support import PAGE, K, V, abandon, new, rows

from memkernels.store import MemoryStore, StoreDamaged, StoreError, _io, _mark, _writer

EVERYTHING = torch.arange(4 * PAGE)


def refuse(patch, name: str, when=lambda *args: True) -> None:
    """A function of ``os`` fails where ``when`` says so."""
    real = getattr(os, name)

    def call(*args):
        if when(*args):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    patch.setattr(os, name, call)


def test_a_dropped_snapshot_keeps_its_pages_until_the_drop_is_durable(memory_path, monkeypatch):
    """With durability="batch" a power cut may take the drop back; index.db is then that of its last sync."""
    monkeypatch.setattr(_writer, "SMALL", 600)
    new(memory_path / "s", 4 * PAGE).close()
    store, synced = MemoryStore.open(memory_path / "s", mode="w", durability="batch"), {}
    real = store._engine.db.checkpoint

    def sync() -> bool:
        done = real()
        for name in ("index.db", "index.db-wal"):
            synced[name] = (memory_path / "s" / name).read_bytes()
        return done

    monkeypatch.setattr(store._engine.db, "checkpoint", sync)
    store.snapshot("old")
    store.write(EVERYTHING, *rows(4 * PAGE, seed=1))  # the pages of the snapshot are its own from here on
    store.write([0], *rows(1, seed=2))
    store.drop_snapshot("old")
    store.write(EVERYTHING, *rows(4 * PAGE, seed=3))
    shutil.copytree(memory_path / "s", memory_path / "cut")
    for name, data in synced.items():
        (memory_path / "cut" / name).write_bytes(data)
    store.close()
    with MemoryStore.open(memory_path / "cut") as cut:
        assert cut.verify() == []
    if cut_has_snapshot(memory_path / "cut"):
        with MemoryStore.open(memory_path / "cut", snapshot="old") as old:
            assert torch.equal(old.read(EVERYTHING)[1], rows(4 * PAGE)[1])


def cut_has_snapshot(path) -> bool:
    with MemoryStore.open(path) as store:
        return store.snapshots() == ["old"]


def test_a_commit_whose_mark_is_refused_is_acknowledged(memory_path, monkeypatch):
    store = new(memory_path / "s", 5)
    with monkeypatch.context() as patch:
        refuse(patch, "pwrite", lambda fd, *_: fd == store._engine.mark_fd)
        store.write([0], values=torch.ones(1, V))
    assert store.generation == 2
    abandon(store)
    with MemoryStore.open(memory_path / "s") as store:
        assert store.generation == 2 and store.gather(0).tolist() == [1.0] * V


def test_a_refused_close_is_an_error_of_the_store_and_loses_nothing(memory_path, monkeypatch):
    store = new(memory_path / "s", 100)
    store.write([0], values=torch.ones(1, V))

    def refused(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(_mark, "file_crc", refused)
        with pytest.raises(StoreError, match="generation.mark: the system refused"):
            store.close()
    with MemoryStore.open(memory_path / "s", mode="w") as store:
        assert store.generation == 2 and store.gather(0).tolist() == [1.0] * V and store.verify() == []


def test_a_backup_whose_last_sync_is_refused_is_not_there(memory_path, monkeypatch):
    real, folders = _io.sync_directory, []

    def sync(path) -> None:
        folders.append(path)
        if path == memory_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    with new(memory_path / "s", 5) as store:
        monkeypatch.setattr(_io, "sync_directory", sync)
        with pytest.raises(StoreError, match="the system refused"):
            store.backup(memory_path / "copy")
        assert folders[-1] == memory_path and [path.name for path in memory_path.iterdir()] == ["s"]


def test_a_refused_read_is_an_error_of_the_store(memory_path, monkeypatch):
    new(memory_path / "s", 100).close()
    with MemoryStore.open(memory_path / "s") as store:
        with monkeypatch.context() as patch:
            refuse(patch, "preadv")
            for call in (
                lambda: store.read([0]),
                lambda: store.softmax_read(torch.ones(1, K)),
                lambda: store.gather(0),
            ):
                with pytest.raises(StoreError, match=r"\.pages: extent \d: the system refused to read \(Input"):
                    call()
            assert "refused to read" in str(store.verify()[0])
        assert torch.equal(store.read(torch.arange(100))[1], rows(100)[1]) and store.verify() == []


def damaged(path, old: bytes, new: bytes) -> None:
    """Of a store that was killed after a checkpoint."""
    data = (path / "index.db").read_bytes()
    assert data.count(old) == 1
    (path / "index.db").write_bytes(data.replace(old, new))


def test_a_name_of_a_snapshot_that_changed_is_damage(memory_path):
    store = new(memory_path / "s", 5)
    store.snapshot("monday")
    store._engine.db.checkpoint()
    shutil.copytree(memory_path / "s", memory_path / "killed")
    store.close()
    damaged(memory_path / "killed", b"monday{", b"sunday{")
    with MemoryStore.open(memory_path / "killed") as store:
        with pytest.raises(StoreDamaged, match="index.db: snapshots, 'sunday': crc32c is wrong"):
            store.snapshots()
        assert store.verify() != []


@pytest.mark.parametrize(
    "old, changed", [(b"meta(slot INTEGER PRIMARY", b"meta(slot INTEGER PRI\rARY"), (b"'$.i'", b"'$.k'")]
)
def test_a_changed_text_of_a_table_is_damage(memory_path, old, changed):
    store = new(memory_path / "s")
    store.append(*rows(5), [{"i": i} for i in range(5)])
    store.topk_search(rows(1)[0], 1, where=("i = ?", [2]))  # makes an index
    store._engine.db.checkpoint()
    shutil.copytree(memory_path / "s", memory_path / "killed")
    store.close()
    damaged(memory_path / "killed", old, changed)
    with pytest.raises(StoreDamaged, match="index.db: schema, meta"):
        MemoryStore.open(memory_path / "killed")


def test_a_row_that_a_tree_hides_is_damage(memory_path):
    """A leaf of the table of documents counts one row less: the last document is as if it were not there."""
    store = new(memory_path / "s")
    store.append(*rows(5), [{"i": i} for i in range(5)])
    root = store._engine.db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'meta'").fetchone()[0]
    store._engine.db.checkpoint()
    shutil.copytree(memory_path / "s", memory_path / "killed")
    store.close()
    data, at = bytearray((memory_path / "killed" / "index.db").read_bytes()), (root - 1) * 4096
    assert data[at] == 13 and data[at + 4] == 5  # a leaf, its rows
    data[at + 4] = 4
    (memory_path / "killed" / "index.db").write_bytes(data)
    with MemoryStore.open(memory_path / "killed") as store:
        assert store.meta([3]) == [{"i": 3}]
        with pytest.raises(StoreDamaged, match="index.db: is damaged"):
            store.meta([4])
        assert store.verify() != []
    with pytest.raises(StoreDamaged, match="index.db: is damaged"):
        MemoryStore.open(memory_path / "killed", mode="w")


def test_what_a_killed_writer_left_in_the_log_is_durable_before_its_space_is_used(memory_path, monkeypatch):
    """A writer with durability="batch" was killed: the next one syncs its log before it writes pages."""
    monkeypatch.setattr(_writer, "SMALL", 100)
    new(memory_path / "s", 4 * PAGE).close()
    store = MemoryStore.open(memory_path / "s", mode="w", durability="batch")
    store.write(EVERYTHING, *rows(4 * PAGE, seed=1))
    shutil.copytree(memory_path / "s", memory_path / "killed", ignore=shutil.ignore_patterns("index.db-shm"))
    abandon(store)
    calls = []

    def told(name: str):
        real = getattr(os, name)

        def call(fd, *args):
            calls.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
            return real(fd, *args)

        return call

    for name in ("pwrite", "fdatasync"):
        monkeypatch.setattr(os, name, told(name))
    with MemoryStore.open(memory_path / "killed", mode="w") as store:
        store.write(EVERYTHING, *rows(4 * PAGE, seed=2))
    assert calls.index(("fdatasync", "index.db-wal")) < calls.index(("pwrite", "keys.pages"))


@pytest.mark.parametrize("snapshot", [None, "kept"])
def test_a_row_with_a_changed_number_is_damage(memory_path, snapshot):
    """The row of slot 2 goes by 3, which stands in order, and says so by its checksum alone."""
    store = new(memory_path / "s")
    store.append(*rows(6), [{"i": i} for i in range(6)])
    store.delete([3])
    store.snapshot("kept")
    store._engine.db.execute("UPDATE meta SET slot = 3 WHERE slot = 2")
    store._engine.db.execute("UPDATE snapshot_meta SET slot = 3 WHERE slot = 2")
    with MemoryStore.open(memory_path / "s", snapshot=snapshot) as reader:
        assert reader.meta([1]) == [{"i": 1}]
        with pytest.raises(StoreDamaged, match="meta, slot 3: crc32c is wrong"):
            reader.meta([2])
        assert reader.verify() != []
    abandon(store)


def test_a_row_of_another_snapshot_is_damage(memory_path):
    store = new(memory_path / "s")
    store.append(*rows(6), [{"i": i} for i in range(6)])
    store.snapshot("kept")
    store._engine.db.execute("UPDATE snapshot_meta SET snapshot = 0 WHERE slot = 0")
    with MemoryStore.open(memory_path / "s", snapshot="kept") as reader:
        with pytest.raises(StoreDamaged, match="snapshot_meta, slot 0: is of no snapshot"):
            reader.meta([0])
        assert "is of no snapshot" in str(reader.verify()[0])
    abandon(store)


def test_a_database_that_opened_to_read_is_no_writer(memory_path, monkeypatch):
    """SQLite falls back to reading where the system refuses to open index.db for writing."""
    new(memory_path / "s", 5).close()
    real = sqlite3.connect

    def connect(database, **options):
        return real(str(database).replace("mode=rw", "mode=ro"), **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(StoreError, match="the system refused to read or write .*readonly"):
        MemoryStore.open(memory_path / "s", mode="w")
    monkeypatch.undo()
    with MemoryStore.open(memory_path / "s", mode="w") as store:
        assert store.append(*rows(1)).tolist() == [5]
