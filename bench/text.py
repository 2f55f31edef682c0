"""Numbers and rows as text: one set of words for the terminal and for the report."""

from __future__ import annotations

import re

HEADER = (
    "op",
    "case",
    "direction",
    "dtype",
    "median",
    "quartiles",
    "peers",
    "ratio",
    "peak",
    "read bw",
    "goal",
    "reached",
)


def seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def size(value: float) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.3g} {unit}"
    return f"{value:.0f} B"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def op_name(row: dict) -> str:
    """The op, and on a GPU, where there are several, the backend."""
    return row["op"] if row["backend"] in ("", "cpu") else f"{row['op']} ({row['backend']})"


def median(row: dict) -> str:
    """The time of a call; on a GPU also what it takes the processor, and how it was timed where that is not a graph."""
    number = seconds if row["unit"] == "s" else size
    host = "" if row.get("host") is None else f", host {seconds(row['host'])}"
    return number(row["median"]) + host + (", by events" if row.get("timed") == "events" else "")


def bandwidth_name(row: dict) -> str:
    """Which bandwidth the ceiling of a row is."""
    return "read bandwidth" if row["device"] == "cpu" else "copy bandwidth"


def bandwidths(rows: list[dict]) -> str:
    """The bandwidths around the cases of a run, least and best."""
    found = [row["bandwidth"] / 1e9 for row in rows]
    return f"{min(found):.1f} to {max(found):.1f} GB/s"


def columns(row: dict) -> tuple[str, ...]:
    """One row of the table, in the order of ``HEADER``."""
    number = seconds if row["unit"] == "s" else size
    words = []
    for name, peer in row["peers"].items():
        words.append(f"{name} {number(peer['median']) if peer['median'] is not None else '-'}")
    measured = row["median"] is not None
    return (
        op_name(row),
        row["case"],
        row["direction"],
        row["dtype"],
        median(row) if measured else row["why"] or "-",
        f"{number(row['low'])} .. {number(row['high'])}" if measured and row["unit"] == "s" else "",
        ", ".join(words),
        f"{row['ratio']:.2f}x {row['best_peer']}" if row["ratio"] is not None else "",
        share(row["peak_share"]),
        share(row["bandwidth_share"]),
        "; ".join(map(goal_words, row["goals"])),
        {True: "yes", False: "; ".join(["no", *beyond(row)]), None: ""}[row["reached"]],
    )


def beyond(row: dict) -> list[str]:
    """The goals of a row, multiples of a peer, that no kernel could reach: they are more than a ceiling.

    Shares count the work of the op as it is defined. Above 1 a kernel leaves work out; then nothing follows.
    """
    near = max(row["peak_share"] or 0.0, row["bandwidth_share"] or 0.0)
    found = []
    for goal in row["goals"]:
        times = re.match(r"([\d.]+)x ", goal["goal"])
        if not times or not goal["value"] or goal["reached"] is not False or near > 1:
            continue
        needed = near * float(times[1]) / goal["value"]
        if needed > 1:
            found.append(f"{goal['goal']} would be {needed:.0%} of the ceiling")
    return found


def goal_words(goal: dict) -> str:
    """A goal, how near it is, and what there is to say of how it was judged."""
    notes = filter(None, ("" if goal["value"] is None else goal_value(goal), goal.get("why")))
    noted = ", ".join(notes)
    return f"{goal['goal']} ({noted})" if noted else goal["goal"]


def goal_value(goal: dict) -> str:
    value = goal["value"]
    if "[T, N]" in goal["goal"]:
        return f"1/{1 / value:.0f}" if value else "0"
    if "time of" in goal["goal"]:
        return f"{1 / value:.2f}x"
    return f"{value:.2f}x" if "x " in goal["goal"] else f"{value:.0%}"


def markdown(rows: list[dict]) -> str:
    """A table. Rows that lose stand beside those that win."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in columns(row)) + " |" for row in rows]
    return "\n".join(lines)


def plain(rows: list[dict]) -> str:
    """The same table, aligned for a terminal, without the peers' own times."""
    skip = HEADER.index("peers")
    table = [tuple(c for i, c in enumerate(line) if i != skip) for line in (HEADER, *map(columns, rows))]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in table)
