"""The gate's passes, as a share of the read bandwidth, against plain PyTorch and torch.compile."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from memkernels import _native

from ..case import OWN, Case
from ..cases import memory_gate
from ..ceilings import Ceilings
from ..check import PEER_SLACK, Exact
from ..contests.contest import Contest
from ..contests.finding import Finding, Wrong, least
from ..peers import compiled as compiled_peer
from ..peers import eager
from ..timers import Spread
from ..variants import d_output, first, own, prepare
from . import compiled
from .setting import Setting

EAGER, BANDWIDTH = "eager", "read bandwidth"
BRANCHES, WIDTHS, DTYPES = (1, 4), (1024, 5120), ("float32", "bfloat16")


def gate(setting: Setting) -> Iterator[Finding]:
    """``memory_gate``; input sets of several times the last-level cache take turns."""
    branches, widths = (BRANCHES, WIDTHS) if not setting.quick else (BRANCHES[-1:], WIDTHS[:1])
    ceilings = Ceilings("cpu", setting.threads, setting.quick)
    ceilings.look()
    for direction, dtype, b, d in itertools.product(memory_gate.SHARES, DTYPES, branches, widths):
        with torch.no_grad():  # the timed calls want none; what they go back through was made with one
            found = _of(setting, memory_gate.case(b, d, dtype, direction), ceilings)
        yield from found


def _of(setting: Setting, case: Case, ceilings: Ceilings) -> list[Finding]:
    sizes = case.quick if setting.quick else case.sizes
    cache = 0 if setting.quick else max(_native.host().caches().values())
    sets = case.inputs(sizes, "cpu", cache)
    d_out = d_output(case, sets[0])
    exact = Exact(case, sets[0], d_out)

    def calls(make: Callable) -> Callable[[], object]:
        """A call that takes the next input set, the first one first."""
        prepared = itertools.cycle([prepare(case, make, inputs, d_out) for inputs in sets])
        return lambda: next(prepared)()

    def check(result: Tensor | Sequence[Tensor], slack: float = PEER_SLACK) -> None:
        found = [first(result)] if case.direction == "forward" else result
        error, limit = exact.error([t.detach() for t in found]), slack * exact.limit()
        if not error <= limit:
            raise Wrong(f"error {error:.1e} is above {limit:.1e}")

    words = f"memory_gate {case.direction}, {case.dtype}, {case.title(sizes)}"
    contest = Contest(words, calls(own(case)), functools.partial(check, slack=1))
    contest.enter(EAGER, calls(eager.memory_gate), check)
    contest.check = check
    compiled.enter(contest, setting, lambda: _restarted(calls, compiled_peer.memory_gate, len(sets)))
    contest.run(setting.seconds)
    ceilings.look()
    own_times = contest.times[OWN].wall
    bytes_moved = case.bytes(sizes, case.torch_dtype.itemsize)
    ideal = bytes_moved / ceilings.bandwidth
    spread = Spread.of([ideal / t for t in own_times])
    goal = least(memory_gate.SHARES[case.direction], "share")
    quartiles = {"low": spread.low, "high": spread.high, "samples": spread.samples}
    share = Finding(words, BANDWIDTH, goal, spread.median, statistics.median(own_times), ideal, **quartiles)
    return [share, contest.against(EAGER, least(3)), contest.against(compiled.COMPILED, least(1))]


def _restarted(calls: Callable, make: Callable, count: int) -> Callable[[], object]:
    """A call whose first set comes first again after one has compiled."""
    call = calls(make)
    for _ in range(count - 1):
        call()
    return call


ROWS = {"gate": gate}
