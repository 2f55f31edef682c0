"""A training step over a large table against one over a small table: it should cost the rows that it touches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import memkernels as mk
from memkernels.optim import SparseAdam

from ..case import OWN
from ..contests.contest import Contest
from ..contests.finding import TOLD, Finding, Wrong, lacking, most
from .memory import available
from .setting import Setting

WIDTH, TOKENS, ROWS_OF_TOKEN = 64, 4_096, 24
LARGE, SMALL = 1 << 24, 1 << 18
RATE, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
TORCH, FUSED = "torch.optim.SparseAdam", "memkernels.optim.SparseAdam"
SETS = 4  # of slots
ROOM = 1 << 30  # bytes beside the tables


class Training:
    """A table of normal numbers and its two optimizers, which share their moments."""

    def __init__(self, rows: int, named: int) -> None:
        generator = torch.Generator().manual_seed(37)
        self.table = torch.nn.Parameter(torch.empty(rows, WIDTH))
        piece = torch.randn(min(rows, SMALL), WIDTH, generator=generator)
        for part in self.table.data.split(len(piece)):
            part.copy_(piece[: len(part)])
        random = (torch.randperm(rows, generator=generator)[:named] for _ in range(SETS))
        self.sets = itertools.cycle([slots.view(-1, ROWS_OF_TOKEN) for slots in random])  # each row once
        self.gradient = torch.randn(named, WIDTH, generator=generator).view(-1, ROWS_OF_TOKEN, WIDTH)
        options = {"lr": RATE, "betas": BETAS, "eps": EPS}
        self.optimizers = {
            TORCH: torch.optim.SparseAdam([self.table], **options),
            FUSED: SparseAdam([self.table], **options),
        }
        moments = {name: torch.zeros_like(self.table.data) for name in ("exp_avg", "exp_avg_sq")}
        for optimizer in self.optimizers.values():
            optimizer.state[self.table] = {"step": 0, **moments}

    def step(self, name: str) -> Tensor:
        """One step; the slots that it named."""
        slots = next(self.sets)
        self._step(name, slots)
        return slots

    def _step(self, name: str, slots: Tensor) -> None:
        self.table.grad = None
        mk.gather_rows(self.table, slots, sparse_grad=True).backward(self.gradient)
        self.optimizers[name].step()

    def check(self, name: str) -> None:
        """Another step, against the equation in float64; what it does not name stays as it is."""
        slots, state = next(self.sets), self.optimizers[name].state[self.table]
        at, other = slots.flatten(), self._not_in(slots)
        tensors = self.table.data, state["exp_avg"], state["exp_avg_sq"]
        w, m, v = (t[at].double() for t in tensors)
        kept = [t[other].clone() for t in tensors]
        self._step(name, slots)
        g, (b1, b2), t = self.gradient.view(-1, WIDTH).double(), BETAS, state["step"]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - RATE * (1 - b2**t) ** 0.5 / (1 - b1**t) * m / (v.sqrt() + EPS)
        for got, wanted in zip(tensors, (w, m, v)):
            error = (got[at] - wanted).abs().max() / wanted.abs().max()
            if not error <= 1e-6:
                raise Wrong(f"{name}: error {float(error):.1e} of a step")
        if not all(torch.equal(now[other], before) for now, before in zip(tensors, kept)):
            raise Wrong(f"{name}: a row that no token named has changed")

    def _not_in(self, slots: Tensor) -> Tensor:
        """Some other rows."""
        some = torch.arange(0, len(self.table), max(1, len(self.table) // SMALL))
        named = torch.zeros(len(self.table), dtype=torch.bool)
        named[slots.flatten()] = True
        return some[~named[some]]


def training(setting: Setting) -> Iterator[Finding]:
    """``gather_rows``, its sparse gradient and a step of SparseAdam, over 2^24 rows and over 2^18."""
    setting.let_go()
    large, small = setting.size(LARGE, 1 << 12), setting.size(SMALL, 1 << 11)
    named = ROWS_OF_TOKEN * setting.size(TOKENS, 32)
    what = f"training step that names {named} rows of {large} x {WIDTH} in float32"
    goal, against = most(1.2), f"{small} rows"
    needed = 3 * 4 * WIDTH * (large + small) + ROOM
    if available() < needed:
        for name in (TORCH, FUSED):
            yield lacking(
                f"{what}, {name}", against, goal, f"needs {needed >> 20} MiB of memory, {available() >> 20} are free"
            )
        return
    tables = {large: Training(large, named), small: Training(small, named)}

    def call(rows: int, name: str) -> Callable[[], Tensor]:
        return lambda: tables[rows].step(name)

    def check(rows: int, name: str) -> Callable[[object], None]:
        return lambda found: tables[rows].check(name)

    contest = Contest(f"{what}, {FUSED}", call(large, FUSED), check(large, FUSED))
    for rows, name in ((small, FUSED), (large, TORCH), (small, TORCH)):
        contest.enter(_title(rows, name), call(rows, name), check(rows, name))
    contest.run(setting.seconds)
    yield contest.between(f"{what}, {FUSED}", OWN, _title(small, FUSED), goal, against)
    yield contest.between(f"{what}, {TORCH}", _title(large, TORCH), _title(small, TORCH), goal, against)
    yield contest.between(f"{what}, {FUSED}", OWN, _title(large, TORCH), TOLD, TORCH)


def _title(rows: int, name: str) -> str:
    return f"{name}, {rows} rows"


ROWS = {"training": training}
