"""python -m bench.report FILE [...]: markdown tables to the terminal, plots into docs/. From result files only."""

from __future__ import annotations

import argparse
from pathlib import Path

from memkernels._extras import require

from . import results, text

DOCS = Path(__file__).parent.parent / "docs"
WIN, LOSS, CEILING = "#2b6cb0", "#c05621", "#a0aec0"


def machine(row: dict) -> str:
    """Device, threads and instruction set, in words."""
    if row["device"] != "cpu":
        return row["device"]
    return ", ".join(filter(None, (row["processor"], f"{row['threads']} threads", row["isa"])))


def label(row: dict) -> str:
    short = {"float32": "", "bfloat16": " bf16", "float64": " f64"}[row["dtype"]]
    direction = " backward" if row["direction"] == "backward" else ""
    return f"{text.op_name(row)}{direction}{short}  {row['case'].replace('call overhead, ', 'overhead ')}"


def plot(rows: list[dict], path: Path) -> None:
    """Two panels, one line per case: the ratio to the best peer (logarithmic, 1x marked) and the share of a ceiling.

    The ceiling is the one that the case comes closer to, multiply-adds or read bandwidth.
    """
    timed = [row for row in rows if row["unit"] == "s" and row["median"] is not None]
    if not timed:
        raise SystemExit("no row of this file has a time")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.27 * len(timed)), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    lines = range(len(timed))
    ratios = [row["ratio"] for row in timed]
    with_ratio = [i for i in lines if ratios[i] is not None]
    colours = [WIN if ratios[i] >= 1 else LOSS for i in with_ratio]
    left.barh(with_ratio, [ratios[i] - 1 for i in with_ratio], left=1, color=colours, height=0.65)
    for i in with_ratio:
        ahead = ratios[i] >= 1
        left.annotate(
            f"{ratios[i]:.{0 if ratios[i] >= 10 else 2 if ratios[i] < 1 else 1}f}x {timed[i]['best_peer']}",
            (ratios[i], i),
            xytext=(4 if ahead else -4, 0),
            textcoords="offset points",
            ha="left" if ahead else "right",
            va="center",
            fontsize=7,
        )
    left.axvline(1, color="black", linewidth=1)
    left.set_xscale("log", base=2)
    known = [ratios[i] for i in with_ratio] or [1]
    left.set_xlim(min(0.5, *known) / 2, max(2, *known) * 3)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    left.set_xlabel("times as fast as the best peer")
    left.set_yticks(lines, [label(row) for row in timed], fontsize=7)
    left.invert_yaxis()

    for i, row in enumerate(timed):
        shares = {"multiply-adds": row["peak_share"] or 0.0, "bandwidth": row["bandwidth_share"] or 0.0}
        name = max(shares, key=shares.get)
        right.barh(i, shares[name], color=WIN, height=0.65)
        right.annotate(
            f"{shares[name]:.0%} {name}",
            (shares[name], i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    right.axvline(1, color="black", linewidth=1)
    right.set_xlim(0, 1.45)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_xlabel("share of the measured ceiling")
    for axis in (left, right):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color=CEILING, linewidth=0.4)
        axis.set_axisbelow(True)
    first = timed[0]
    versions = f"memkernels {first['memkernels']}, torch {first['torch']}"
    figure.suptitle(f"{machine(first)}; {versions}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
