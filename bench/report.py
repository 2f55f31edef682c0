"""python -m bench.report FILE [...]: markdown tables to the terminal, plots into docs/. From result files only."""

from __future__ import annotations

import argparse
from pathlib import Path

from memkernels._extras import require

from . import results, text

DOCS = Path(__file__).parent.parent / "docs"
WIN, LOSS, GRID, QUIET = "#2b6cb0", "#c05621", "#dfe3e8", "#6b7280"
INCH = 0.235  # height of a row


def machine(row: dict) -> str:
    """Device, threads and instruction set, in words."""
    if row["device"] != "cpu":
        return row["device"]
    return ", ".join(filter(None, (row["processor"], f"{row['threads']} threads", row["isa"])))


def label(row: dict) -> str:
    short = {"float32": "", "bfloat16": " bf16", "float64": " f64", "int64": ""}[row["dtype"]]
    direction = " backward" if row["direction"] == "backward" else ""
    return f"{text.op_name(row)}{direction}{short}  {row['case'].replace('call overhead, ', 'overhead ')}"


def plot(rows: list[dict], path: Path) -> None:
    """Two panels, one line per case: the ratio to the best peer (logarithmic, 1x marked) and the share of a ceiling.

    The ceiling is the one that the case comes closer to, multiply-adds or read bandwidth. Every number stands where no
    bar can reach it.
    """
    from matplotlib.figure import Figure  # so that --help does without

    timed = [row for row in rows if row["unit"] == "s" and row["median"] is not None]
    if not timed:
        raise SystemExit("no row of this file has a time")
    figure = Figure(figsize=(8.6, 1.15 + INCH * len(timed)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _ratios(left, timed)
    beyond = _shares(right, timed)
    left.set_yticks(range(len(timed)), [label(row) for row in timed], fontsize=8)
    left.set_ylim(len(timed) - 0.4, -0.6)
    for axis in (left, right):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    first = timed[0]
    notes = [f"{machine(first)}; memkernels {first['memkernels']}, torch {first['torch']}"]
    if any(row["ratio"] is None for row in timed):
        notes.append("no peer: no other implementation of this case was at hand")
    if beyond:
        notes.append("above 100 %: the kernel leaves out work that the definition of the op counts")
    figure.suptitle("\n".join(notes), fontsize=8, color=QUIET)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _ratios(axis, timed: list[dict]) -> None:
    known = [row["ratio"] for row in timed if row["ratio"] is not None] or [1]
    for i, row in enumerate(timed):
        ratio = row["ratio"]
        words, end, colour = "no peer", 1, QUIET
        if ratio is not None:
            axis.barh(i, ratio - 1, left=1, color=WIN if ratio >= 1 else LOSS, height=0.65)
            digits = 0 if ratio >= 10 else 2 if ratio < 1 else 1
            words, end, colour = f"{ratio:.{digits}f}x {row['best_peer']}", max(1, ratio), "black"
        where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5, "color": colour}
        axis.annotate(words, (end, i), **where)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(0.8, *known) / 1.3, max(2, *known) * 8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_xlabel("times as fast as the best peer", fontsize=8)


def _shares(axis, timed: list[dict]) -> bool:
    """Bars to 100 %, an arrow where a share is larger, all numbers in a column; whether there was such a share."""
    beyond = False
    for i, row in enumerate(timed):
        shares = {"multiply-adds": row["peak_share"] or 0.0, "bandwidth": row["bandwidth_share"] or 0.0}
        name = max(shares, key=shares.get)
        share = shares[name]
        axis.barh(i, min(share, 1), color=WIN, height=0.65)
        if share > 1:
            beyond = True
            axis.plot(1.03, i, marker=">", markersize=5, color=WIN, clip_on=False)
        axis.annotate(f"{share:.0%} {name}", (1.09, i), va="center", fontsize=7.5, annotation_clip=False)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlim(0, 1.75)
    axis.set_xticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
    axis.set_xlabel("share of the measured ceiling", fontsize=8, loc="left")
    return beyond


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the plots")
    options = parser.parse_args(arguments)
    require(parser.prog, "matplotlib")
    for file in options.files:
        rows = results.load(file)
        first = rows[0]
        print(f"\n### {machine(first)}\n")
        print(f"torch {first['torch']}, commit {first['commit']}, {first['date']}. ", end="")
        print(f"{text.bandwidth_name(first).capitalize()} {text.bandwidths(rows)}; multiply-add peak ", end="")
        peaks = {row["dtype"]: row["peak"] for row in rows if row["peak"]}
        print(", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in peaks.items()) + ".\n")
        print(text.markdown(rows))
        picture = options.docs / f"performance-{file.stem}.png"
        plot(rows, picture)
        print(f"\n![ratio to the best peer, and share of the ceiling]({picture.name})")


if __name__ == "__main__":
    main()
