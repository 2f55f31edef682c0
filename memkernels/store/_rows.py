"""Rows out of pages: a few by number, through the tier; many in order, in runs that are read ahead."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, _torch
from ._bitmap import page_bits
from ._columns import DevicePages, Pages
from ._engine import READERS, Engine
from ._tiers import DeviceTier, Tier

RUN_BYTES = 8 << 20  # of a column; two runs of each are in memory


def take(rows: Tensor, at: Tensor) -> Tensor:
    """rows[at], for 8-bit dtypes too."""
    if rows.dtype.itemsize == 1:
        return rows.view(torch.uint8)[at].view(rows.dtype)
    return rows[at]


def gather(engine: Engine, name: str, slots: np.ndarray, device: torch.device | None = None) -> Tensor:
    """Rows of live slots, as a caller reads them, from the tier of ``device``. int64 [n] -> [n, dim]."""
    tier, size = engine.tier(name, device), engine.page_slots
    pages = slots // size
    frames = tier.frame_of[pages]
    here = frames >= 0
    tier.count_slots(here)
    engine.reads += 1
    if here.all():
        tier.touch(frames)
        return _picked(tier, slots)
    if engine.on_device(device):
        memory = engine.tiers[name]
        memory.count_slots(memory.frame_of[pages[~here]] >= 0)
    out = torch.empty(len(slots), tier.column.dim, dtype=tier.column.read_dtype, device=tier.pages.rows.device)
    if here.any():
        tier.touch(frames[here])
        _put(out, here, _picked(tier, slots[here]))
    missing = np.unique(pages[~here])
    for first in range(0, len(missing), tier.frames):
        chunk = missing[first : first + tier.frames]
        bring(engine, tier, chunk)
        wanted = np.isin(pages, chunk)
        _put(out, wanted, _picked(tier, slots[wanted]))
    return out


def _put(out: Tensor, at: np.ndarray, rows: Tensor) -> None:
    """out[at] = rows. bool [n]."""
    out.index_copy_(0, torch.from_numpy(np.flatnonzero(at)).to(out.device), rows)


def _picked(tier: Tier, slots: np.ndarray) -> Tensor:
    """Rows of slots whose pages are in the tier."""
    size = tier.column.slots
    at = torch.from_numpy(tier.frame_of[slots // size].astype(np.int64) * size + slots % size)
    with tier.reading() as memory:
        return at_places(memory, at.to(memory.rows.device))


def bring(engine: Engine, tier: Tier, pages: np.ndarray) -> None:
    """Bring pages into a tier that has not got them, at most as many as it has frames; to a device by way of memory."""
    if isinstance(tier, DeviceTier):
        to_device(engine, tier, pages, keep=True)
    else:
        engine.resident(tier.column.name, pages.tolist())


def to_device(engine: Engine, tier: DeviceTier, pages: np.ndarray, keep: bool = False) -> None:
    """Bring pages into the device tier: one run is read while the one before is copied.

    ``keep``: pages that come off the disk stay in memory too, where others give way.
    """
    name = tier.column.name
    memory = engine.tiers[name]
    frames = tier.take(pages.tolist())
    try:
        step, at = (min(run_pages(engine, name), memory.frames) if keep else len(pages)), 0
        for first in range(0, len(pages), step):
            part = pages[first : first + step]
            if keep and (missing := part[memory.frame_of[part] < 0]).size:
                engine.resident(name, missing.tolist())
            for run in stream(engine, (name,), part):
                tier.stage(run.pages, frames[at : at + len(run.pages)], run.memory[name])
                at += len(run.pages)
    except BaseException:
        for page in pages.tolist():
            tier.drop(page)
        raise


_slot_places: Any = None if _native.missing() else _torch.bare(torch.ops.memkernels_cpu.slot_places.default)


def places(engine: Engine, tier: Tier, slots: Tensor, none: bool = False) -> Tensor | None:
    """Where live slots lie among the rows of a tier, all at once. int64 [...] -> [...], on the CPU.

    None where not all of them are live and in the tier, or there is no native library: then the long way says what is
    wrong, or reads them. ``none``: slot -1 stays -1.
    """
    if _slot_places is None or slots.dtype != torch.int64 or slots.numel() == 0:
        return None
    live, frame_of, count = tier.tables(engine.maps["live"].bytes)
    flat = slots.detach().cpu().reshape(-1).contiguous()
    at = _slot_places(flat, live, engine.capacity, frame_of, engine.page_slots, count, none)
    if at.numel() == 0:
        return None
    tier.hits += at.numel()
    engine.reads += 1
    return at.view(slots.shape)


def at_places(memory: Pages | DevicePages, at: Tensor) -> Tensor:
    """Rows as a caller reads them, by place. int64 [...] -> [..., dim]."""
    flat = at.reshape(-1)
    rows = memory.rows
    if rows.dtype.itemsize == 1:
        rows = rows.view(torch.uint8).index_select(0, flat).view(rows.dtype)
    else:
        rows = rows.index_select(0, flat)
    scales = None if memory.scales is None else memory.scales.index_select(0, flat)
    return memory.column.decode(rows, scales).view(*at.shape, rows.shape[-1])


@dataclass
class Run:
    """Pages side by side in memory: ``rows[name]`` [n * S, dim], ``scales[name]`` [n * S] or None."""

    pages: np.ndarray
    rows: dict[str, Tensor]
    scales: dict[str, Tensor | None]
    memory: dict[str, Pages] = field(default_factory=dict)  # of a run off the disk: what holds it

    def part(self, first: int, stop: int, size: int) -> Run:
        """Some of its pages, of ``size`` slots each."""
        slots = slice(first * size, stop * size)
        scales = {name: None if x is None else x[slots] for name, x in self.scales.items()}
        return Run(self.pages[first:stop], {name: x[slots] for name, x in self.rows.items()}, scales)

    def numbers(self, at: Tensor, size: int) -> Tensor:
        """Slot numbers of positions in the run; -1 stays."""
        found = torch.from_numpy(self.pages)[at.clamp(min=0) // size] * size + at % size
        return found.masked_fill(at < 0, -1)


def mask(packed: np.ndarray, pages: np.ndarray, size: int, absent: bool = True) -> Tensor | None:
    """Which slots of a run may be addressed, ``absent`` where there is no page; None: all."""
    bits = page_bits(packed, np.maximum(pages, 0), size)
    bits[pages < 0] = absent
    return None if bits.all() else torch.from_numpy(bits.reshape(-1))


def run_pages(engine: Engine, name: str) -> int:
    return max(1, RUN_BYTES // engine.columns[name].extent_bytes)


def bring_in(engine: Engine, tier: Tier, pages: np.ndarray) -> None:
    """Fill the free frames of a tier, lowest pages first: a scan evicts nothing."""
    missing = pages[tier.frame_of[pages] < 0][: tier.free]
    if isinstance(tier, DeviceTier):
        if len(missing):
            to_device(engine, tier, missing)
        return
    step = run_pages(engine, tier.column.name)
    for first in range(0, len(missing), step):
        engine.resident(tier.column.name, missing[first : first + step].tolist())


def arena(tiers: Mapping[str, Tier], pages: np.ndarray) -> Run:
    """The frames up to the last that holds one of ``pages``, in the same frame of each of ``tiers``.

    They are in the order of the frames; page -1 where a frame holds none of ``pages``.
    """
    tier = next(iter(tiers.values()))
    wanted = np.zeros(len(tier.frame_of) + 1, dtype=bool)  # the last for page -1
    wanted[pages] = True
    used = int(tier.frame_of[pages].max(initial=-1)) + 1
    found = tier.page_of[:used].copy()
    found[~wanted[found]] = -1
    whole = {name: t.pages for name, t in tiers.items()}
    run = Run(found, {n: m.rows for n, m in whole.items()}, {n: m.scales for n, m in whole.items()})
    return run.part(0, used, tier.column.slots)


def stretches(tiers: Mapping[str, Tier], pages: np.ndarray) -> Iterator[Run]:
    """Runs of pages that are in each of ``tiers``, and lie in order in all of them: no copy is made."""
    frames = np.stack([tier.frame_of[pages] for tier in tiers.values()]).astype(np.int64)
    cuts = np.flatnonzero((np.diff(frames, axis=1) != 1).any(0)) + 1
    size = next(iter(tiers.values())).column.slots
    for group in np.split(np.arange(len(pages)), cuts):
        if len(group) == 0:
            continue
        rows, scales = {}, {}
        for (name, tier), at in zip(tiers.items(), frames[:, group[0]].tolist()):
            part = slice(at * size, (at + len(group)) * size)
            rows[name] = tier.pages.rows[part]
            scales[name] = None if tier.pages.scales is None else tier.pages.scales[part]
        yield Run(pages[group], rows, scales)


def stream(engine: Engine, names: tuple[str, ...], pages: np.ndarray) -> Iterator[Run]:
    """Runs of pages off the disk, the next one read while one is used. A run is valid until the next one is taken."""
    size = engine.page_slots
    step = min(run_pages(engine, name) for name in names)
    chunks = [pages[i : i + step] for i in range(0, len(pages), step)]
    ahead: deque[tuple[dict[str, Pages], list]] = deque()

    def read_ahead(i: int) -> None:
        if i < len(chunks):
            memory = {name: engine.buffer(name, run_pages(engine, name)) for name in names}
            jobs: list = []
            ahead.append((memory, jobs))
            for name in names:
                at = 0
                for part in np.array_split(chunks[i], READERS):
                    jobs.append(engine.threads().submit(_load, engine, name, part, memory[name], at))
                    at += len(part)

    pace = _Pace()
    try:
        read_ahead(0)
        for i, chunk in enumerate(chunks):
            read_ahead(i + 1)
            memory, jobs = ahead[0]
            with pace.waiting():
                for job in jobs:
                    job.result()
            ahead.popleft()
            slots = len(chunk) * size
            scales = {n: None if m.scales is None else m.scales[:slots] for n, m in memory.items()}
            with pace.using():
                yield Run(chunk, {n: m.rows[:slots] for n, m in memory.items()}, scales, memory)
    finally:
        for _, jobs in ahead:
            wait(jobs)


class _Pace:
    """Uses runs with one thread where the disk sets the pace: then more of them gain nothing, and those of OpenMP spin
    between runs on the cores of the threads that read. A search of 256 MiB for 16 tokens, off a disk of 1 GB/s on two
    cores, takes 0.12 s of processor time so, and 0.36 s with two threads. No result depends on their number."""

    def __init__(self) -> None:
        self.threads, self.alone, self.waited = torch.get_num_threads(), True, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.waited = time.perf_counter() - begin

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        begin = time.perf_counter()
        alone = self.alone and self.threads > 1
        if alone:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if alone:
                torch.set_num_threads(self.threads)
        used = time.perf_counter() - begin
        # With one thread: is there still time to wait? With all: is there enough of it for one?
        self.alone = self.waited > (0.1 * used if self.alone else (self.threads - 1) * used)


def _load(engine: Engine, name: str, pages: np.ndarray, memory: Pages, at: int) -> None:
    """Pages from the tier where they are there, else from disk, into pages in a row."""
    tier = engine.tiers[name]
    frames = tier.frame_of[pages]
    cuts = np.flatnonzero((frames[1:] >= 0) | (frames[:-1] >= 0)) + 1
    for part in np.split(np.arange(len(pages)), cuts):
        if len(part) and frames[part[0]] >= 0:
            memory.copy(at + int(part[0]), tier.pages, int(frames[part[0]]))
        elif len(part):
            engine.fill_run(name, pages[part].tolist(), memory, at + int(part[0]))
