"""Searches and reads over all slots, against the operation on one tensor in RAM."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels import ops
from memkernels.store import MemoryStore

from ..contests.contest import Contest
from ..contests.finding import TOLD, Finding, Wrong, most
from . import exact
from .direct import Direct
from .setting import Memory, Setting, normal, warm

TOKENS, BEST = 16, 32
TENSOR, RAW = "one tensor", "O_DIRECT in order"
RUN_BYTES = 16 << 20  # of a column


def _search(setting: Setting, store: MemoryStore, memory: Memory, what: str) -> Contest:
    """A search of the store beside the same search of one tensor, checked."""
    (query,) = normal(TOKENS, memory.keys.shape[-1], seed=1)
    wanted, _ = exact.topk(query, memory.keys, BEST)
    contest = Contest(
        f"topk_search of {TOKENS} tokens, k = {BEST}, {what}",
        lambda: store.topk_search(query, BEST),
        lambda found: exact.best(found, query, memory.keys, wanted),
    )
    contest.enter(TENSOR, lambda: ops.topk_search(query, memory.keys, BEST))
    return contest


def resident(setting: Setting) -> Iterator[Finding]:
    """``topk_search`` with every page in memory."""
    with setting.memory.resident() as store:
        warm(store)
        contest = _search(setting, store, setting.memory, "all resident")
        contest.run(setting.seconds)
        yield contest.against(TENSOR, most(1.15))


def streamed(setting: Setting) -> Iterator[Finding]:
    """``topk_search`` with next to nothing in memory: pages are read, checked and searched in runs.

    The time of the disk itself is that of reading the same file in order with O_DIRECT, by as many threads.
    """
    memory = setting.memory
    two_pages = 2 * setting.page_slots * memory.nbytes // len(memory.keys)

    def whole(got: object) -> None:
        if got != memory.keys.nbytes:
            raise Wrong(f"must read {memory.keys.nbytes} bytes, got {got}")

    with MemoryStore.open(memory.path, ram_bytes=two_pages) as store, Direct(memory.path / "keys.pages") as file:
        contest = _search(setting, store, memory, "streamed with checksums")
        if file.why:
            contest.lacks(RAW, file.why)
        else:
            contest.enter(RAW, file.whole, whole)
        contest.run(setting.seconds)
        yield contest.against(TENSOR, most(2.9))
        yield contest.against(TENSOR, most(2.9), clock="processor")
        yield contest.against(RAW, TOLD)


def softmax(setting: Setting) -> Iterator[Finding]:
    """``softmax_read`` over pages in memory that lie in runs of 16 MiB of each column, merged by their lse."""
    memory = setting.memory
    (query,) = normal(TOKENS, memory.keys.shape[-1], seed=2)
    wanted = exact.softmax_read(query, memory.keys, memory.values)
    slots = RUN_BYTES // (memory.keys.shape[-1] * memory.keys.itemsize)
    with memory.resident() as store:
        # The last run comes in first, so that no run lies beside the one that follows it.
        for first in reversed(range(0, len(memory.keys), slots)):
            stop = min(first + slots, len(memory.keys))
            store.prefetch(torch.arange(first, stop, setting.page_slots))
        contest = Contest(
            f"softmax_read of {TOKENS} tokens over runs of 16 MiB",
            lambda: store.softmax_read(query),
            lambda got: exact.near("read", got, wanted),
        )
        contest.enter(TENSOR, lambda: ops.softmax_read(query, memory.keys, memory.values))
        contest.run(setting.seconds)
        yield contest.against(TENSOR, most(1.15))


ROWS = {"topk": resident, "stream": streamed, "softmax": softmax}
