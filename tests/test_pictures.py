"""Pictures: no overlapping text, every number is there, and nothing is drawn that was not measured."""

from __future__ import annotations

import itertools
import json

import pytest
from support import ROOT

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench import report
from docs import generate
from memkernels import _figure, _speed, demo

ROWS = {file.stem: json.loads(file.read_text())["rows"] for file in generate.result_files()}


class Drawn:
    """The content of one saved picture: every text, with the pixels that it covers."""

    def __init__(self) -> None:
        self.figure: Figure | None = None
        self.boxes: dict[int, tuple[str, Bbox]] = {}
        self.size = (0.0, 0.0)

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.boxes.values()]

    def faults(self) -> list:
        """Texts that overlap, and those that the edge of the picture cuts off."""
        boxes = [(text, box.padded(-1)) for text, box in self.boxes.values()]
        over = [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
        width, height = self.size
        return over + [t for t, b in boxes if min(b.x0, b.y0) < -1 or b.x1 > width + 1 or b.y1 > height + 1]


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    """The picture that a test saves."""
    found, draw, save = Drawn(), Text.draw, Figure.savefig

    def note(text, renderer, *arguments, **options):
        draw(text, renderer, *arguments, **options)
        if text.get_visible() and text.get_text().strip():
            found.boxes[id(text)] = text.get_text(), text.get_window_extent(renderer)
            found.size = renderer.get_canvas_width_height()

    def savefig(figure, *arguments, **options):
        save(figure, *arguments, **options)
        found.figure = figure

    monkeypatch.setattr(Text, "draw", note)
    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_speed_is_legible_and_whole(name, drawn, tmp_path):
    rows = [row for row in ROWS[name] if row["unit"] == "s"]
    report.plot(ROWS[name], tmp_path / "speed.png")
    assert not drawn.faults()
    figure, said = drawn.figure, drawn.texts
    assert said.count("no peer") == sum(row["ratio"] is None for row in rows)
    shares = [max(row["peak_share"] or 0, row["bandwidth_share"] or 0) for row in rows]
    for share in shares:
        assert any(text.startswith(f"{share:.0%} ") for text in said), share
    title = figure.get_suptitle()
    assert ("no peer:" in title) == any(row["ratio"] is None for row in rows)
    assert ("leaves out work" in title) == any(share > 1 for share in shares)
    bars = [bar for axis in figure.axes for bar in axis.patches]
    assert all(axis.get_xlim()[0] <= bar.get_x() for axis in figure.axes for bar in axis.patches)
    assert len(bars) == len(rows) + sum(row["ratio"] is not None for row in rows)


def test_the_headline_follows_its_rule():
    rows = max(ROWS.values(), key=len)
    chosen = generate.headline(rows)
    assert 8 <= len(chosen) <= 16
    kinds = [(generate.page_of(row["op"]), row["direction"]) for row in chosen[:-1]]
    assert len(set(kinds)) == len(kinds), "one row of each page and direction"
    compared = [row for row in rows if row["unit"] == "s" and row["ratio"] is not None]
    assert min(row["ratio"] for row in compared) in [row["ratio"] for row in chosen], "the greatest loss is told"
    for row in chosen[:-1]:
        kind = [r for r in compared if r["op"] == row["op"] and r["direction"] == row["direction"]]
        assert row["flops"] == max(r["flops"] for r in kind if r["dtype"] == "float32")
    assert len(generate.blocks((ROOT / "README.md").read_text())["speed"].splitlines()) < 24


def training(steps: int) -> demo.Training:
    """A training of the demonstration that took this many steps."""
    settings = demo.Settings()

    def trainee(count: int, offset: float) -> demo.Trainee:
        one = object.__new__(demo.Trainee)
        one.settings = settings
        one.losses = [2 + offset + 3.5 * 0.97**i for i in range(count)]
        one.seconds = [0.1] * count
        return one

    bits = {"with memory": 2.6, "the same weights, memory switched off": 2.75, "trained without memory": 2.7}
    reference = trainee(min(steps, settings.compared_steps), 1e-6)
    return demo.Training(reference, trainee(steps, 0), trainee(steps, 0.1), bits if steps == settings.steps else {})


def timings() -> list[_speed.Timing]:
    ms = {"fused": 1.0, "reference": 1270.5, "PyTorch": 1.6}
    return [
        _speed.Timing(c, {k: v for k, v in ms.items() if k != "PyTorch" or c.eager is not None}) for c in _speed.cases()
    ]


@pytest.mark.parametrize("steps", [400, 399, 1])
def test_the_demonstration_draws_training_only_when_it_was_finished(steps, drawn, tmp_path):
    _figure.draw(tmp_path, training(steps), timings())
    assert not drawn.faults()
    said = " ".join(drawn.texts)
    for word in ("Training", "reference losses", "bits per byte"):
        assert (word in said) == (steps == 400), word
    assert "Time of each op" in said
    assert not covered(drawn)


def covered(drawn: Drawn) -> list[str]:
    """Texts that a curve of the picture crosses."""
    found = []
    for line in (line for axis in drawn.figure.axes for line in axis.lines if len(line.get_xdata()) > 2):
        scale = drawn.size[0] / drawn.figure.bbox.width  # a picture is saved in more pixels than it is drawn in
        points = scale * line.get_transform().transform(line.get_xydata())
        found += [text for text, box in drawn.boxes.values() if any(box.contains(x, y) for x, y in points)]
    return found


@pytest.mark.parametrize("steps, lost", [(400, ()), (60, ("curves", "bits")), (2, ("speed", "curves", "bits"))])
def test_the_demonstration_says_what_it_had_no_time_for(steps, lost):
    text = demo.describe(training(steps))
    (sentence,) = [line for line in text.splitlines() if "out of time" in line] or [""]
    assert bool(lost) == (f"after {steps} of 400 training steps" in sentence)
    assert all(word in sentence for word in lost)
    assert ("tokens/s" in text) == ("speed" not in lost)
    assert ("held-out bits per byte after" in text) == (not lost)
