"""One store of many gigabytes, more than memory holds: made, opened, read, searched, and deleted again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from memkernels.store import MemoryStore

from ..contests.finding import Finding, Goal, Wrong
from .setting import Setting

DIM, DTYPE = 64, torch.bfloat16
ROW_BYTES = 2 * DIM * DTYPE.itemsize
PIECE = 1 << 20  # slots of one append
TOKENS, BEST, READ = 16, 10, 4096
SPARE = 1.1  # room that is asked for, as a multiple of the rows


def slots_that_fit(free: int) -> int:
    """The most of 10^8, 5 * 10^7, 2 * 10^7, 10^7 ... slots that ``free`` bytes hold. OSError where 10^6 do not fit."""
    for power in (8, 7, 6):
        for count in (10**power, 5 * 10 ** (power - 1), 2 * 10 ** (power - 1)):
            if SPARE * count * ROW_BYTES <= free:
                return count
    raise OSError(f"the large run needs {2 * 10**5 * ROW_BYTES >> 20} MiB free, there are {free >> 20}")


class Content:
    """Rows of any slot, made again where they are checked: keys of one block, repeated; values that say their slot.

    ``query`` [T, K] has its ``BEST`` nearest slots planted far apart, each farther out than any other key.
    """

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(21)
        self.keys = torch.randn(PIECE, DIM, generator=generator).to(DTYPE)
        query = torch.randn(TOKENS, DIM, generator=generator)
        self.query = (query / query.norm(dim=1, keepdim=True)).to(DTYPE)
        planted = np.random.default_rng(21).choice(count, TOKENS * BEST, replace=False)
        self.planted = torch.from_numpy(planted).view(TOKENS, BEST)
        # The farther out the better; a sixteenth apart, which bfloat16 tells from each other.
        self.strength = 24 * (2 - torch.arange(BEST) / 16)

    def rows(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots first <= i < stop."""
        keys = self.keys[: stop - first].clone()
        inside = (self.planted >= first) & (self.planted < stop)
        token, rank = inside.nonzero(as_tuple=True)
        keys[self.planted[inside] - first] = (self.strength[rank, None] * self.query[token].float()).to(DTYPE)
        return keys, self.values(torch.arange(first, stop))

    def values(self, slots: Tensor) -> Tensor:
        """Four numbers below 256, which bfloat16 holds exactly, then zeros."""
        out = torch.zeros(len(slots), DIM, dtype=DTYPE)
        for i in range(4):
            out[:, i] = ((slots >> 8 * i) & 255).to(DTYPE)
        return out


def timed(call: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def large(setting: Setting) -> Iterator[Finding]:
    """As many of 10^8 slots of 64 + 64 numbers in bfloat16 as the disk holds."""
    count = setting.size(slots_that_fit(shutil.disk_usage(setting.folder).free), 10**4)
    path, content = setting.folder / "large", Content(count)
    of = f"{count:.0e} slots, {count * ROW_BYTES / 1e9:.1f} GB".replace("e+0", "e")

    def told(what: str, seconds: float) -> Finding:
        return Finding(f"{of}: {what}", "", Goal(unit="s"), seconds, seconds)

    def make() -> None:
        store = MemoryStore.create(path, DIM, DIM, key_dtype=DTYPE, value_dtype=DTYPE)
        with store:
            for first in range(0, count, PIECE):
                store.append(*content.rows(first, min(first + PIECE, count)))

    yield told("made, durable", timed(make)[0])
    seconds, store = timed(lambda: MemoryStore.open(path))
    with store:
        yield told("opened", seconds)
        slots = torch.randint(count, (READ,), generator=torch.Generator().manual_seed(22))
        seconds, rows = timed(lambda: store.gather(slots))
        if not torch.equal(rows, content.values(slots)):
            raise Wrong("a slot does not hold its number")
        yield told(f"gather of {READ} random slots, cold", seconds)
        for state in ("the first", "the second"):
            seconds, (_, found) = timed(lambda: store.topk_search(content.query, BEST))
            if not torch.equal(found, content.planted):
                raise Wrong("the search does not find the slots that are nearest")
            yield told(f"topk_search of {TOKENS} tokens, {state}", seconds)
    shutil.rmtree(path)


ROWS = {"large": large}
