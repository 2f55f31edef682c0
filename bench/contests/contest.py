"""One piece of work, the library's way and its peers' ways: all checked, then the right ones timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..case import OWN
from ..timers import Spread
from .finding import Finding, Goal, Wrong, lacking
from .turns import Call, Times, take_turns

Check = Callable[[object], None]
Value = Callable[[float, float], float]  # of the seconds of both sides


def same(got: Tensor, wanted: Tensor) -> None:
    """Rows that were read, bit by bit."""
    if got.shape != wanted.shape or not torch.equal(got, wanted):
        raise Wrong("the rows are not those that were written")


class Contest:
    """
    check: raises :class:`Wrong` where a result is not right.
    before: see :func:`bench.contests.turns.take_turns`.
    """

    def __init__(self, what: str, own: Call, check: Check, before: Call | None = None) -> None:
        self.what, self.check, self.before = what, check, before
        self.calls: dict[str, Call] = {}
        self.absent: dict[str, str] = {}
        self.times: dict[str, Times] = {}
        if before is not None:
            before()
        check(own())
        self.calls[OWN] = own

    def enter(self, name: str, call: Call, check: Check | None = None) -> None:
        """A peer. One that is wrong has no speed. ``check``: where it does not do the same work, its own."""
        if self.before is not None:
            self.before()
        try:
            (check or self.check)(call())
        except Wrong as error:
            self.absent[name] = f"wrong: {error}"
        else:
            self.calls[name] = call

    def lacks(self, name: str, why: str) -> None:
        """A peer that cannot run here."""
        self.absent[name] = why

    def run(self, seconds: float) -> None:
        self.times = take_turns(self.calls, seconds, self.before)

    def alone(self, what: str, goal: Goal, name: str = OWN) -> Finding:
        """The time of a variant, by itself. ``what``: the work, as this variant does it."""
        if name in self.absent:
            return lacking(what, "", goal, self.absent[name])
        spread = Spread.of(self.times[name].wall)
        quartiles = {"low": spread.low, "high": spread.high, "samples": spread.samples}
        return Finding(what, "", goal, spread.median, spread.median, **quartiles)

    def beyond(self, what: str, peer: str, goal: Goal, name: str = OWN) -> Finding:
        """By what share of its time a variant takes longer than ``peer``."""
        return self._compared(what, name, peer, goal, lambda own, theirs: own / theirs - 1)

    def between(self, what: str, name: str, peer: str, goal: Goal, words: str) -> Finding:
        """The ratio of two variants. ``words``: for the second."""
        return replace(self._compared(what, name, peer, goal, goal.ratio), peer=words)

    def against(self, peer: str, goal: Goal, clock: str = "wall") -> Finding:
        """What the times say of a peer."""
        return self._compared(self.what, OWN, peer, goal, goal.ratio, clock)

    def _compared(self, what: str, name: str, peer: str, goal: Goal, value: Value, clock: str = "wall") -> Finding:
        for one in (name, peer):
            if one in self.absent:
                return lacking(what, peer, goal, self.absent[one])
        own, theirs = (getattr(self.times[one], clock) for one in (name, peer))
        spread = Spread.of([value(a, b) for a, b in zip(own, theirs)])
        return Finding(
            what=what,
            peer=peer,
            goal=goal,
            value=spread.median,
            own=statistics.median(own),
            theirs=statistics.median(theirs),
            clock=clock,
            low=spread.low,
            high=spread.high,
            samples=spread.samples,
        )
