"""Damage is named, and a refusal of the system leaves the store whole. Kills and power cuts: test_store_crash.py."""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import sqlite3
import time

import numpy as np
import pytest
import torch
from store_support import PAGE, K, V, abandon, new, rows

from memkernels.store import MemoryStore, StoreDamaged, StoreError, StoreFull, _crc, _writer
from memkernels.store._database import ABSENT


def read_everything(path) -> None:
    """Open, read all by every way, verify; wrong answers fail, what is refused is a StoreError."""
    store = MemoryStore.open(path, mode="w")
    try:
        keys, values = rows(100)
        live = torch.tensor([i for i in range(100) if i not in (5, 8)])
        assert len(store) == 98 and store.generation == 4 and store.capacity == 100
        got = store.read(live)
        assert torch.equal(got[0], keys[live]) and torch.equal(got[1], values[live])
        assert [m["i"] for m in store.meta(live)] == live.tolist()
        assert store.topk_search(keys[:1], 100, where=("i >= ?", [50]))[1].ge(0).sum() == 50
        for dead in (5, 8):
            with pytest.raises(KeyError):
                store.read([dead])
        if faults := store.verify():
            raise StoreDamaged(str(faults[0]))
    finally:
        abandon(store)


@pytest.fixture(params=["closed", "killed"])
def sound(request, memory_path):
    """A store with pages, a log where it was not closed, metadata, an index on it, deleted slots and a snapshot."""
    path = memory_path / "sound"
    keys, values = rows(100)
    store = new(path)
    store.append(keys, values, [{"i": i} for i in range(100)])
    store.topk_search(keys[:1], 1, where=("i > 3", []))
    store.snapshot("first")
    store.delete([5, 8])
    store.write([9], values=torch.zeros(1, V))
    store.write([9], values=values[9:10])
    if request.param == "closed":
        store.close()
    shutil.copytree(path, memory_path / "copy")
    abandon(store)
    shutil.copytree(memory_path / "copy", memory_path / "s")
    read_everything(memory_path / "copy")
    return memory_path / "s"


DATA = ("keys.pages", "values.pages", "generation.mark", "index.db", "index.db-wal")


@pytest.mark.parametrize("name", DATA)
def test_no_flipped_bit_and_no_cut_gives_a_wrong_answer(sound, name):
    """Of a store that was closed every one is refused. Of one that was killed, those in index.db may lie where the log
    of SQLite has the page anew, and change nothing."""
    path = sound
    if not (path / name).exists():
        pytest.skip("a store that was closed has no log of SQLite")
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    draw, closed, size = random.Random(name), "index.db-wal" not in files, len(files[name])
    for turn in range(40):
        data = bytearray(files[name])
        if turn % 8 == 7:
            del data[draw.randrange(size) :]
        else:
            data[draw.randrange(size)] ^= 1 << draw.randrange(8)
        for file in path.iterdir():
            if file.is_file():
                file.unlink()
        for one, whole in files.items():
            (path / one).write_bytes(data if one == name else whole)
        try:
            read_everything(path)
            assert name == "index.db" and not closed, (turn, "was not noticed")
        except StoreError as error:
            assert name.removesuffix("-wal") in str(error) or "index.db" in str(error), error
            if name.endswith(".pages"):
                assert "page " in str(error)


def test_what_reads_find_verify_finds_too(memory_path):
    store = new(memory_path / "s", 100)
    store.close()
    data = bytearray((memory_path / "s" / "values.pages").read_bytes())
    data[3 * 4096 + 17] ^= 4
    (memory_path / "s" / "values.pages").write_bytes(data)
    with MemoryStore.open(memory_path / "s") as store:
        assert torch.equal(store.read([0])[1], rows(100)[1][:1])  # other pages are as they were
        for call in (
            lambda: store.gather([3 * PAGE]),
            lambda: store.softmax_read(torch.randn(1, K)),
            lambda: store.sparse_read(torch.tensor([[3 * PAGE + 1]]), torch.ones(1, 1)),
            lambda: store.prefetch([3 * PAGE]),
        ):
            with pytest.raises(StoreDamaged, match=r"values.pages: page 3 \(extent 3\): crc32c is"):
                call()
        (fault,) = store.verify()
        assert (fault.file, fault.page) == ("values.pages", 3) and "values.pages: page 3" in str(fault)
        store.topk_search(torch.randn(1, K), 3)  # needs no values


