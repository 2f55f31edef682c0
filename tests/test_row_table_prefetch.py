"""Prefetches: what is read, how often, in which order; bounds, failures, the page cache, streams of a device."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time

import pytest
import torch
from table_support import HOST, N, V, decoded, new, numbers, opened, picked, some

from memkernels.store import RowTable, StoreBusy, StoreDamaged, StoreError, StoreFormat, _table
from memkernels.store._copies import Copies

WIDE = 1024  # numbers of a row: a block of the disk each


@pytest.fixture
def disk(tmp_path):
    """A table whose rows are blocks of a disk that takes direct reads."""
    new(tmp_path / "t", "float32", rows=300, width=WIDE).close()
    with contextlib.closing(open(tmp_path / "t", "rb")) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        RowTable.open(tmp_path / "t", tier="direct").close()
    except StoreFormat as error:
        pytest.skip(str(error))
    return tmp_path / "t"


def rows() -> torch.Tensor:
    return numbers(300, WIDE)


# --- what is read ---


def test_blocks_that_touch_are_one_read_and_a_row_is_read_once(disk):
    with RowTable.open(disk, tier="direct") as table:
        slots = torch.tensor([7, 200, 5, 6, 7, -1, 7, 299, 202])
        for call in (table.gather, lambda s: table.prefetch(s).wait()):
            table.reset_stats()
            assert torch.equal(call(slots)[:5], rows()[[7, 200, 5, 6, 7]])
            stats = table.stats()
            assert (stats["rows"], stats["misses"], stats["hits"]) == (9, 6, 0)
            assert (stats["reads"], stats["bytes_read"]) == (4, 6 * 4096)  # 5..7, 200, 202, 299


def test_many_rows_in_a_row_are_reads_of_bounded_size(disk):
    with RowTable.open(disk, tier="direct") as table:
        assert torch.equal(table.gather(torch.arange(300)), rows())
        stats = table.stats()
        assert stats["bytes_read"] == 300 * 4096 and stats["reads"] == -(-300 * 4096 // (128 << 10))


def test_the_row_cache_keeps_what_is_used_again(disk):
    with RowTable.open(disk, tier="direct", cache_rows=20) as table:
        hot = torch.arange(0, 20, 2)
        for _ in range(3):
            table.gather(hot)
        assert table.stats()["misses"] == 10 and table.stats()["hits"] == 20
        for begin in range(100, 260, 20):  # a walk through the table
            table.gather(torch.arange(begin, begin + 5))
            assert torch.equal(table.gather(hot), rows()[hot])
        stats = table.stats()
        assert stats["misses"] == 10 + 8 * 5 and stats["hits"] == 20 + 8 * 10  # the walk displaced none of them
        assert stats["resident_bytes"] == 20 * 4096 and stats["evictions"] == 10 + 40 - 20


def test_the_cache_gives_the_bits_of_the_disk_whatever_goes(disk):
    with RowTable.open(disk, tier="direct", cache_rows=37) as table:
        for turn in range(60):
            slots = some(50, rows=300, seed=turn)
            wanted = torch.where((slots >= 0).unsqueeze(1), rows()[slots.clamp(min=0)], 0)
            assert torch.equal(table.gather(slots), wanted), turn
        assert table.stats()["evictions"] > 500 and table.stats()["hits"] > 100


def cached_pages(path) -> int:
    """Pages of a file in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory:
        count = -(-len(memory) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * count)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), found) == 0
        return sum(byte & 1 for byte in found)


