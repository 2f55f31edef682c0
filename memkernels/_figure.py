"""The picture of the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the back end is chosen

from ._speed import EAGER, Timing

if TYPE_CHECKING:
    from .demo import Training

FUSED, REFERENCE, OTHER, INK = "#0b6e99", "#f0a030", "#8a8f98", "#22262b"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8bcc2",
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(folder: Path, training: Training, timings: list[Timing]) -> Path:
    """Draw the time of each op and, if training was finished, its curves to ``folder/demo.png``; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "demo.png").resolve()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13 if training.complete else 7.5, 6.5), layout="constrained")
        if training.complete:
            panels: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.03)
            left, right = panels
            losses, difference, bits = left.subplots(3, height_ratios=(3, 1, 1))
            _losses(losses, training)
            _difference(difference, training)
            _bits(bits, training)
        else:
            right = figure.subfigures()
        _times(right.subplots(), timings)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _losses(ax, training: Training) -> None:
    ax.plot(_smooth(training.without.losses), color=OTHER, lw=1.2, label="trained without memory")
    ax.plot(_smooth(training.fused.losses), color=FUSED, lw=1.6, label="fused")
    n = training.compared
    ax.plot(
        _smooth(training.reference.losses), color=REFERENCE, lw=4, alpha=0.6, label=f"reference, {n} steps", zorder=1
    )
    fast, slow = training.fused.tokens_per_second(n), training.reference.tokens_per_second(n)
    ax.set_xlabel("step")
    ax.set_title(f"Training: {fast:,.0f} tokens/s fused, {slow:,.0f} reference ({fast / slow:.1f}x)")
    ax.set_ylabel("loss, nats per byte")
    ax.legend(loc="upper right", title="mean of 10 steps", alignment="left")


def _difference(ax, training: Training) -> None:
    ax.semilogy([max(d, 1e-9) for d in training.difference], color=FUSED, lw=1.2)
    ax.set_title(f"Difference of fused and reference losses, first {training.compared} steps", fontsize=10)
    ax.set_ylabel("relative")


def _bits(ax, training: Training) -> None:
    """A bar per model, its number at the end."""
    names, values = list(training.bits), list(training.bits.values())
    bars = ax.barh(range(len(names)), values, color=(FUSED, "#8fc1d4", "#c3c7cd"), height=0.8)
    ax.bar_label(bars, fmt="%.3f", padding=4, fontsize=9)
    for y, (name, colour) in enumerate(zip(names, ("white", INK, INK))):
        ax.annotate(name, (0, y), (6, 0), textcoords="offset points", va="center", fontsize=9, color=colour)
    ax.set_title("Held-out bits per byte; lower is better", fontsize=10)
    ax.set_xlim(0, 1.15 * max(values))
    ax.set_axis_off()
    ax.invert_yaxis()


def _times(ax, timings: list[Timing]) -> None:
    """A line per op with a dot per variant. The number is its time as a multiple of the fused time."""
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
                words = _times_as_long(ms / timing.ms["fused"])
                ax.annotate(words, (ms, y), above, textcoords="offset points", ha="center", fontsize=8)
    ax.set_xscale("log")
    ax.margins(x=0.08)
    ax.set_ylim(len(timings) - 0.4, -0.7)
    ax.set_yticks(range(len(timings)), [f"{t.case.name}\n{t.case.sizes}" for t in timings], fontsize=8.5)
    ax.set_xlabel("median milliseconds, float32, K = V = 64 (log scale; left is faster)")
    ax.set_title("Time of each op; numbers: times as long as fused", pad=30)
    ax.grid(axis="y", visible=False)
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, reverse=True, borderaxespad=0.2, handletextpad=0.2, fontsize=9
    )


def _times_as_long(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _smooth(curve: list[float], width: int = 10) -> list[float]:
    """Mean over the last ``width`` steps."""
    return [sum(part) / len(part) for part in (curve[max(0, i - width + 1) : i + 1] for i in range(len(curve)))]
