"""The rows of one token, out of memory that no cache has: what a call costs, and what it allocates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import memkernels as mk
from memkernels import _torch
from memkernels.store import RowTable

from ..contests.contest import Contest, same
from ..contests.finding import Finding, Goal, Wrong, most
from ..peers import eager
from .gathers import EAGER, random_slots
from .setting import OUT, WIDTH, Setting

COUNTS = (24, 48)  # rows of one token
CALLS = 100  # whose allocations are counted
OPERATOR, FUNCTION, TABLE = "gather_rows_out", "mk.gather_rows", "RowTable.gather"
TOLD_TIME = Goal(unit="s")
WORDS = {  # how the rows are had, and the goal
    OPERATOR: ("the operator gather_rows_out, called from Python through the dispatcher", most(3e-6, "s")),
    FUNCTION: ("mk.gather_rows into a new tensor", most(12e-6, "s")),
    TABLE: ("RowTable.gather of tier ram, with out", most(12e-6, "s")),
    "nothing": ("that operator without any row", TOLD_TIME),
    EAGER: (EAGER, TOLD_TIME),
}


def token(setting: Setting) -> Iterator[Finding]:
    """The rows of one token: the operator, ``gather_rows``, a table in RAM."""
    with RowTable.open(setting.file, tier="ram", out_dtype=OUT) as rows:
        for count in COUNTS:
            yield from _of(setting, rows, count)


def _of(setting: Setting, rows: RowTable, count: int) -> Iterator[Finding]:
    content, table = setting.content, setting.table
    calls = {name: _taking(way, setting, count) for name, way in ways(table, rows, count).items()}

    def check(found: tuple[Tensor, Tensor]) -> None:
        same(found[1], content.rows(found[0]))

    contest = Contest(f"{count} rows of one token", calls[OPERATOR], check)
    for name in (FUNCTION, TABLE, EAGER):
        contest.enter(name, calls[name])
    contest.enter("nothing", nothing(table), lambda found: None)
    contest.run(setting.seconds)
    for name, (words, goal) in WORDS.items():
        yield contest.alone(f"{contest.what}: {words}", goal, *([] if name == OPERATOR else [name]))
    if allocations(calls[FUNCTION]) < 1:
        raise Wrong("the profiler does not see the tensor that mk.gather_rows makes")
    for name in (OPERATOR, TABLE):
        found = allocations(calls[name])
        words = f"{contest.what}: allocations of torch per call of {name} with out"
        yield Finding(words, "", most(0, "count"), found, found, unit="count")


def ways(table, rows: RowTable, count: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of slots ``[count]``."""
    operator = _torch.bare(torch.ops.memkernels_cpu.gather_rows_out.default)
    values, scale, by_row = table.values, table.scale, table.scale.unsqueeze(1)
    out = torch.empty(count, WIDTH, dtype=OUT)

    def into(at: Tensor) -> Tensor:
        operator(values, at, by_row, WIDTH, out)
        return out

    return {
        OPERATOR: into,
        FUNCTION: lambda at: mk.gather_rows(values, at, value_scale=scale, dtype=OUT),
        TABLE: lambda at: rows.gather(at, out=out),
        EAGER: lambda at: eager.embedded(values, at, scale, OUT),
    }


def nothing(table) -> Callable[[], None]:
    """What a call costs that has no row to gather."""
    operator = _torch.bare(torch.ops.memkernels_cpu.gather_rows_out.default)
    arguments = table.values, torch.empty(0, dtype=torch.int64), table.scale.unsqueeze(1), WIDTH
    nowhere = torch.empty(0, WIDTH, dtype=OUT)
    return lambda: operator(*arguments, nowhere)


def _taking(way: Callable, setting: Setting, count: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call on the next slots, and those slots."""
    slots = random_slots(setting.content.count, count, setting.size(1 << 15, 64))

    def run() -> tuple[Tensor, Tensor]:
        at = next(slots)
        return at, way(at)

    return run


def allocations(call: Callable[[], object]) -> float:
    """Of torch's allocator, per call."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for _ in range(CALLS):
            call()
    events = found.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events) / CALLS


ROWS = {"token": token}
