"""A tier: one arena per column, and the table that says in which frame of it a page lies.

Replacement is CLOCK with two bits: a hit raises a frame's count to at most 3, the hand lowers counts as it passes, and
the first frame at 0 gives way. A page comes in at 0, so one that is read once is the first to go.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._columns import Column, DevicePages, Pages
from ._copies import Copies, Event, Queue

MOST = 3


class Tier:
    pages: Any  # Pages, DevicePages on a device

    def __init__(self, column: Column, pages: Pages | DevicePages):
        self.column, self.pages = column, pages
        self.frame_of = np.full(0, -1, dtype=np.int32)  # [pages]
        self.page_of = np.full(0, -1, dtype=np.int64)  # [at least the frames that were ever used]
        self.count = np.zeros(0, dtype=np.uint8)
        self.used = 0  # frames that were ever used: those below
        self.dropped: list[int] = []  # a heap: low frames first, so that pages read in order lie in order
        self.hand = 0
        self.hits = self.misses = self.bytes_copied = 0
        self._arrays: tuple = (None, None, None)
        self._tables: tuple[Tensor, ...] = ()

    @property
    def frames(self) -> int:
        return self.pages.count

    @property
    def free(self) -> int:
        """Frames that hold no page."""
        return self.frames - self.resident

    @property
    def resident(self) -> int:
        return self.used - len(self.dropped)

    @property
    def page_bytes(self) -> int:
        return self.column.slots * self.column.stored_bytes

    def grow(self, pages: int) -> None:
        if pages > len(self.frame_of):
            more = np.full(max(pages, 2 * len(self.frame_of)) - len(self.frame_of), -1, dtype=np.int32)
            self.frame_of = np.concatenate([self.frame_of, more])

    def tables(self, live: np.ndarray) -> tuple[Tensor, ...]:
        """``live``, ``frame_of`` and ``count`` as tensors of the same memory, made again where an array is another."""
        a, b, c = self._arrays
        if a is not live or b is not self.frame_of or c is not self.count:
            self._arrays = live, self.frame_of, self.count
            self._tables = tuple(map(torch.from_numpy, self._arrays))
        return self._tables

    def count_slots(self, here: np.ndarray, slots: int = 1) -> None:
        """Hits and misses. bool [n]: is it here? ``slots`` that each stands for."""
        hits = int(here.sum()) * slots
        self.hits += hits
        self.misses += here.size * slots - hits

    def reading(self) -> contextlib.AbstractContextManager[Any]:
        """``pages``, to be read in the block."""
        return contextlib.nullcontext(self.pages)

    def touch(self, frames: np.ndarray) -> None:
        self.count[frames] = np.minimum(self.count[frames], MOST - 1) + 1

    def take(self, pages: list[int]) -> list[int]:
        """A frame for each of ``pages``, which are not here; at most as many as there are frames."""
        fresh = max(0, min(self.frames - self.used, len(pages) - len(self.dropped)))
        frames = [heapq.heappop(self.dropped) for _ in range(min(len(pages), len(self.dropped)))]
        frames += range(self.used, self.used + fresh)
        self.used += fresh
        if self.used > len(self.page_of):
            more = max(self.used, min(2 * self.used, self.frames)) - len(self.page_of)
            self.page_of = np.append(self.page_of, np.full(more, -1))
            self.count = np.append(self.count, np.zeros(more, np.uint8))
        taken = set(frames)
        while len(frames) < len(pages):
            frames.append(self._evict(taken))
            taken.add(frames[-1])
        frames = self._ordered(pages, frames)
        for page, frame in zip(pages, frames):
            self.page_of[frame], self.frame_of[page], self.count[frame] = page, frame, 0
        return frames

    def _ordered(self, pages: list[int], frames: list[int]) -> list[int]:
        """Which of ``frames`` each of ``pages`` gets."""
        return frames

    def _evict(self, kept: set[int]) -> int:
        while True:
            frame = self.hand
            self.hand = (frame + 1) % self.used
            if frame in kept:
                continue
            if self.count[frame] == 0:
                self.frame_of[self.page_of[frame]] = -1
                return frame
            self.count[frame] -= 1

    def drop(self, page: int) -> None:
        """Forget what the page held."""
        if page < len(self.frame_of) and (frame := int(self.frame_of[page])) >= 0:
            self.frame_of[page] = self.page_of[frame] = -1
            heapq.heappush(self.dropped, frame)


class DeviceTier(Tier):
    """A tier in the memory of a device. Only copies write to its frames.

    A copy into a frame runs after the kernels that read the arena so far, and a kernel that reads the arena after the
    copies so far. The host waits for neither.
    """

    def __init__(self, column: Column, frames: int, copies: Copies):
        super().__init__(column, DevicePages(column, frames, copies))
        self.copies = copies
        self.last_read = copies.record("compute")  # behind the last kernel that used the memory
        self.last_copy = copies.record("copy")
        self.coming: list[int] = []  # pages whose copies no kernel has waited for yet
        self.moves = 0  # how often a page came or went
        copies.tiers.append(self)

    def take(self, pages: list[int]) -> list[int]:
        self.moves += 1
        return super().take(pages)

    def _ordered(self, pages: list[int], frames: list[int]) -> list[int]:
        """The frame that the other column has the page in, so that a read takes both at once; else one that is left."""
        wanted = next(tier for tier in self.copies.tiers if tier is not self).frame_of[pages].tolist()
        alike = set(wanted) & set(frames)
        left = (frame for frame in frames if frame not in alike)
        return [frame if frame in alike else next(left) for frame in wanted]

    def drop(self, page: int) -> None:
        self.moves += 1
        super().drop(page)

    def stage(self, numbers: np.ndarray, frames: list[int], memory: Pages) -> None:
        """Copy the first pages of page-locked memory into frames that :meth:`take` gave; frames in a row at once."""
        self.coming += numbers.tolist()
        size = self.column.slots
        try:
            self.copies.wait("copy", self.last_read)
            cuts = [0, *(np.flatnonzero(np.diff(frames) != 1) + 1).tolist(), len(frames)]
            for first, stop in zip(cuts, cuts[1:]):
                here = slice(frames[first] * size, (frames[first] + stop - first) * size)
                there = slice(first * size, stop * size)
                self.copies.stage(self.pages.rows[here], memory.rows[there])
                if memory.scales is not None:
                    self.copies.stage(self.pages.scales[here], memory.scales[there])
        finally:
            self.last_copy = memory.sent = self.copies.record("copy")
        self.bytes_copied += len(frames) * self.page_bytes

    def reclaim(self, memory: Pages) -> None:
        """Wait until no copy reads page-locked memory any more."""
        if memory.sent is not None:
            event, memory.sent = memory.sent, None
            self._wait("host", event)

    @contextlib.contextmanager
    def reading(self) -> Iterator[DevicePages]:
        self._wait("compute", self.last_read)  # another stream may have been the current one
        self._wait("compute", self.last_copy)
        self.coming.clear()
        try:
            yield self.pages
        finally:
            self.last_read = self.copies.record("compute")

    def _wait(self, queue: Queue, event: Event) -> None:
        try:
            self.copies.wait(queue, event)
        except BaseException:  # a copy failed, and which one is not told
            for tier in self.copies.tiers:
                for page in tier.coming:
                    tier.drop(page)
                tier.coming.clear()
            raise


def frames_for(columns: list[Column], budget: int | None, name: str = "ram_bytes") -> int:
    """How many pages of each column ``budget`` bytes hold, at least two. None: a quarter of the machine's memory."""
    page = sum(c.slots * c.stored_bytes for c in columns)
    if budget is None:
        budget = max(2 * page, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"open: {name} must be an int, got {type(budget).__name__}")
    if budget < 2 * page:
        raise ValueError(f"open: {name} must hold two pages of each column, {2 * page} bytes, got {budget}")
    return budget // page
