"""The picture of the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the back end is chosen

from ._speed import EAGER, Timing

if TYPE_CHECKING:
    from .demo import Training

FUSED, REFERENCE, OTHER, INK = "#0b6e99", "#f0a030", "#8a8f98", "#22262b"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8bcc2",
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(folder: Path, training: Training, timings: list[Timing]) -> Path:
    """Loss curves, their difference and the time of each op, as ``folder/demo.png``; returns its absolute path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "demo.png").resolve()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 6), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(1, 1.15))
        losses = figure.add_subplot(grid[0, 0])
        _losses(losses, training)
        _difference(figure.add_subplot(grid[1, 0], sharex=losses), training)
        _times(figure.add_subplot(grid[:, 1]), timings)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _losses(ax, training: Training) -> None:
    ax.plot(_smooth(training.without.losses), color=OTHER, lw=1.2, label="trained without memory")
    ax.plot(_smooth(training.fused.losses), color=FUSED, lw=1.6, label="fused")
    ax.plot(_smooth(training.reference.losses), color=REFERENCE, lw=4, alpha=0.6, label="reference", zorder=1)
    n = training.compared
    fast, slow = training.fused.tokens_per_second(n), training.reference.tokens_per_second(n)
    ax.set_title(f"Training: {fast:,.0f} tokens/s fused, {slow:,.0f} reference ({fast / slow:.1f}x)")
    ax.set_ylabel("loss, nats per byte")
    ax.legend(loc="upper right", title="mean of 10 steps", alignment="left")
    text = "held-out bits per byte\n" + "\n".join(f"{value:.3f}  {name}" for name, value in training.bits.items())
    ax.text(0.03, 0.05, text, transform=ax.transAxes, va="bottom", linespacing=1.5)


def _difference(ax, training: Training) -> None:
    ax.semilogy([max(d, 1e-9) for d in training.difference], color=FUSED, lw=1.2)
    ax.set_title("Fused minus reference", fontsize=10)
    ax.set_ylabel("relative")
    ax.set_xlabel("step")


def _times(ax, timings: list[Timing]) -> None:
    """A dot per variant on a line per op; the number is how many times as long as fused."""
    looks = {
        "reference": (REFERENCE, "reference (plain formula)"),
        EAGER: (OTHER, "PyTorch's own operators"),
        "fused": (FUSED, "fused"),
    }
    for y, timing in enumerate(timings):
        times = timing.ms.values()
        ax.plot([min(times), max(times)], [y, y], color="#d5d8dc", lw=2, zorder=1)
        for name, ms in timing.ms.items():
            ax.scatter(ms, y, s=70, color=looks[name][0], zorder=3, label=looks[name][1] if y == 0 else None)
            if name != "fused":
                above = (0, 8) if name == EAGER else (0, -16)
                ax.annotate(
                    f"{ms / timing.ms['fused']:.1f}x",
                    (ms, y),
                    above,
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    ax.set_xscale("log")
    ax.set_ylim(len(timings) - 0.4, -0.9)
    ax.set_yticks(range(len(timings)), [f"{t.case.name}\n{t.case.sizes}" for t in timings], fontsize=8.5)
    ax.set_xlabel("median milliseconds, float32, K = V = 64 (log scale; left is faster)")
    ax.set_title("Time of each op; numbers: times as long as fused")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right", reverse=True)


def _smooth(curve: list[float], width: int = 10) -> list[float]:
    """Mean over the last ``width`` steps."""
    return [sum(part) / len(part) for part in (curve[max(0, i - width + 1) : i + 1] for i in range(len(curve)))]
