"""What a case of the contract grid is, and the sizes that it has where it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .._axes import letters
from ..spec import Op

SIZES = MappingProxyType(
    {"T": 7, "N": 33, "K": 16, "V": 24, "k": 4, "S": 3, "D": 20, "H": 3, "W": 50, "n": 6, "h": 8, "F": 6}
    | {"B": 3, "M": 6, "J": 3, "P": 2, "I": 2}
)
UNMET = 5  # size of an axis that no case names


@dataclass(frozen=True)
class Case:
    """One situation. An op takes it when it has all of ``needs``: axes, arguments, options, results (``"-> read"``),
    traits.

    sizes: axis -> size. tokens, memory: leading dimensions of the two sides; ``leads`` overrides them by argument.
    give: argument -> how it is filled where that is not the usual way (a function name of ``inputs.py``), or ``""`` for
        the usual way; optional arguments that are not named are left out.
    layout: how tensors lie in memory. params: option -> value.
    wants: arguments that require a gradient (default: all float ones). cotangents: results that have a gradient.
    mixed: float32 content beside a 16-bit query (only such dtypes take the case).
    exact: arithmetic has no rounding here, so chosen slots must be those of the reference, ties included.
    quick: one of the cases that find most mistakes.
    """

    name: str
    needs: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    tokens: tuple[int, ...] = (2,)
    memory: tuple[int, ...] = (2,)
    leads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    give: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, object] = field(default_factory=dict)
    layout: str = "contiguous"
    wants: tuple[str, ...] | None = None
    cotangents: tuple[str, ...] | None = None
    mixed: bool = False
    exact: bool = False
    quick: bool = False

    def fits(self, op: Op) -> bool:
        without = {a.name for a in op.args if not a.is_float}
        return set(self.needs) <= _names(op) and not without.intersection(self.wants or ())


def _names(op: Op) -> set[str]:
    names = {*op.traits, *(a.name for a in op.args), *(f"-> {o.name}" for o in op.outputs), *(n for n, _ in op.params)}
    names = names.union(*(letters(a.axes) for a in op.args), *(letters(o.axes) for o in op.outputs))
    return names | ({"mixed"} if any(a.dtype in ("content", "table") for a in op.args) else set())


def of_sizes(**sizes: int) -> Mapping[str, int]:
    return sizes