def test_the_checksum_is_crc32c_by_either_implementation():
    assert _crc.crc32c(b"123456789") == _crc.by_numpy(b"123456789") == 0xE3069283
    assert _crc.by_numpy(bytes(32)) == 0x8A9136AA and _crc.by_numpy(b"\xff" * 32) == 0x62A8AB43  # RFC 3720
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    for n in (0, 1, 63, 64, 127, 128, 1000, 4096, 5000):
        whole = _crc.by_numpy(data[:n])
        assert (
            whole == _crc.by_numpy(data[n // 3 : n], _crc.by_numpy(data[: n // 3])) == _crc.crc32c(data[:n].tobytes())
        )


# --- refusals of the system ---


class Refusal:
    """The call of that number to a function of ``os`` fails."""

    def __init__(self, monkeypatch, name: str, at: int, error: int):
        real, self.calls = getattr(os, name), 0

        def call(*args):
            self.calls += 1
            if self.calls == at:
                if name == "pwrite" and error == errno.ENOSPC:  # a part of it still went
                    real(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                raise OSError(error, os.strerror(error))
            return real(*args)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    "name, at, error",
    [
        ("pwrite", 1, errno.ENOSPC),
        ("pwrite", 5, errno.ENOSPC),
        ("pwrite", 3, errno.EIO),
        ("fdatasync", 1, errno.EIO),
        ("fdatasync", 2, errno.ENOSPC),
    ],
)
def test_a_refused_write_leaves_the_store_as_it_was(memory_path, monkeypatch, name, at, error):
    monkeypatch.setattr(_writer, "SMALL", 1000)
    keys, values = rows(100)
    store = new(memory_path / "s", 100)
    with monkeypatch.context() as patch:
        Refusal(patch, name, at, error)
        with pytest.raises(StoreFull if error == errno.ENOSPC else StoreError):
            store.write(torch.arange(100), *rows(100, seed=1), [{"a": 1}] * 100)
    assert store.generation == 1 and len(store) == 100
    assert torch.equal(store.read(torch.arange(100))[1], values) and store.meta([0]) == [{}]
    store.write(torch.arange(100), *rows(100, seed=2))  # without reopening
    store.append(*rows(50, seed=3))
    assert store.generation == 3 and torch.equal(store.gather(torch.arange(100)), rows(100, seed=2)[1])
    for column, file in store._engine.files.items():  # and no extent is lost
        parts = [*file.free, *(e for _, extents in file.waiting for e in extents.tolist())]
        table = store._engine.tables[column]["extent"]
        assert sorted([*parts, *table[table != ABSENT].tolist()]) == list(range(file.end))
    abandon(store)
    with MemoryStore.open(memory_path / "s", mode="w") as store:
        assert torch.equal(store.read(torch.arange(100))[0], rows(100, seed=2)[0]) and store.verify() == []
        assert torch.equal(keys, rows(100)[0])


def test_a_full_database_leaves_the_store_as_it_was(memory_path):
    store = new(memory_path / "s", 100)
    sql = store._engine.db.sql
    pages = sql.execute("PRAGMA page_count").fetchone()[0]
    sql.execute(f"PRAGMA max_page_count={pages + 3}")
    for many in (100, 60_000):  # by way of the log, and of pages
        with pytest.raises(StoreFull, match="index.db: no room"):
            store.append(*rows(many), [{"text": "x" * 300}] * many)
        assert len(store) == 100 and store.generation == 1 and store.capacity == 100
    with pytest.raises(StoreError, match="transaction: a call in it failed"), store.transaction():
        store.write([0], values=torch.ones(1, V))
        with pytest.raises(StoreFull):
            store.append(*rows(100), [{"text": "x" * 300}] * 100)
    assert len(store) == 100 and store.generation == 1 and torch.equal(store.gather([0]), rows(100)[1][:1])
    sql.execute("PRAGMA max_page_count=1000000")
    assert store.append(*rows(100, seed=1)).tolist() == list(range(100, 200))
    abandon(store)
    with MemoryStore.open(memory_path / "s") as store:
        assert len(store) == 200 and torch.equal(store.gather(torch.arange(100, 200)), rows(100, seed=1)[1])


def test_the_limit_of_file_sizes_is_a_full_disk(memory_path):
    """A real refusal: the kernel's, in the middle of a page."""
    import resource

    store = new(memory_path / "s", 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 4096 + 100 + (1 << 18), hard))
        with pytest.raises(StoreFull, match="no room"):
            store.append(*rows(60_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(store) == 100 and store.append(*rows(60_000)).numel() == 60_000
    store.close()
    with MemoryStore.open(memory_path / "s") as store:
        assert store.verify() == [] and len(store) == 60_100


def test_pages_are_durable_before_a_table_names_them(memory_path, monkeypatch):
    """The order of what reaches the system: every page, a sync of each file, then the commit of the database."""
    monkeypatch.setattr(_writer, "SMALL", 1000)
    store = new(memory_path / "s", 100)
    store.write([0], *rows(1))
    files, told = {store._engine.files[name].fd: name for name in ("keys", "values")}, []
    for name in ("pwrite", "fdatasync"):

        def call(fd, *args, name, real):
            told.append((name, files.get(fd)))
            return real(fd, *args)

        monkeypatch.setattr(os, name, functools.partial(call, name=name, real=getattr(os, name)))
    store._engine.db.sql.set_trace_callback(lambda text: told.append((text, None)) if text == "COMMIT" else None)
    for work in (lambda: store.write(torch.arange(100), *rows(100, seed=1)), lambda: store._engine.fold(10)):
        store.write([1], *rows(1))  # something to fold
        told.clear()
        work()
        commit = told.index(("COMMIT", None))
        for column in ("keys", "values"):
            written = [i for i, one in enumerate(told) if one == ("pwrite", column)]
            assert written and max(written) < told.index(("fdatasync", column)) < commit
    store.close()


def test_an_old_row_of_the_log_does_not_hide_a_newer_page(memory_path, monkeypatch):
    """A commit in the log waits for one of its pages, while another was rewritten by a large commit after it."""
    monkeypatch.setattr(_writer, "SMALL", 1000)
    store = new(memory_path / "s", 3 * PAGE)
    store._engine.fold_all()
    store.write([0, 2 * PAGE], values=torch.ones(2, V))
    keys, values = rows(2 * PAGE, seed=1)
    store.write(torch.arange(2 * PAGE), keys, values)
    assert store._engine.tables["values"]["generation"][:3].tolist() == [3, 3, 1]
    abandon(store)
    with MemoryStore.open(memory_path / "s") as store:
        assert (
            torch.equal(store.gather(torch.arange(2 * PAGE)), values) and store.gather(2 * PAGE).tolist() == [1.0] * V
        )


def test_an_old_row_of_the_log_does_not_bring_a_deleted_slot_back(memory_path, monkeypatch):
    """Its slot was deleted by a large commit, which is in the bitmaps and not in the log."""
    monkeypatch.setattr(_writer, "SMALL", 1000)
    store = new(memory_path / "s", 2 * PAGE)
    slots = store.append(*rows(3, seed=1))
    with store.transaction():
        store.write(torch.arange(2 * PAGE), *rows(2 * PAGE, seed=2))
        store.delete(slots[:1])
    abandon(store)
    with MemoryStore.open(memory_path / "s") as store:
        assert len(store) == 2 * PAGE + 2 and torch.equal(store.gather(slots[1:]), rows(3, seed=1)[1][1:])
        with pytest.raises(KeyError):
            store.gather(slots)


def test_the_log_is_folded_in_the_background_and_under_pressure(memory_path, monkeypatch):
    monkeypatch.setattr(_writer, "FOLD_COMMITS", 5)
    with new(memory_path / "s", 100) as store:
        for step in range(60):
            store.write([step], values=torch.full((1, V), float(step)))
            assert len(store._engine.log_sizes) <= _writer.PRESSURE * 5 + 1
        deadline = time.monotonic() + 20
        while store._engine.log_sizes and time.monotonic() < deadline:
            time.sleep(0.01)
            if store._engine.folder is None or not store._engine.folder.is_alive():
                break
        rows_in_log = store._engine.db.execute("SELECT count(*) FROM log").fetchone()[0]
        assert rows_in_log == len(store._engine.log_sizes) <= 6
        assert store.gather(torch.arange(60))[:, 0].tolist() == [float(i) for i in range(60)]


def test_space_is_used_again(memory_path):
    """Overwrites do not grow the files beyond what lives, and what a reader may still need."""
    with new(memory_path / "s", 400) as store:
        for step in range(150):
            store.write(torch.randint(0, 400, (20,)), values=torch.randn(20, V))
            if step % 3 == 0:
                store._engine.fold_all()
        live = -(-400 // PAGE) * 4096
        assert (memory_path / "s" / "values.pages").stat().st_size <= 2 * live + 4096
        assert (memory_path / "s" / "keys.pages").stat().st_size == live
        store.compact()
        assert (memory_path / "s" / "values.pages").stat().st_size <= 1.3 * live
        assert store.verify() == []


def test_batch_durability_uses_no_extent_again_that_a_power_cut_may_need(memory_path, monkeypatch):
    """After a power cut the database is that of its last sync, and pages are those of now."""
    monkeypatch.setattr(_writer, "SMALL", 100)
    new(memory_path / "s", 4 * PAGE).close()
    store, everything = MemoryStore.open(memory_path / "s", mode="w", durability="batch"), torch.arange(4 * PAGE)
    synced, real = {}, store._engine.db.checkpoint

    def sync() -> bool:
        done = real()
        for name in ("index.db", "index.db-wal"):
            synced[name] = (memory_path / "s" / name).read_bytes()
        return done

    sync()
    monkeypatch.setattr(store._engine.db, "checkpoint", sync)
    for step in range(1, 6):
        store.write(everything, *(torch.full((4 * PAGE, dim), float(step)) for dim in (K, V)))
        shutil.copytree(memory_path / "s", memory_path / f"cut{step}", ignore=shutil.ignore_patterns("readers"))
        (memory_path / f"cut{step}" / "readers").mkdir()
        for name, data in synced.items():
            (memory_path / f"cut{step}" / name).write_bytes(data)
        with MemoryStore.open(memory_path / f"cut{step}") as cut:
            keys, values = cut.read(everything)
            if step > 1:
                assert keys.unique().tolist() == values.unique().tolist() == [step - 1.0]
            assert cut.verify() == []
    monkeypatch.setattr(store._engine.db, "checkpoint", lambda: False)  # readers are in the way
    table = store._engine.tables["keys"]["extent"][:4].tolist()
    before = [(memory_path / "s" / "keys.pages").read_bytes()[e * 4096 : (e + 1) * 4096] for e in table]
    for step in range(6, 10):
        store.write(everything, *rows(4 * PAGE, seed=step))
    assert before == [(memory_path / "s" / "keys.pages").read_bytes()[e * 4096 : (e + 1) * 4096] for e in table]
    monkeypatch.undo()
    store.close()


def test_batch_durability_is_asked_for_by_name(memory_path):
    new(memory_path / "s", 5).close()
    with pytest.raises(ValueError, match="durability must be 'commit' or 'batch'"):
        MemoryStore.open(memory_path / "s", mode="w", durability="none")
    for durability, synchronous in (("commit", 2), ("batch", 1)):
        store = MemoryStore.open(memory_path / "s", mode="w", durability=durability)
        assert store._engine.db.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        store.write([0], values=torch.ones(1, V))
        store.close()


def test_a_newer_format_says_so(memory_path):
    store = new(memory_path / "s", 5)
    state = {**store._engine.state, "format": 2}
    store._engine.db.put_state(state)
    abandon(store)
    with pytest.raises(StoreError, match="is of format 2, this memkernels reads up to 1; update it"):
        MemoryStore.open(memory_path / "s")


def test_sqlite_errors_are_the_stores(memory_path):
    store = new(memory_path / "s", 5)
    assert not isinstance(StoreError("x"), sqlite3.Error)
    abandon(store)
    (memory_path / "s" / "index.db-wal").unlink(missing_ok=True)
    (memory_path / "s" / "index.db").write_bytes(b"not a database, whatever its name says" * 500)
    with pytest.raises(StoreDamaged, match="index.db"):
        MemoryStore.open(memory_path / "s")
