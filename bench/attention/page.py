"""The table of ``python -m bench attention`` on the page of pretrained models."""

from __future__ import annotations

import json
from pathlib import Path

from .. import results


def tables(folder: Path = results.DIRECTORY) -> str:
    """Milliseconds of a call, and how many times as fast it is, by case and dtype; a table per result file."""
    found = []
    for file in sorted(folder.glob("attention-*.json")):
        result = json.loads(file.read_text())
        where = result["setting"]
        text = f"{where['processor']}, {where['threads']} thread; transformers {where['transformers']}, "
        text += f"torch {where['torch']}, commit {where['commit']}, {where['date'][:10]}.\n\n"
        text += "| call | dtype | served by | memkernels, ms | sdpa, ms | eager, ms | times as fast as sdpa "
        text += "| as eager | as sdpa, 30 layers and mask |\n" + "| --- " * 9 + "|\n"
        for row in result["rows"]:
            ms = row["milliseconds"]
            cells = [row["case"], row["dtype"], row["goes to"]]
            cells += [f"{ms[name]:.2f}" for name in ("memkernels", "sdpa", "eager")]
            ratios = ("sdpa over memkernels", "eager over memkernels", "sdpa over memkernels, 30 layers and mask")
            cells += [f"{row[name]:.2f}x" for name in ratios]
            text += "| " + " | ".join(cells) + " |\n"
        found.append(text)
    return "\n".join(found)