def without_cache(path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_direct_reads_leave_the_page_cache_alone(disk):
    """And a mapped table brings the pages that it needs, not those around them."""
    without_cache(disk)
    if cached_pages(disk):
        pytest.skip("this file system keeps files in memory")
    with RowTable.open(disk, tier="direct") as table:
        before = cached_pages(disk)
        table.gather(torch.arange(0, 300, 2))
        table.prefetch(torch.arange(1, 300, 2)).wait()
        assert cached_pages(disk) == before < 50
    without_cache(disk)
    with RowTable.open(disk, tier="mmap") as table:
        before = cached_pages(disk)
        table.gather(torch.tensor([50, 150, 250]))
        assert cached_pages(disk) - before == 3
        table.prefetch(torch.tensor([20, 21, 120])).wait()
        assert cached_pages(disk) - before == 6


# --- tickets ---


def test_a_row_that_a_ticket_reads_is_awaited_by_the_next(disk):
    with RowTable.open(disk, tier="direct", threads=1) as table:
        first = table.prefetch(torch.arange(0, 300, 2))  # a read each
        second = table.prefetch(torch.tensor([298, 294, 296]))
        del first  # what was begun goes on
        assert torch.equal(second.wait(), rows()[[298, 294, 296]])
        stats = table.stats()
        assert stats["misses"] == 150 and stats["awaited"] == 3 and stats["bytes_read"] == 150 * 4096


@pytest.mark.parametrize("tier", HOST)
def test_tickets_are_bounded(tmp_path, tier):
    new(tmp_path / "t", "float32").close()
    with opened(tmp_path / "t", tier, tickets=3) as table:
        held = [table.prefetch(some(5, seed=i)) for i in range(3)]
        with pytest.raises(StoreBusy, match=r"prefetch: .*: 3 tickets of \d+ bytes are outstanding; wait for one"):
            table.prefetch([1])
        assert table.stats()["outstanding"] == 3
        wanted = table.gather(some(5, seed=0))
        assert torch.equal(held[0].wait(), wanted) and torch.equal(held[0].wait(), wanted)
        table.prefetch([1])  # and dropped
        del held[1:]
        deadline = time.monotonic() + 10
        while table.stats()["outstanding"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert table.stats()["outstanding"] == table.stats()["outstanding_bytes"] == 0
    with opened(tmp_path / "t", tier, ticket_bytes=5000) as table:
        large = table.prefetch(some(200))  # one alone may hold more
        with pytest.raises(StoreBusy):
            table.prefetch([1])
        large.wait()
        assert table.prefetch([1]).wait().shape == (1, V)


@pytest.mark.parametrize("tier", HOST)
def test_dropped_tickets_leak_nothing(tmp_path, tier):
    new(tmp_path / "t", "float32").close()
    memory = mmap.mmap(-1, 500 * V * 4)
    out = torch.frombuffer(memory, dtype=torch.float32).view(500, V)
    with opened(tmp_path / "t", tier) as table:
        for turn in range(300):
            with contextlib.suppress(StoreBusy):
                table.prefetch(some(500, seed=turn), out)
        while table.stats()["outstanding"] == 64:
            time.sleep(0.01)
        kept = table.prefetch([1])
    assert kept.wait().shape == (1, V)
    del out
    memory.close()  # an error while a tensor points into it


@pytest.mark.parametrize("tier", HOST)
def test_close_waits_for_tickets_which_can_then_be_waited_for(tmp_path, tier):
    new(tmp_path / "t").close()
    wanted = decoded(tmp_path / "t", "e4m3 block:32")
    table = opened(tmp_path / "t", tier, threads=2)
    slots = [some(300, seed=i) for i in range(9)]
    tickets = [table.prefetch(s) for s in slots]
    table.close()
    for s, ticket in zip(slots, tickets):
        assert ticket.done() and torch.equal(ticket.wait(), picked(wanted, s))
    with pytest.raises(StoreError, match="is closed"):
        table.prefetch([0])


def test_slots_may_change_after_a_prefetch(tmp_path):
    new(tmp_path / "t", "float32").close()
    for tier in HOST:
        with opened(tmp_path / "t", tier, threads=1) as table:
            busy = table.prefetch(some(5000, seed=1))
            slots = torch.tensor([1, 2, 3])
            ticket = table.prefetch(slots)
            slots.fill_(0)
            assert torch.equal(ticket.wait(), numbers()[[1, 2, 3]])
            busy.wait()


def test_waiting_leaves_python_to_others(disk):
    """Native threads do the work, and a thread that waits holds no interpreter lock."""
    with RowTable.open(disk, tier="direct", threads=1) as table:
        tickets = [table.prefetch(torch.arange(300)) for _ in range(40)]
        turns, ended = 0, threading.Event()

        def wait() -> None:
            for ticket in tickets:
                ticket.wait()
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        while not ended.is_set():
            turns += 1
            time.sleep(0)
        thread.join()
        assert turns > 100


# --- failures ---


def test_a_file_that_is_cut_while_it_is_open_is_one_sentence(disk):
    with RowTable.open(disk, tier="direct") as table:
        with open(disk, "r+b") as file:
            file.truncate(4096 * 100)
        good = torch.tensor([5, 6])
        for _ in range(2):
            tickets = [table.prefetch([5, 250]), table.prefetch([6, 250, 251]), table.prefetch(good)]
            for ticket in tickets[:2]:
                for _ in range(2):
                    with pytest.raises(
                        StoreError, match=r"^wait: .*: the file ended within \d+ bytes at \d+, after 0 b"
                    ):
                        ticket.wait()
            with pytest.raises(StoreError, match="^gather: .*: the file ended within"):
                table.gather(torch.tensor([250]))
            assert torch.equal(tickets[2].wait(), rows()[good]) and torch.equal(table.gather(good), rows()[good])
        assert table.stats()["outstanding"] == 0
        assert "has" in table.verify()[0].why
        with pytest.raises(StoreDamaged):
            RowTable.open(disk, tier="direct")


def test_a_row_lent_by_a_ticket_that_fails_is_read_again(disk):
    with RowTable.open(disk, tier="direct", threads=1) as table:
        with open(disk, "r+b") as file:
            file.truncate(4096 * 100)
        for _ in range(20):
            bad = table.prefetch(torch.tensor([10, 20, 30, 250]))
            good = table.prefetch(torch.tensor([30, 10]))
            assert torch.equal(good.wait(), rows()[[30, 10]])
            with pytest.raises(StoreError):
                bad.wait()


# --- a device, by a stand-in whose side stream runs when it is waited for, and no earlier ---


class Late(Copies):
    def __init__(self, device):
        super().__init__(device)
        self.work: list = []
        self.done = 0
        self.order: list[str] = []

    def aside(self):
        return contextlib.nullcontext()

    def record(self, queue):
        self.order.append(f"record {queue}")
        return LateEvent(self, queue, len(self.work))

    def wait(self, queue, event):
        self.order.append(f"{queue} waits")
        if event.queue == "copy":
            for job in self.work[self.done : event.behind]:
                job()
            self.done = max(self.done, event.behind)


class LateEvent:
    def __init__(self, copies, queue, behind):
        self.copies, self.queue, self.behind = copies, queue, behind

    def query(self) -> bool:
        return self.copies.done >= self.behind


@pytest.mark.parametrize("tier", ["pinned", "device"])
def test_the_wait_of_a_ticket_is_that_of_the_current_stream(tmp_path, monkeypatch, tier):
    new(tmp_path / "t").close()
    monkeypatch.setattr(_table, "Copies", Late)
    with opened(tmp_path / "t", tier, tickets=2) as table:
        made = table._made
        gather, late = made._gather, made.copies

        def later(at, dtype):
            out = torch.full((*at.shape, V), torch.nan, dtype=dtype)
            late.work.append(lambda: out.copy_(gather(at, dtype)))
            return out

        monkeypatch.setattr(made, "_gather", later)
        late.order.clear()
        slots = some(40)
        ticket = table.prefetch(slots)
        assert late.order == ["record compute", "copy waits", "record copy"] and not ticket.done()
        assert ticket._rows.isnan().all()
        other = table.prefetch([1])
        with pytest.raises(StoreBusy, match="2 tickets"):
            table.prefetch([1])
        assert torch.equal(ticket.wait(), picked(decoded(tmp_path / "t", "e4m3 block:32"), slots))
        assert late.order[-1] == "compute waits" and ticket.done() and not other.done()
        del other
        assert table.stats()["outstanding"] == 0
        table.prefetch([1])


def test_a_table_goes_to_the_device_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("memkernels.store._table_open.PIECE", 8192)
    monkeypatch.setattr("memkernels.store._table_file.BLOCK", 4096)
    monkeypatch.setattr("memkernels.store._table_layout.BLOCK", 4096)
    new(tmp_path / "t").close()
    wanted = decoded(tmp_path / "t", "e4m3 block:32")
    with opened(tmp_path / "t", "device") as table:
        assert torch.equal(table.gather(torch.arange(N)), picked(wanted, torch.arange(N)))
    whole = bytearray((tmp_path / "t").read_bytes())
    whole[4096 + 20_000] ^= 1
    (tmp_path / "t").write_bytes(whole)
    with pytest.raises(StoreDamaged, match="block 4"):
        opened(tmp_path / "t", "device")
