"""Hit rate of the tier on two traces, against the best that any replacement could do, computed with the future known.

Clustered: topics come by Zipf's law and stay for a while; slots of a topic were written together, so they share pages.
Scattered: slots by Zipf's law, each read for itself, wherever they lie.
"""

from __future__ import annotations

import heapq
import shutil
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch

from memkernels.store import MemoryStore

from ..contests.contest import same
from ..contests.finding import TOLD, Finding, least
from .setting import Memory, Setting, normal

BELADY, LRU = "Belady", "LRU"
SHARE = 0.1  # of the pages that fit
STAY = 64  # reads of one topic in a row
EXPONENT = 1.1  # of Zipf's law: a little steeper than words in a text
GOALS = {"clustered": least(0.9), "scattered": least(0.7)}


def clustered(slots: int, topics: int, reads: int) -> np.ndarray:
    """Slots in the order of their reads, int64 [reads]. A topic has the same slots side by side, a few of them hot."""
    random = np.random.default_rng(18)
    width = slots // topics
    topic = np.repeat(random.choice(topics, -(-reads // STAY), p=_zipf(topics)), STAY)[:reads]
    return topic * width + random.permutation(width)[random.choice(width, reads, p=_zipf(width))]


def scattered(slots: int, reads: int) -> np.ndarray:
    """The same for slots that have nothing to do with their neighbours."""
    random = np.random.default_rng(20)
    return random.permutation(slots)[random.choice(slots, reads, p=_zipf(slots))]


def _zipf(count: int) -> np.ndarray:
    weights = np.arange(1.0, count + 1) ** -EXPONENT
    return weights / weights.sum()


def belady(pages: np.ndarray, frames: int) -> int:
    """Hits where the page whose next read is farthest gives way."""
    following = np.full(len(pages), len(pages))
    seen: dict[int, int] = {}
    for i in range(len(pages) - 1, -1, -1):
        following[i] = seen.get(int(pages[i]), len(pages))
        seen[int(pages[i])] = i
    held: dict[int, int] = {}  # page -> its next read
    farthest: list[tuple[int, int]] = []  # heap of (-next read, page); entries of earlier reads are passed over
    hits = 0
    for page, then in zip(pages.tolist(), following.tolist()):
        if page in held:
            hits += 1
        elif len(held) == frames:
            while True:
                when, out = heapq.heappop(farthest)
                if held.get(out) == -when:
                    break
            del held[out]
        held[page] = then
        heapq.heappush(farthest, (-then, page))
    return hits


def lru(pages: np.ndarray, frames: int) -> int:
    """Hits where the page that was read longest ago gives way."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for page in pages.tolist():
        if page in held:
            hits += 1
            held.move_to_end(page)
        else:
            if len(held) == frames:
                held.popitem(last=False)
            held[page] = None
    return hits


def hits(setting: Setting) -> Iterator[Finding]:
    """Reads of one slot each, a tenth of the pages in memory."""
    count = setting.size(1 << 20, 1 << 12)
    memory = Memory.make(setting, "trace", *normal(count, 8, 8, seed=19))
    reads = setting.size(1 << 14, 1 << 9)
    traces = {
        "clustered": clustered(count, setting.size(64, 16), reads),
        "scattered": scattered(count, reads),
    }
    size = setting.page_slots
    frames = max(2, int(SHARE * count / size))
    budget = frames * size * (memory.nbytes // count)
    for name, trace in traces.items():
        with MemoryStore.open(memory.path, ram_bytes=budget) as store:
            rows = [store.gather(slot) for slot in torch.from_numpy(trace)]
            counted = store.stats()
        same(torch.stack(rows), memory.values[torch.from_numpy(trace)])
        own = counted["hits"] / len(trace)
        for peer, rule, goal in ((BELADY, belady, GOALS[name]), (LRU, lru, TOLD)):
            theirs = rule(trace // size, frames) / len(trace)
            yield Finding(f"hit rate, {name} trace", peer, goal, own / theirs, own, theirs, "share")
    shutil.rmtree(memory.path)


ROWS = {"hits": hits}
