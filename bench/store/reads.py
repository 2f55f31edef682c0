"""Warm slots by number, against the bare operation on a tensor and against Lance."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import torch

from memkernels import ops

from ..contests.contest import Contest, same
from ..contests.finding import Finding, least, most
from ..contests.peers import missing
from .peers import lance_values
from .setting import Setting, warm

BARE, LANCE = "sparse_read", "Lance"
GOALS = {512: most(3), 16384: most(1.4)}


def gather(setting: Setting) -> Iterator[Finding]:
    """``gather`` of scattered slots. A bare ``sparse_read`` of one slot per token returns the same rows."""
    memory = setting.memory
    values, absent = memory.values, missing(LANCE)
    folder = setting.folder / "lance"
    take = None if absent else lance_values(folder, values)
    with memory.resident() as store:
        warm(store)
        for count, goal in GOALS.items():
            slots = torch.randint(len(values), (count,), generator=torch.Generator().manual_seed(count))
            wanted, numbers = values[slots], slots.numpy()
            at, ones = slots.unsqueeze(1), torch.ones(count, 1)
            contest = Contest(
                f"gather of {count} warm slots",
                lambda slots=slots: store.gather(slots),
                lambda got, wanted=wanted: same(got, wanted),
            )
            contest.enter(BARE, lambda at=at, ones=ones: ops.sparse_read(values, at, ones))
            if take is None:
                contest.lacks(LANCE, absent)
            else:
                contest.enter(LANCE, lambda numbers=numbers: take(numbers))
            contest.run(setting.seconds)
            yield contest.against(BARE, goal)
            yield contest.against(LANCE, least(50))
    shutil.rmtree(folder, ignore_errors=True)


ROWS = {"gather": gather}
