"""The demonstration: the fused operations are right, a real model trains on them, and it is faster.

1. Every op against the float64 reference.
2. One causal MemoryTransformerLM on English text, from one seed, on the reference and on the fused backend, in turn at
   every step; then its held-out bits per byte with memory, with memory switched off, and without memory from the start.
3. Time of every op: fused, reference, and what PyTorch offers, interleaved.

``python -m memkernels demo`` runs it and writes one picture.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import _speed, _text, testing
from ._extras import require
from .models import MemoryTransformerLM

FUSED = "cpu"
# Largest relative difference of the two loss curves that rounding may cause: float32 sums in another order differ by
# 1e-7, and training amplifies that step by step.
CURVE_TOLERANCE = 1e-2
FEWEST_TIMED = 5  # fewest steps whose median is reported as a speed: the first steps allocate and warm up


@dataclass(frozen=True)
class Settings:
    """The model and its training. Windows are short, so what lies further back can only come from memory."""

    streams: int = 32
    window: int = 32
    steps: int = 400
    compared_steps: int = 50  # of these steps, also run on the reference backend, which loops over tokens in Python
    learning_rate: float = 4e-3
    warm_up: int = 50
    held_out: float = 0.1
    held_out_streams: int = 4
    seed: int = 0
    model: dict = field(
        default_factory=lambda: {
            "d_model": 128,
            "layers": 2,
            "heads": 4,
            "dropout": 0.05,
            "mem_size": 1024,
            "mem_dim": 64,
            "gate_bias": -7.0,  # a token overwrites a thousandth of a slot whose key is orthogonal to its query
        }
    )


class Trainee:
    """A model, its optimizer, the memory of each stream, and what training cost.

    With ``remembers=False`` what was written is dropped, so every read is of an empty memory and returns zero.
    """

    def __init__(self, settings: Settings, backend: str, *, remembers: bool = True):
        torch.manual_seed(settings.seed)
        self.settings, self.remembers = settings, remembers
        self.model = MemoryTransformerLM(256, max_length=settings.window, backend=backend, **settings.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.98))
        self.state = self.model.initial_state(settings.streams)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens: Tensor) -> None:
        """One step on ``[B, window + 1]``. Dropout draws the same numbers at the same step whatever the backend."""
        number, settings = len(self.losses), self.settings
        torch.manual_seed(settings.seed + 1 + number)
        start = time.perf_counter()
        rate = min(1.0, (number + 1) / settings.warm_up) * (1 + math.cos(math.pi * number / settings.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * max(rate, 0.05)
        loss, state = self.model.loss(tokens, self.state)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        if self.remembers:
            self.state = state

    def tokens_per_second(self, steps: int) -> float:
        """Of the first ``steps`` steps, by their median time."""
        return self.settings.streams * self.settings.window / statistics.median(self.seconds[:steps])

    @torch.no_grad()
    def bits_per_byte(self, text: Tensor, *, write: bool) -> float:
        """Score ``text`` ``[B, length]`` window by window from an empty memory; what is written was scored before."""
        self.model.eval()
        state = self.model.initial_state(len(text))
        losses = []
        for window in _text.windows(text, self.settings.window):
            loss, written = self.model.loss(window, state)
            losses.append(loss.item())
            state = written if write else state
        self.model.train()
        return statistics.fmean(losses) / math.log(2)


@dataclass
class Training:
    """What step 2 measured. Bits per byte are of held-out text. There are none if time ran out before the last step,
    because a model that is hardly trained says nothing about memory."""

    reference: Trainee
    fused: Trainee
    without: Trainee
    bits: dict[str, float]

    @property
    def compared(self) -> int:
        return len(self.reference.losses)

    @property
    def complete(self) -> bool:
        return len(self.fused.losses) == self.fused.settings.steps

    @property
    def difference(self) -> list[float]:
        """Relative difference of the two loss curves at every compared step."""
        return [abs(f - r) / r for f, r in zip(self.fused.losses, self.reference.losses)]


def check_ops() -> bool:
    """Step 1: print the check; whether all passed."""
    from tqdm import tqdm

    with tqdm(desc="checking", unit="case") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        rows = testing.check(quick=True, progress=progress)
    print(testing.report(rows))
    return all(row.passed for row in rows)


def train(settings: Settings, seconds: float) -> Training:
    """Step 2. Every trainee takes the same steps on the same windows; when ``seconds`` are over, all stop."""
    from tqdm import tqdm

    text, held_out = _text.split(_text.documentation(), settings.held_out)
    segments = _text.windows(_text.streams(text, settings.streams), settings.window)
    reference = Trainee(settings, "reference")
    fused = Trainee(settings, FUSED)
    without = Trainee(settings, FUSED, remembers=False)
    deadline = time.perf_counter() + seconds
    bar = tqdm(range(settings.steps), desc="training", unit="step")
    for number in bar:
        tokens = segments[number % len(segments)]
        fused.step(tokens)
        without.step(tokens)
        if number < settings.compared_steps:
            reference.step(tokens)
        bar.set_postfix(loss=f"{fused.losses[-1]:.3f}", refresh=False)
        if time.perf_counter() > deadline:
            break
    bar.close()
    training = Training(reference, fused, without, bits={})
    if not training.complete:
        return training
    scored = _text.streams(held_out, settings.held_out_streams)
    training.bits = {
        "with memory": fused.bits_per_byte(scored, write=True),
        "the same weights, memory switched off": fused.bits_per_byte(scored, write=False),
        "trained without memory": without.bits_per_byte(scored, write=False),
    }
    return training


def describe(training: Training) -> str:
    """The numbers of step 2 as text, and what there was no time for."""
    settings, n = training.fused.settings, training.compared
    lines = [
        "",
        f"{settings.streams} streams of {settings.window} tokens a step, {settings.model['mem_size']} slots per "
        "stream; forward, backward, Adam and memory write",
    ]
    if n >= FEWEST_TIMED:
        fast, slow = training.fused.tokens_per_second(n), training.reference.tokens_per_second(n)
        lines += [
            f"  reference  {slow:10,.0f} tokens/s, median of {n} interleaved steps",
            f"  fused      {fast:10,.0f} tokens/s   {fast / slow:.1f}x",
        ]
    largest = f"{max(training.difference):.1e} (relative; allowed {CURVE_TOLERANCE:.0e})"
    lines.append(f"loss curves over the first {n} step{'s' if n > 1 else ''} differ by at most {largest}")
    if training.complete:
        lines.append(f"held-out bits per byte after {settings.steps} steps, lower is better")
        lines += [f"  {value:.4f}  {name}" for name, value in training.bits.items()]
    else:
        lost = ["the speed of training"] * (n < FEWEST_TIMED) + ["the training curves", "the held-out bits per byte"]
        lines.append(
            f"out of time after {len(training.fused.losses)} of {settings.steps} training steps: not shown are "
            f"{', '.join(lost[:-1])} and {lost[-1]} (--seconds gives it more)"
        )
    return "\n".join([*lines, ""])


def run(out_dir: str | Path = "memkernels-demo", seconds: float = 150.0, settings: Settings | None = None) -> int:
    """The demonstration in about ``seconds``; the exit status, 0 when fused equals reference everywhere.

    Writes ``demo.png`` into ``out_dir``. Training stops when three quarters of the time are gone, however far it is;
    what it did not reach is not in the picture, and the text says so.
    """
    from . import _figure

    start = time.perf_counter()
    print(f"1/3  every op against the float64 reference (torch {torch.__version__}, {torch.get_num_threads()} threads)")
    if not check_ops():
        print("FAILED: an op differs from its reference, so training and times would mean nothing")
        return 1

    print("\n2/3  a Transformer with memory on CPython's documentation, reference and fused from one seed")
    training = train(settings or Settings(), 0.75 * seconds - (time.perf_counter() - start))
    print(describe(training))
    agrees = max(training.difference) <= CURVE_TOLERANCE

    print("3/3  time of each op")
    timings = _speed.measure(FUSED)
    print(_speed.table(timings))

    path = _figure.draw(Path(out_dir), training, timings)
    print(
        f"\npicture{'' if training.complete else ', times alone'}: {path}\ntotal: {time.perf_counter() - start:.0f} s"
    )
    if not agrees:
        print("FAILED: the loss curves differ")
    return 0 if agrees else 1


def main(argv: list[str] | None = None) -> int:
    """Command line of ``python -m memkernels demo``."""
    parser = argparse.ArgumentParser(prog="python -m memkernels demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", default="memkernels-demo", help="where the picture goes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=150.0, help="time to aim at (default: %(default)s)")
    arguments = parser.parse_args(argv)
    require(parser.prog, "matplotlib", "tqdm")
    return run(arguments.out_dir, arguments.seconds)
