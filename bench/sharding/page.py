"""The result file of ``python -m bench sharding`` as a table."""

from __future__ import annotations

import json

from .. import results, text
from ..report import machine

OUT = results.DIRECTORY / "sharding-gloo.json"


def table() -> str:
    """A row per bar; "" where no result file is committed."""
    if not OUT.exists():
        return ""
    found = json.loads(OUT.read_text())
    lines = [f"{machine(found['setting'])}; commit {found['setting']['commit']}.", ""]
    lines += ["| bar | what | wanted | got | |", "| --- | --- | --- | --- | --- |"]
    for row in found["rows"]:
        kind = row["bar"].partition(" ")[2]
        wanted, got = (_number(kind, row[key]) for key in ("wanted", "got"))
        if wanted == "pass":  # a bar that tests hold
            got = "pass" if row["passed"] else "fail"
        lines.append(f"| {row['bar']} | {row['what']} | {wanted} | {got} | {'yes' if row['passed'] else 'no'} |")
    return "\n".join(lines) + "\n"


def _number(kind: str, x: object) -> str:
    if x is None:
        return "reported"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if not isinstance(x, (int, float)):
        return str(x)
    if kind.startswith("seconds"):
        return text.seconds(x) if x > 0 else f"{x * 1e6:.3g} us"
    return f"{x:.2%}" if kind.startswith("share") else f"{x:,}" if isinstance(x, int) else f"{x:.1e}"
