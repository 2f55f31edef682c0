"""Pages that are nowhere in memory, four threads at a time: the store, raw O_DIRECT, and a mapping of the same file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from memkernels.store import MemoryStore

from ..contests.contest import Contest, same
from ..contests.disk import forget
from ..contests.finding import Finding, Wrong, least
from .direct import Direct, Mapped
from .setting import Setting

RAW, MAPPED = "O_DIRECT", "memmap"


def cold(setting: Setting) -> Iterator[Finding]:
    """A row of each of many pages that nobody has read for long. A variant reads and keeps whole pages.

    Each call takes the next pages of one random order, so that no cache behind the disk has them for the second
    variant. The store holds two batches, and meets a page again after many more.
    """
    memory, size = setting.memory, setting.page_slots
    batch = setting.size(64, 4)
    pages = np.random.default_rng(0).permutation(len(memory.values) // size)
    batches = itertools.cycle(pages[: len(pages) // batch * batch].reshape(-1, batch))
    path = memory.path / "values.pages"
    budget = 2 * batch * size * sum(t.shape[-1] * t.itemsize for t in (memory.keys, memory.values))
    with MemoryStore.open(memory.path, ram_bytes=budget) as store, Direct(path) as direct, Mapped(path) as mapped:
        extents, width = store._engine.tables["values"]["extent"], store.columns["values"].extent_bytes

        def of_store() -> tuple[np.ndarray, Tensor]:
            chosen, before = next(batches), store.stats()["hits"]
            rows = store.gather(torch.from_numpy(chosen * size))
            if store.stats()["hits"] != before:
                raise Wrong("a page was still in memory")
            return chosen, rows

        def of_file(read: Callable) -> tuple[np.ndarray, Tensor]:
            chosen = next(batches)
            blocks = read(extents[chosen].tolist(), width)
            rows = torch.from_numpy(blocks[:, : memory.values[0].nbytes].copy())
            return chosen, rows.view(memory.values.dtype)

        contest = Contest(
            f"{batch} random pages of {width >> 10} KiB, cold, 4 threads",
            of_store,
            lambda found: same(found[1], memory.values[torch.from_numpy(found[0] * size)]),
            before=lambda: forget(path),
        )
        if direct.why:
            contest.lacks(RAW, direct.why)
        else:
            contest.enter(RAW, lambda: of_file(direct.blocks))
        contest.enter(MAPPED, lambda: of_file(mapped.blocks))
        contest.run(setting.seconds)
        yield contest.against(RAW, least(0.9))
        yield contest.against(MAPPED, least(2))


ROWS = {"cold": cold}
