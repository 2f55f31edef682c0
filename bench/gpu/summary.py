"""The end of a check: a table, what failed, speeds, one line, and the same as ``summary.json``."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Sequence

from .. import text
from . import rows
from .rows import FAILED, GAP, PASSED
from .stages import Check

LIMIT = 40  # failed rows that are printed; the file has all


def counts(found: Sequence[dict]) -> dict[str, int]:
    number = Counter(row["status"] for row in found)
    return {status: number[status] for status in (PASSED, FAILED, GAP)}


def cases(check: Check) -> dict[str, list[int]]:
    """Of the smoke and of the whole grid: how many cases are done, of how many."""
    result = {}
    rounds = vars(check).get("plan", {}).get("rounds", [])
    for stage, tasks in (("smoke", rounds[:1]), ("grid", rounds)):
        jobs = [job for some in tasks for job in check.jobs(stage, some)]
        number = sum(len(job.tasks) for job in jobs)
        result[stage] = [number - sum(len(job.left(check.rows)) for job in jobs), number]
    return result


def contract(found: Sequence[dict]) -> str:
    """A line for each op on each backend: counts, and the largest error as a share of what is allowed."""
    lines = [("op", "backend", "passed", "failed", "gaps", "largest error", "of what is allowed")]
    own = [row for row in found if rows.key(row)[0] == "grid"]
    for op, backend in dict.fromkeys((row["op"], row["backend"]) for row in own):
        mine = [row for row in own if (row["op"], row["backend"]) == (op, backend)]
        number = counts(mine)
        shares = [
            (r["error"] / r["tolerance"], r["error"]) for r in mine if r.get("error") is not None and r["tolerance"]
        ]
        worst = (f"{max(shares)[1]:.1e}", f"{max(shares)[0]:.0%}") if shares else ("-", "-")
        lines.append((op, backend, *map(str, number.values()), *worst))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def render(check: Check) -> str:
    """Everything but the last line."""
    found = list(check.rows)
    parts = [contract(found)]
    timed = [row["speed"] for row in found if row.get("speed")]
    parts += [text.plain(timed)] if timed else []
    gaps = Counter(row["message"].removeprefix(f"{row['op']}: ") for row in found if row["status"] == GAP)
    parts += ["\n".join(f"gap: {why} ({number} rows)" for why, number in gaps.items())] if gaps else []
    failed = [rows.describe(row) for row in found if row["status"] == FAILED]
    if failed:
        more = [f"... and {len(failed) - LIMIT} more"] if len(failed) > LIMIT else []
        parts.append("\n".join(["failed:", *failed[:LIMIT], *more]))
    return "\n\n".join(parts)


def facts(check: Check, began: str) -> dict:
    """What ``summary.json`` holds."""
    found, plan = list(check.rows), vars(check).get("plan", {})
    number = counts(found)
    return {
        "device": check.device,
        "environment": plan.get("environment"),
        "versions": plan.get("versions"),
        "missing": plan.get("missing"),
        "began": began,
        "ended": now(),
        "rows": check.rows.path.name,
        "counts": number,
        "stages": {s: counts([r for r in found if r["stage"] == s]) for s in dict.fromkeys(r["stage"] for r in found)},
        "cases": cases(check),
        "timed": sum(bool(row.get("speed")) for row in found),
        "status": int(number[FAILED] > 0),
    }


def line(check: Check, facts: dict) -> str:
    """The whole check in one line."""
    number, (few, all_few), (many, all_many) = facts["counts"], *facts["cases"].values()
    name = (facts["environment"] or facts)["device"]
    parts = [f"{number[PASSED]} rows passed", f"{number[FAILED]} failed", f"{number[GAP]} gaps"]
    parts += [f"smoke {few} of {all_few} cases", f"grid {many} of {all_many}", f"{facts['timed']} timed"]
    return f"gpu-check on {name}: {', '.join(parts)}; {check.rows.path}"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def save(check: Check, facts: dict) -> None:
    (check.folder / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
