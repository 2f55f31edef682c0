"""One copy of a table for several processes: who fills it, who writes it, who removes it, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from support import ROOT
from table_support import N, V, decoded, new, numbers, picked, some
from test_store_processes import forked, wait_for

from memkernels.store import RowTable, StoreError, StoreFormat, StoreFull, _table_open, _table_shared


@pytest.fixture
def path(memory_path, monkeypatch):
    """A table, and a folder of its own for the copies of it."""
    (memory_path / "shm").mkdir()
    monkeypatch.setattr(_table_shared, "FOLDER", memory_path / "shm")
    new(memory_path / "t", "float32").close()
    return memory_path / "t"


def copies(path) -> list[str]:
    return sorted(p.name for p in (path.parent / "shm").iterdir())


def shared(path, **options) -> RowTable:
    return RowTable.open(path, tier="shared", **options)


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_processes_share_one_copy_and_the_last_removes_it(path, monkeypatch):
    table = shared(path)
    assert len(copies(path)) == 2
    inside = table._copy.file().stat()
    assert inside.st_blocks * 512 >= N * V * 4

    def read() -> None:
        monkeypatch.setattr(_table_open._table_file, "load", None)  # nothing is read from the disk again
        with shared(path) as other:
            assert other._copy.file().stat().st_ino == inside.st_ino
            assert torch.equal(other.gather(some(50)), picked(decoded(path, "float32"), some(50)))
            assert torch.equal(other.prefetch(some(50)).wait(), other.gather(some(50)))

    assert wait_for([forked(read) for _ in range(4)]) == [0] * 4
    assert len(copies(path)) == 2
    table.close()
    assert copies(path) == []


def test_updates_of_one_process_are_those_of_all_and_are_written(path):
    table = shared(path)
    ones, twos = torch.ones(1, V), torch.full((1, V), 2.0)

    def write() -> None:
        with shared(path) as other:
            other.update([5], ones)

    assert wait_for([forked(write)]) == [0]
    assert torch.equal(table.gather([5]), ones)  # without a close here
    with RowTable.open(path) as written:
        assert torch.equal(written.gather([5]), ones)
    with shared(path) as third:  # the file is another one now, and the copy the same
        assert torch.equal(third.gather([5]), ones) and len(copies(path)) == 2
        table.update([6], twos)
        assert torch.equal(third.gather([6]), twos)
        third.update([7], ones)
        table.close()
    with RowTable.open(path) as written:
        assert written.verify() == [] and torch.equal(written.gather([5, 6, 7]), torch.cat([ones, twos, ones]))
        others = [i for i in range(N) if i not in (5, 6, 7)]
        assert torch.equal(written.gather(others), numbers()[others])
    assert copies(path) == []


def test_many_processes_update_at_once(path):
    """Each slot belongs to one of them: none is lost, whoever closes when."""

    def work(me: int) -> None:
        for turn in range(4):
            with shared(path) as table:
                mine = torch.arange(me, N, 4)
                table.update(mine, torch.full((len(mine), V), float(10 * me + turn)))
                assert bool((table.gather(mine) == 10 * me + turn).all())

    assert wait_for([forked(lambda me=me: work(me)) for me in range(4)]) == [0] * 4
    with RowTable.open(path) as table:
        assert table.verify() == []
        for me in range(4):
            assert table.gather(torch.arange(me, N, 4)).unique().tolist() == [10.0 * me + 3]
    assert copies(path) == []


def test_a_reader_that_is_killed_frees_its_hold(path):
    table = shared(path)

    def read() -> None:
        table = shared(path)
        table.gather([1])
        (path.parent / "ready").touch()
        time.sleep(60)

    child = forked(read)
    until((path.parent / "ready").exists)
    os.kill(child, signal.SIGKILL)
    assert wait_for([child]) == [-signal.SIGKILL]
    assert torch.equal(table.gather([1]), numbers()[[1]])
    table.close()
    assert copies(path) == []


@pytest.mark.parametrize("where", ["part of it", "all of it"])
def test_a_creator_that_is_killed_while_it_fills_is_followed_by_another(path, monkeypatch, where):
    load = _table_open._table_file.load

    def slow(file, fd, head, sums, part, into, begin=0):
        if where == "all of it":
            load(file, fd, head, sums, part, into, begin)
        into[:100] = 99
        (path.parent / "filling").touch()
        time.sleep(60)

    def fill() -> None:
        monkeypatch.setattr(_table_open._table_file, "load", slow)
        shared(path)

    child = forked(fill)
    until((path.parent / "filling").exists)
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(shared(path)))
    waiting.start()
    time.sleep(0.2)
    assert not found  # it waits for the one that fills
    os.kill(child, signal.SIGKILL)
    wait_for([child])
    waiting.join(20)
    with found[0] as table:
        assert torch.equal(table.gather(torch.arange(N)), numbers())
    assert copies(path) == []


def test_a_copy_that_all_users_left_by_a_kill_is_filled_again(path):
    def die() -> None:
        table = shared(path)
        table.update([3], torch.ones(1, V))
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait_for([forked(die)]) == [-signal.SIGKILL]
    assert len(copies(path)) == 2
    with shared(path) as table:
        assert torch.equal(table.gather([3]), numbers()[[3]])  # what was never closed was never written
    assert copies(path) == []


def test_a_copy_of_zeros_that_was_left_is_zeros_again(path):
    """Of a file without blocks nothing is read."""
    RowTable.create(path.parent / "z", N, V, dtype=torch.float32).close()

    def die() -> None:
        table = shared(path.parent / "z")
        table.update(torch.arange(N), torch.ones(N, V))
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait_for([forked(die)]) == [-signal.SIGKILL]
    with shared(path.parent / "z") as table:
        assert not table.gather(torch.arange(N)).any()


def test_a_table_that_nobody_closed_leaves_no_copy_at_exit(path):
    code = (
        "import sys; from pathlib import Path\n"
        "from memkernels.store import RowTable, _table_shared\n"
        "_table_shared.FOLDER = Path(sys.argv[2])\n"
        "table = RowTable.open(sys.argv[1], tier='shared')\n"
        "print(table.gather([1, 2]).double().sum().item(), len(list(_table_shared.FOLDER.iterdir())))\n"
    )
    command = [sys.executable, "-c", code, str(path), str(path.parent / "shm")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    total, count = done.stdout.split()
    assert float(total) == numbers()[[1, 2]].double().sum().item() and count == "2"
    assert copies(path) == []


def test_a_write_waits_for_an_update_of_another_thread(path):
    """Updates and the write at close take turns, so a row in the file is whole."""
    table, other = shared(path), shared(path)
    stop, wrong = threading.Event(), []

    def update() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            other.update(torch.arange(N), torch.full((N, V), float(step)))

    thread = threading.Thread(target=update)
    thread.start()
    for _ in range(5):
        table.update([0], torch.zeros(1, V))
        table.close()
        with RowTable.open(path) as written:
            if len(written.gather(torch.arange(1, N)).unique()) > 1:
                wrong.append(written.gather(torch.arange(N)).unique())
        table = shared(path)
    stop.set()
    thread.join()
    table.close()
    other.close()
    assert len(wrong) <= 1  # before the first update the rows differ


def test_memory_that_has_no_room_is_told(path, monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_table_shared.os, "posix_fallocate", full)
    with pytest.raises(StoreFull, match=r"has no room for \d+ bytes"):
        shared(path)
    assert copies(path) == []
    monkeypatch.undo()
    monkeypatch.setattr(_table_shared, "FOLDER", path.parent / "none")
    with pytest.raises(StoreFormat, match="tier='shared' needs .*, which is not there; use tier='ram' or 'mmap'"):
        shared(path)


def test_damage_is_found_while_a_copy_is_filled(path):
    whole = bytearray(path.read_bytes())
    whole[5000] ^= 4
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="block 0: crc32c is"):
        shared(path)
    assert copies(path) == []
