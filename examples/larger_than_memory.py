"""A memory eight times its budget of RAM: a model that says where it will read next, and a store that prefetches it.

The memory is a map with one slot per place; a page of the store is a square of places. Agents walk over it. At every
step an agent reads the places around it by number, attends to them, and turns by what it found, so that its way depends
on what it reads. Position and heading say where it will probably be next: those pages are prefetched by another thread
while the model computes. A few places are gates that lead far away, which nothing foretells.

    python examples/larger_than_memory.py [picture.png]

The same walk is taken twice, without prefetch and with it. It writes 512 MiB to a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memkernels import softmax_read
from memkernels._extras import require
from memkernels.store import MemoryStore

SIDE = 16  # places along a side of a page
KEY, VALUE = 16, 112  # numbers of a slot: 512 bytes, 128 KiB per page
SIGHT = 2  # an agent reads 5 x 5 places
STRIDE, TURN = 2.0, 0.4  # places and, at most, radians per step
GATE = 3.0  # a place whose first number is larger is a gate: 0.13% of them
SHARE = 8  # the store has eight times the bytes that may be in memory
MIB = 1 << 20


class Map:
    """A torus of ``pages`` x ``pages`` pages; positions are ``[..., 2]``, in places."""

    def __init__(self, pages: int):
        self.pages, self.places = pages, pages * SIDE

    def fill(self, store: MemoryStore) -> None:
        """Random places, a row of pages per commit."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.pages):
            count = self.pages * SIDE**2
            store.append(*(torch.randn(count, width, generator=generator) for width in (KEY, VALUE)))

    def around(self, position: Tensor, sight: int) -> Tensor:
        """The slots of the places within ``sight`` of positions ``[B, 2]``: int64 ``[B, N]``."""
        steps = torch.arange(-sight, sight + 1)
        x, y = ((position[:, i].floor().long()[:, None] + steps) % self.places for i in range(2))
        x, y = x[:, None, :], y[:, :, None]
        page, inside = y // SIDE * self.pages + x // SIDE, y % SIDE * SIDE + x % SIDE
        return (page * SIDE**2 + inside).flatten(1)


