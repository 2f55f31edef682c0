"""What a row finds: one number against one goal, and the measurements that it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..text import seconds, size

NUMBERS = {
    "s": seconds,
    "bytes": size,
    "share": lambda value: f"{value:.3f}",
    "x": lambda value: f"{value:.2f}x",
    "count": lambda value: f"{value:g}",
}


class Wrong(Exception):
    """A result that is not right. It has no speed."""


@dataclass(frozen=True)
class Goal:
    """``least <= value <= most``, in ``unit``; without any of the two the value is only told.

    unit: of the value. ``"x"`` is a ratio to the peer: of times, own to peer's where ``most`` is given, else the
        peer's to own, so that a higher number is a faster library.
    """

    most: float | None = None
    least: float | None = None
    unit: str = "x"

    def reached(self, value: float) -> bool | None:
        if self.most is None and self.least is None:
            return None
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)

    def ratio(self, own: float, theirs: float) -> float:
        """Of times, as ``unit`` says."""
        return theirs / own if self.most is None else own / theirs

    @property
    def text(self) -> str:
        number = (lambda value: f"{value:g}x") if self.unit == "x" else NUMBERS[self.unit]
        parts = [
            f"{word} {number(n)}" for word, n in (("at most", self.most), ("at least", self.least)) if n is not None
        ]
        return " and ".join(parts)


def most(value: float, unit: str = "x") -> Goal:
    return Goal(most=value, unit=unit)


def least(value: float, unit: str = "x") -> Goal:
    return Goal(least=value, unit=unit)


TOLD = Goal()


@dataclass(frozen=True)
class Finding:
    """
    what: the work, in words.
    peer: what it is held against; "" where the value stands alone.
    value: None where there is none, and ``why`` says so.
    own, theirs: what was measured of both, in ``unit``: medians where there were several samples.
    low, high: quartiles of the value.
    clock: "wall" or "processor", of what is in seconds.
    """

    what: str
    peer: str
    goal: Goal
    value: float | None = None
    own: float | None = None
    theirs: float | None = None
    unit: str = "s"
    clock: str = "wall"
    low: float | None = None
    high: float | None = None
    samples: int = 1
    why: str = ""

    @property
    def reached(self) -> bool | None:
        return None if self.value is None else self.goal.reached(self.value)

    def row(self) -> dict:
        """As it stands in a result file."""
        return {**asdict(self), "goal": {**asdict(self.goal), "text": self.goal.text}, "reached": self.reached}


def lacking(what: str, peer: str, goal: Goal, why: str) -> Finding:
    """A comparison that cannot be made here."""
    return Finding(what, peer, goal, why=why)


def number(value: float | None, unit: str, clock: str = "wall") -> str:
    """A measurement as text."""
    if value is None:
        return ""
    return NUMBERS[unit](value) + (" of processor time" if unit == "s" and clock == "processor" else "")


def summary(row: dict) -> str:
    """One line of the terminal."""
    words = f"{row['row']}: {row['what']}"
    if row["value"] is None:
        against = f" against {row['peer']}" if row["peer"] else ""
        return f"{words}{against}: {row['why']}"
    own, theirs = (number(row[side], row["unit"], row["clock"]) for side in ("own", "theirs"))
    against = f", {row['peer']} {theirs}" if theirs else ""
    goal = f", goal {row['goal']['text']}" if row["goal"]["text"] else ""
    verdict = {True: ", reached", False: ", NOT REACHED", None: ""}[row["reached"]]
    return f"{words}: {own}{against}: {NUMBERS[row['goal']['unit']](row['value'])}{goal}{verdict}"
