"""The report of an evaluation: a table, a JSON file, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measure import change


def percent(share: float) -> str:
    return f"{100 * share:+.1f}%"


def table(result: dict[str, Any]) -> str:
    """Markdown: one line per manual and context, then bytes and time, then one line per document."""
    text = "| texts | context | documents | tokens | perplexity without | with | change | time to score | hit rate |\n"
    text += "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    for run in result["runs"]:
        t = run["total"]
        cells = [run["texts"], f"{t['window']:,}", str(t["documents"]), f"{t['tokens']:,}"]
        cells += [f"{t['perplexity without']:.2f}", f"{t['perplexity with']:.2f}", f"**{percent(t['change'])}**"]
        cells += [percent(t["time"]), f"{100 * t['hit rate']:.0f}%"]
        text += "| " + " | ".join(cells) + " |\n"
    text += "\n| memory | records | bytes per record | MB in all | tokens/s scoring without | with "
    text += "| tokens/s one by one without | with | time one by one |\n"
    text += "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    for name, store in result["stores"].items():
        t = next(run["total"] for run in result["runs"] if run["store"] == name)
        d = store["decoding"]
        cells = [name, f"{store['records']:,}", f"{store['bytes per slot']}", f"{store['bytes'] / 1e6:.1f}"]
        cells += [f"{t[f'tokens/s {word}']:,.0f}" for word in ("without", "with")]
        cells += [f"{1 / d[f'seconds {word}']:.1f}" for word in ("without", "with")]
        cells += [percent(d["processor seconds with"] / d["processor seconds without"] - 1)]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def documents(result: dict[str, Any]) -> str:
    """Markdown: the change of every document, those that lose by the memory included."""
    text = "| texts | document | tokens | change of perplexity | context |\n| --- | --- | --- | --- | --- |\n"
    for run in result["runs"]:
        for row in run["documents"]:
            cells = [run["texts"], row["document"], f"{row['tokens']:,}", percent(change(row)), f"{row['window']:,}"]
            text += "| " + " | ".join(cells) + " |\n"
    return text


def draw(result: dict[str, Any], path: Path) -> Path:
    """The change of every document as a bar, by manual."""
    import matplotlib.pyplot as plt

    from .._figure import FUSED, OTHER, STYLE

    runs = [run for run in result["runs"] if run["total"]["window"] == result["window"]]
    rows = [(run["texts"], row) for run in runs for row in sorted(run["documents"], key=change)]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8, 0.28 * len(rows) + 1.2), layout="constrained")
        changes = [100 * change(row) for _, row in rows]
        ax.barh(range(len(rows)), changes, color=[FUSED if x < 0 else OTHER for x in changes])
        ax.set_yticks(range(len(rows)), [f"{texts}: {row['document']}" for texts, row in rows], fontsize=8)
        ax.invert_yaxis()
        ax.axvline(0, color="#22262b", lw=0.8)
        ax.set_xlabel("change of perplexity, %")
        means = ", ".join(f"{run['texts']} {percent(run['total']['change'])}" for run in runs)
        ax.set_title(f"A memory beside a frozen {result['model']}: {means}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path
