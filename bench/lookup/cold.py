"""Rows that are nowhere in memory, off a disk: RowTable past the page cache, bare O_DIRECT reads, and page caches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from memkernels import _native
from memkernels.store import RowTable, StoreFormat

from ..contests.contest import Contest, same
from ..contests.disk import forget
from ..contests.finding import TOLD, Finding, Wrong, lacking, least
from ..contests.peers import Lmdb, missing
from .setting import OUT, PIECE, WIDTH, Content, Setting

RAW, MAPPED, LMDB = "O_DIRECT", "memmap, row by row", "LMDB"
BLOCK = 4096  # bytes of a read; the rows of a file begin at its second block
ROWS_OF_BLOCK = BLOCK // WIDTH
RANGE = 128 << 10  # bytes up to which RowTable makes blocks that touch one read
THREADS = 16
COUNT, FEW = 32_768, 2_048  # rows of a call; of one for which a quick run has time


class Draw:
    """Slots of the next call: a random row of each of many blocks that no call before it read, until all were."""

    def __init__(self, content: Content, count: int) -> None:
        self.content, random = content, np.random.default_rng(33)
        blocks = random.permutation(content.count // ROWS_OF_BLOCK)
        count = min(count, len(blocks))
        self.batches = blocks[: len(blocks) // count * count].reshape(-1, count)
        self.random, self.turn = random, 0

    def next(self) -> None:
        blocks = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        self.slots = torch.from_numpy(blocks * ROWS_OF_BLOCK + self.random.integers(ROWS_OF_BLOCK, size=len(blocks)))
        self.offsets, self.sizes = ranges(np.sort(blocks))


def ranges(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of the reads that bring these blocks of rows, in order, each named once. int64."""
    begins = [0]
    for i in range(1, len(blocks)):
        if blocks[i] != blocks[i - 1] + 1 or (i + 1 - begins[-1]) * BLOCK > RANGE:
            begins.append(i)
    sizes = np.diff([*begins, len(blocks)]) * BLOCK
    return (blocks[begins] + 1) * BLOCK, sizes


def direct(setting: Setting) -> Iterator[Finding]:
    """Random rows, cold, each in a block of its own: tier direct against the same reads without a table."""
    content, path = setting.content, setting.file
    draw = Draw(content, setting.size(COUNT, FEW))
    what = f"{len(draw.batches[0])} random rows of {content.text()}, cold"
    try:
        table = RowTable.open(path, tier="direct", threads=THREADS, out_dtype=OUT)
    except StoreFormat as error:
        for peer, goal in ((RAW, least(0.9)), (MAPPED, least(3)), (LMDB, TOLD)):
            yield lacking(what, peer, goal, f"no O_DIRECT here ({error})")
        return
    with table:
        yield from _against_reads(setting, table, draw, f"{what}, {THREADS} threads")
        yield from _against_caches(setting, table, draw, f"{what}, {THREADS} threads")


def _of_table(table: RowTable, draw: Draw) -> Callable[[], Tensor]:
    return lambda: table.gather(draw.slots)


def _against_reads(setting: Setting, table: RowTable, draw: Draw, what: str) -> Iterator[Finding]:
    content, path = setting.content, str(setting.file)

    def before() -> None:
        draw.next()
        table.reset_stats()

    def check(rows: Tensor) -> None:
        same(rows, content.rows(draw.slots))
        counted = table.stats()
        got, wanted = (counted["reads"], counted["bytes_read"]), (len(draw.sizes), int(draw.sizes.sum()))
        if got != wanted:
            raise Wrong(f"the rows took {got[0]} reads of {got[1]} bytes, and need {wanted[0]} of {wanted[1]}")

    def right(found: tuple[float, int, int]) -> None:
        first = torch.from_numpy((draw.offsets // BLOCK - 1) * ROWS_OF_BLOCK)
        words = content.pattern[first % PIECE, :8].numpy().copy().view(np.uint64)
        if found[1:] != (int(draw.sizes.sum()), int(np.bitwise_xor.reduce(words.reshape(-1)))):
            raise Wrong("the reads brought other bytes than those of the table")

    contest = Contest(what, _of_table(table, draw), check, before)
    contest.enter(RAW, lambda: _native.host().direct_reads(path, draw.offsets, draw.sizes, THREADS), right)
    contest.run(setting.seconds)
    yield contest.against(RAW, least(0.9))


def _against_caches(setting: Setting, table: RowTable, draw: Draw, what: str) -> Iterator[Finding]:
    """A mapping read row by row, and LMDB; both return the bytes of the rows as they are."""
    content, path = setting.content, setting.file
    folder, absent = setting.folder / "lmdb", missing(LMDB)
    store = None if absent else Lmdb(folder, setting.table.values.view(torch.uint8).numpy())
    setting.let_go()

    def before() -> None:
        draw.next()
        forget(path)
        if store is not None:
            store.close()  # nobody maps the file then
            forget(folder / "data.mdb")
            store.open(folder)

    def check(rows: np.ndarray) -> None:
        same(torch.from_numpy(rows), content.pattern[draw.slots % PIECE])

    def walked() -> np.ndarray:
        rows = np.memmap(path, np.uint8, mode="r", offset=BLOCK)[: content.nbytes].reshape(-1, WIDTH)
        out = np.empty((len(draw.slots), WIDTH), np.uint8)
        for i, slot in enumerate(draw.slots.tolist()):
            out[i] = rows[slot]
        return out

    contest = Contest(what, _of_table(table, draw), lambda rows: same(rows, content.rows(draw.slots)), before)
    contest.enter(MAPPED, walked, check)
    if store is None:
        contest.lacks(LMDB, absent)
    else:
        contest.enter(LMDB, lambda: store.read(draw.slots.numpy()), check)
    contest.run(setting.seconds)
    if store is not None:
        store.close()
        shutil.rmtree(folder)
    yield contest.against(MAPPED, least(3))
    yield contest.against(LMDB, TOLD)


ROWS = {"direct": direct}
