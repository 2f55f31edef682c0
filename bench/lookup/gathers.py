"""Many rows of a table in memory, against what random rows cost, and against PyTorch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import memkernels as mk
from memkernels import _native

from ..contests.contest import Contest, same
from ..contests.finding import TOLD, Finding, least
from ..peers import eager
from . import compiled
from .memory import huge, in_huge_pages
from .setting import OUT, WIDTH, Setting

PROBE, EAGER = "random rows", "F.embedding, dequantised"
SETS = 8  # of slots, so that no cache has the rows of the next call
DISTANCES = (4, 8, 16, 32, 64)  # rows, of the probe's prefetch: the best one counts


def gather(setting: Setting) -> Iterator[Finding]:
    """``gather_rows`` of many random rows in 8 bits, against the probe of random rows and the same in PyTorch."""
    content, table = setting.content, setting.table
    count = setting.size(196_608, 2_048)
    sets = random_slots(content.count, count, SETS)
    words = f"gather_rows of {count} rows, float8_e4m3fn to bfloat16, of {content.text()}"
    words += f", {in_huge_pages(table.values.view(torch.uint8)):.0%} of it in huge pages"
    probe, scale = Probe(setting, count), table.scale.unsqueeze(1)

    def check(found: tuple[Tensor, Tensor]) -> None:
        same(found[1], content.rows(found[0]))

    out = huge(count * WIDTH * OUT.itemsize).view(OUT).view(count, WIDTH)

    def into() -> tuple[Tensor, Tensor]:
        at = next(sets)
        torch.ops.memkernels_cpu.gather_rows_out(table.values, at, scale, WIDTH, out)
        return at, out

    contest = Contest(f"{words}, into memory that is there", into, check)
    contest.enter(PROBE, lambda: probe(next(sets)), probe.check)
    contest.run(setting.seconds)
    yield contest.against(PROBE, least(0.85))

    def by(function: Callable) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            at = next(sets)
            return at, function(table.values, at, value_scale=table.scale, dtype=OUT)

        return run

    contest = Contest(f"{words}, into a new tensor", by(mk.gather_rows), check)
    contest.enter(PROBE, lambda: probe(next(sets)), probe.check)
    contest.enter(EAGER, by(eager.embedded))
    compiled.enter(contest, setting, lambda: by(torch.compile(eager.embedded, dynamic=False)))
    contest.run(setting.seconds)
    yield contest.against(PROBE, TOLD)
    yield contest.against(EAGER, least(3))
    yield contest.against(compiled.COMPILED, least(1.5))


def random_slots(rows: int, count: int, sets: int) -> Iterator[Tensor]:
    """Random slots, in turns. int64 [count]."""
    generator = torch.Generator().manual_seed(31)
    return itertools.cycle([torch.randint(rows, (count,), generator=generator) for _ in range(sets)])


class Probe:
    """Reads rows where the table has them and streams twice their bytes into memory that is there."""

    def __init__(self, setting: Setting, count: int) -> None:
        self.table = setting.table.values.view(torch.uint8)
        self.bytes, self.out = self.table.numpy(), huge(2 * count * WIDTH).numpy()
        self.threads = setting.threads
        at = torch.randint(len(self.table), (count,), generator=torch.Generator().manual_seed(32))
        self.ahead = min(DISTANCES, key=lambda ahead: min(self._seconds(at, ahead) for _ in range(3)))

    def _seconds(self, at: Tensor, ahead: int) -> float:
        begin = time.perf_counter()
        self._run(at, ahead)
        return time.perf_counter() - begin

    def _run(self, at: Tensor, ahead: int) -> None:
        _native.host().random_rows(self.bytes, WIDTH, at.numpy(), self.out, self.threads, ahead)

    def __call__(self, at: Tensor) -> Tensor:
        self._run(at, self.ahead)
        return at

    def check(self, at: Tensor) -> None:
        """64 bytes of a row, twice, then the next."""
        wanted = self.table[at].view(len(at), -1, 1, 64).expand(-1, -1, 2, -1)
        same(torch.from_numpy(self.out).view(wanted.shape), wanted)


ROWS = {"gather": gather}
