"""The axes of a declaration: how ``"T 3D"`` is read, and what shape it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a declaration, ``"N"``, ``"2"``, ``"3D"`` or ``"nn"``: ``factor`` times a power of ``letter``.

    The letter of a square must be bound by an earlier argument.
    """

    factor: int
    letter: str
    power: int

    @classmethod
    def parse(cls, text: str) -> Axis:
        letters = text.lstrip("0123456789")
        digits = text.removesuffix(letters)
        return cls(int(digits) if digits else 1, letters[:1], len(letters))

    def size(self, axes: Mapping[str, int]) -> int:
        return self.factor * axes[self.letter] ** self.power if self.letter else self.factor


def sizes(names: str, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that the axes ``names``, for instance ``"T 3D"``, have where ``axes`` gives each letter its size."""
    return tuple(Axis.parse(name).size(axes) for name in names.split())


def letters(names: str) -> set[str]:
    """The letters of ``names``: those of ``"2 n h"`` are n and h."""
    return {Axis.parse(name).letter for name in names.split()} - {""}
