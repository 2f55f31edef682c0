"""What the ratios of a run say together: geometric mean, losses, the worst; as text and as tables of the docs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import results, text
from ..report import machine

LOSS = 0.95  # a ratio below this is a loss


@dataclass(frozen=True)
class Summary:
    """
    cases: rows, of which ``compared`` have a ratio and ``wrong`` a result that is not right.
    mean: geometric mean of the ratios, None without any.
    losses: rows below ``LOSS``, the worst first. worst: the row with the smallest ratio.
    """

    cases: int
    compared: int
    wrong: list[dict]
    mean: float | None
    losses: list[dict]
    worst: dict | None

    @classmethod
    def of(cls, rows: Iterable[dict]) -> Summary:
        rows = list(rows)
        compared = sorted((row for row in rows if row["ratio"] is not None), key=lambda row: row["ratio"])
        return cls(
            cases=len(rows),
            compared=len(compared),
            wrong=[row for row in rows if row["why"]],
            mean=statistics.geometric_mean(row["ratio"] for row in compared) if compared else None,
            losses=lost(compared),
            worst=compared[0] if compared else None,
        )

    def line(self) -> str:
        """In one sentence."""
        words = f"{self.compared} of {self.cases} cases compared"
        if self.wrong:
            words += f", {len(self.wrong)} without a right result"
        if self.worst is None:
            return f"{words}."
        losses = f"{len(self.losses)} {'loss' if len(self.losses) == 1 else 'losses'} (below {LOSS:g}x)"
        return f"{words}: geometric mean {self.mean:.2f}x, {losses}, worst {self.worst['ratio']:.2f}x."


def lost(rows: Iterable[dict], below: float = LOSS) -> list[dict]:
    """The rows with a ratio below that, the smallest first."""
    return sorted((row for row in rows if row["ratio"] is not None and row["ratio"] < below), key=lambda r: r["ratio"])


def line(row: dict) -> str:
    """A row of the terminal."""
    if row["why"]:
        return f"{row['key']}: {row['why']}"
    if row["ratio"] is None:
        reasons = "; ".join(f"{name}: {peer['why']}" for name, peer in row["peers"].items())
        return f"{row['key']}: {text.seconds(row['ours'])}, no peer ({reasons})"
    peer = f"{row['best_peer']} {text.seconds(row['peers'][row['best_peer']]['median'])}"
    return f"{row['key']}: {text.seconds(row['ours'])}, {peer}, {quartiles(row)}"


def quartiles(row: dict) -> str:
    return f"{row['ratio']:.2f}x ({row['low']:.2f} .. {row['high']:.2f})"


def files() -> list[Path]:
    """The committed results of full runs."""
    return sorted(results.DIRECTORY.glob("everyday-*.json"))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    shown = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in shown)


def by_op(rows: Sequence[dict]) -> str:
    """A line per op."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        one = Summary.of(row for row in rows if row["op"] == op)
        worst = "" if one.worst is None else f"{one.worst['ratio']:.2f}x"
        where = "" if one.worst is None else f"{_case(one.worst)}; {one.worst['best_peer']}"
        lines.append(
            (op, str(one.cases), "" if one.mean is None else f"{one.mean:.2f}x", str(len(one.losses)), worst, where)
        )
    return _table(("op", "cases", "geometric mean", "losses", "worst", "where"), lines)


def _case(row: dict) -> str:
    kind = "" if row["dtype"] != "bfloat16" else ", bfloat16"
    return f"{row['case']}{', step' if row['direction'] == 'step' else ''}{kind}"


def losses(rows: Sequence[dict]) -> str:
    """A line per case that loses."""
    lines = [
        (row["op"], _case(row), text.seconds(row["ours"]), row["best_peer"], f"{row['ratio']:.2f}x",
         f"{row['low']:.2f} .. {row['high']:.2f}")
        for row in Summary.of(rows).losses
    ]  # fmt: skip
    return _table(("op", "case", "time", "best peer", "ratio", "quartiles"), lines)


def page(rows: Sequence[dict]) -> str:
    """A machine's run: its ops, then every loss."""
    first, summary = rows[0], Summary.of(rows)
    made = f"{machine(first)}; torch {first['torch']}, commit {first['commit']}, {first['date'][:10]}."
    words = f"{made}\n\n{summary.line()}\n\n{by_op(rows)}"
    wrong = "".join(f"- {row['key']}: {row['why']}\n" for row in summary.wrong)
    words += f"\nWithout a right result:\n\n{wrong}" if wrong else ""
    return words + (f"\n{losses(rows)}" if summary.losses else "")