class Agents(nn.Module):
    """Where to go next, from what was read; random weights, for what matters is that the way follows from the reads."""

    def __init__(self, width: int = 512):
        super().__init__()
        self.query, self.turn = nn.Linear(width, KEY), nn.Linear(width, 1)
        self.cell = nn.GRUCell(VALUE, width)

    def forward(self, keys: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values ``[B, N, *]`` and state ``[B, D]`` -> state, and radians by which to turn ``[B]``."""
        read = softmax_read(self.query(state).unsqueeze(1), keys, values).squeeze(1)
        state = self.cell(read, state)
        return state, TURN * self.turn(state).squeeze(1).mul(8).tanh()


class Walk(NamedTuple):
    """What a walk measured, and where it led.

    hit_rate: share of the slots that were in memory when they were read. waiting: seconds that the model waited for the
    store. resident_bytes: pages in memory at the end. peak_bytes: by how much the process grew. rates: hit rate by
    step. track: positions ``[steps, B, 2]``.
    """

    hit_rate: float
    bytes_read: int
    waiting: float
    resident_bytes: int
    peak_bytes: int
    rates: list[float]
    track: Tensor


def status(key: str) -> int:
    """Bytes of this process as Linux counts them."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@torch.no_grad()
def walk(path: Path, world: Map, ram_bytes: int, agents: int, steps: int, prefetch: bool) -> Walk:
    torch.manual_seed(0)
    model, state = Agents(), torch.zeros(agents, 512)
    position, heading = torch.rand(agents, 2) * world.places, torch.rand(agents) * 2 * torch.pi
    waiting, rates, track = 0.0, [], []
    ahead: Future | None = None
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the current size
    before = status("VmRSS")
    with MemoryStore.open(path, ram_bytes=ram_bytes) as store, ThreadPoolExecutor(1) as thread:
        for _ in range(steps):
            earlier, begin = store.stats(), time.perf_counter()
            if ahead is not None:
                ahead.result()
            keys, values = store.read(world.around(position, SIGHT))
            waiting += time.perf_counter() - begin
            now = store.stats()
            hits, misses = (now[name] - earlier[name] for name in ("hits", "misses"))
            rates.append(hits / (hits + misses))
            track.append(position)
            if prefetch:
                expected = world.around(position + forward(heading), SIGHT + 1)  # a place more, for it may turn
                ahead = thread.submit(store.prefetch, expected)
            state, turn = model(keys, values, state)
            heading = heading + turn
            here = values[:, values.shape[1] // 2]
            far = torch.special.ndtr(here[:, 1:3]) * world.places  # a gate names the place that it leads to
            position = torch.where(here[:, :1] > GATE, far, position + forward(heading))
        if ahead is not None:
            ahead.result()
        counted = store.stats()
    return Walk(
        hit_rate=counted["hits"] / (counted["hits"] + counted["misses"]),
        bytes_read=counted["bytes_read"],
        waiting=waiting,
        resident_bytes=counted["resident_bytes"],
        peak_bytes=status("VmHWM") - before,
        rates=rates,
        track=torch.stack(track) % world.places,
    )


def forward(heading: Tensor) -> Tensor:
    """A step in the direction of radians ``[B]``: ``[B, 2]``."""
    return STRIDE * torch.stack([heading.cos(), heading.sin()], -1)


def draw(path: str | Path, world: Map, walks: dict[str, Walk]) -> None:
    from matplotlib.figure import Figure  # so that --help does without

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, walked in walks.items():
        left.plot(torch.tensor(walked.rates).unfold(0, 10, 1).mean(-1), label=f"{name}: {walked.hit_rate:.1%}")
    left.set(xlabel="step", ylabel="hit rate, mean of 10 steps", ylim=(0.8, 1.005))
    left.legend(loc="lower right")
    pages = walks["with prefetch"].track / SIDE
    for agent in pages.unbind(1):
        right.plot(*agent.T, ".", markersize=1)
    right.set(xlim=(0, world.pages), ylim=(0, world.pages), aspect="equal")
    right.set(xticks=range(world.pages + 1), yticks=range(world.pages + 1), xticklabels=[], yticklabels=[])
    right.grid(linewidth=0.3)
    right.tick_params(length=0)
    right.set_title(f"the ways of the agents over {world.pages**2} pages; {world.pages**2 // SHARE} fit in memory")
    figure.savefig(path, dpi=120)


def main(path: str | Path | None = None, pages: int = 64, agents: int = 64, steps: int = 300) -> dict[str, Walk]:
    """What the walk without prefetch and the walk with it measured."""
    world, walks = Map(pages), {}
    with tempfile.TemporaryDirectory() as folder:
        with MemoryStore.create(Path(folder) / "map", KEY, VALUE, page_slots=SIDE**2) as store:
            world.fill(store)
            size = sum(column.extent_bytes for column in store.columns.values()) * pages**2
        for name in ("without prefetch", "with prefetch"):
            prefetch = name == "with prefetch"
            walks[name] = walk(Path(folder) / "map", world, size // SHARE, agents, steps, prefetch)
    print(f"{pages**2} pages, {size // MIB} MiB; budget {size // SHARE // MIB} MiB; {agents} agents, {steps} steps")
    print(f"{'':18}{'hit rate':>10}{'read, MiB':>11}{'waited, s':>11}{'in memory, MiB':>16}{'peak, MiB':>11}")
    for name, w in walks.items():
        held, peak = w.resident_bytes / MIB, w.peak_bytes / MIB
        print(f"{name:18}{w.hit_rate:10.2%}{w.bytes_read / MIB:11.1f}{w.waiting:11.2f}{held:16.1f}{peak:11.1f}")
    if path is not None:
        draw(path, world, walks)
        print(f"picture: {Path(path).resolve()}")
    return walks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", help="where a picture goes (default: none is drawn)")
    options = parser.parse_args()
    if options.picture:
        require(parser.prog, "matplotlib")
    main(options.picture)
