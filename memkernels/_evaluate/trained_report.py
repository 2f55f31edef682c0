"""The report of memories trained alone: a table, a table of documents, a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .report import percent
from .trained import perplexities


def table(result: dict[str, Any]) -> str:
    """Markdown: one line per manual and thing trained, and one for the model alone."""
    text = (
        "| trained on | what | parameters | of one token | rate | steps, tokens | processor s | perplexity | change |"
    )
    groups = [name for run in result["runs"] for name in _groups(run)]
    other = next((name for name in groups if name not in {run["texts"] for run in result["runs"]}), None)
    text += f" {other}: change |\n" if other else "\n"
    text += "| --- " * (10 if other else 9) + "|\n"
    for run in result["runs"]:
        found = {name: perplexities(rows) for name, rows in _groups(run).items()}
        own = found[run["texts"]]
        cells = [run["texts"], "nothing", *[""] * 5, f"{own['']:.2f}", ""] + ([""] if other else [])
        text += "| " + " | ".join(cells) + " |\n"
        for row in run["trained"]:
            cells = [run["texts"], row["name"], f"{row['parameters']:,}", f"{row['active']:,}", f"{row['rate']:g}"]
            cells += [f"{row['best step']} of {row['steps']}, {row['tokens']:,}", f"{row['processor seconds']:,.0f}"]
            cells += [f"{own[row['name']]:.2f}", f"**{percent(own[row['name']] / own[''] - 1)}**"]
            if other:
                cells.append(percent(found[other][row["name"]] / found[other][""] - 1) if other in found else "")
            text += "| " + " | ".join(cells) + " |\n"
    return text


def _groups(run: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The measured documents by whose they are, the manual first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run["test"]:
        groups.setdefault(row["texts"], []).append(row)
    return groups


def _changes(row: dict[str, Any]) -> dict[str, float]:
    return {name: math.expm1(nats - row["nats"][""]) for name, nats in row["nats"].items() if name}


def documents(result: dict[str, Any]) -> str:
    """Markdown: the change of perplexity of every document, by each that was trained."""
    text = ""
    for run in result["runs"]:
        names = [row["name"] for row in run["trained"]]
        text += f"| texts | document, trained on {run['texts']} | tokens | perplexity | " + " | ".join(names) + " |\n"
        text += "| --- " * (4 + len(names)) + "|\n"
        for row in run["test"]:
            cells = [row["texts"], row["document"], f"{row['tokens']:,}", f"{math.exp(row['nats']['']):.2f}"]
            text += "| " + " | ".join([*cells, *(percent(_changes(row)[name]) for name in names)]) + " |\n"
        text += "\n"
    return text


def draw(result: dict[str, Any], path: Path) -> Path:
    """The loss of the validation documents by steps, a panel per manual."""
    import matplotlib.pyplot as plt

    from .._figure import STYLE

    with plt.rc_context(STYLE):
        count = len(result["runs"])
        figure, axes = plt.subplots(1, count, figsize=(5 * count, 3.4), layout="constrained", squeeze=False)
        for ax, run in zip(axes[0], result["runs"]):
            for row in run["trained"]:
                steps, losses = zip(*row["validation"])
                ax.plot(
                    [0, *steps], [math.exp(x) for x in (run["validation nats without"], *losses)], label=row["name"]
                )
            ax.set_title(f"{run['texts']}: validation documents")
            ax.set_xlabel("steps")
            ax.set_ylabel("perplexity")
            ax.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path
