"""Result files as tables of the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import results
from ..report import machine
from .finding import NUMBERS, number

HEADER = ("what", "own", "against", "of the peer", "value", "quartiles", "goal", "reached")


def files(subject: str) -> list[Path]:
    """The committed results of ``python -m bench SUBJECT``."""
    return sorted(results.DIRECTORY.glob(f"{subject}-*.json"))


def cells(row: dict) -> tuple[str, ...]:
    """One finding, in the order of ``HEADER``."""
    value = NUMBERS[row["goal"]["unit"]]
    measured = row["value"] is not None
    alone = row["own"] == row["value"] and not row["peer"]  # the value is the measurement itself
    return (
        row["what"],
        number(row["own"], row["unit"], row["clock"]) if measured else row["why"],
        row["peer"],
        number(row["theirs"], row["unit"], row["clock"]),
        value(row["value"]) if measured and not alone else "",
        f"{value(row['low'])} .. {value(row['high'])}" if row["low"] is not None else "",
        row["goal"]["text"],
        {True: "yes", False: "no", None: ""}[row["reached"]],
    )


def table(rows: Sequence[dict], own: str) -> str:
    header = [own if word == "own" else word for word in HEADER]
    lines = [header, ("---",) * len(HEADER), *map(cells, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def page(rows: Sequence[dict], own: str) -> str:
    """A machine's rows, under what they were measured with. ``own``: the head of the library's column."""
    newest = max(rows, key=lambda row: row["date"])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    peers = "".join(f", {name} {version}" for name, version in newest["versions"].items())
    made = f"torch {newest['torch']}{peers}; commit {commits}, {newest['date'][:10]}"
    return f"{machine(newest)}, {newest['filesystem']}; {made}.\n\n{table(rows, own)}"
