"""Plain text for people: the table of a finished grid."""

from __future__ import annotations

from collections.abc import Sequence

from .grid import Row


def summary(rows: Sequence[Row]) -> str:
    """One line per op and backend: for every dtype the largest error, and the largest share of what is allowed."""
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    lines = [("op", "backend", *dtypes, "rows", "")]
    for op, backend in dict.fromkeys((r.op, r.backend) for r in rows):
        mine = [r for r in rows if (r.op, r.backend) == (op, backend)]
        failed, gaps = sum(not r.passed for r in mine), sum(r.gap for r in mine)
        cells = []
        for dtype in dtypes:
            some = [r for r in mine if r.dtype == dtype]
            shares = [r.error / r.tolerance for r in some if r.tolerance and r.error == r.error]
            worst = f"{max(r.error for r in some if r.error == r.error):.1e}" if shares else "-"
            cells.append(worst + (f" ({max(shares):.0%})" if shares else ""))
        state = f"{failed} FAILED" if failed else ("no kernel" if gaps == len(mine) else "ok")
        lines.append((op, backend, *cells, str(len(mine) - gaps), state))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * w for w in widths).rstrip())
    return "\n".join([*text, "", "largest error against the float64 reference (largest share of what is allowed)"])


def report(rows: Sequence[Row], limit: int = 40) -> str:
    """The summary, then every failed row up to ``limit``, what has no kernel, then the count."""
    failed = [r for r in rows if not r.passed]
    text = [summary(rows)] if rows else []
    if failed:
        text += ["", *(str(r) for r in failed[:limit])]
        if len(failed) > limit:
            text.append(f"... and {len(failed) - limit} more")
    ran, gaps = sum(not r.gap for r in rows), list(dict.fromkeys(r.message for r in rows if r.gap))
    text += ["", *gaps] if gaps else []
    text += ["", f"{ran - len(failed)} of {ran} passed" + (f", {len(failed)} failed" if failed else "")]
    return "\n".join(text)
