"""Rows out of pages: a few by number, through the tier; many in order, in runs that are read ahead."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, _torch
from ._bitmap import page_bits
from ._columns import Pages
from ._engine import READERS, Engine
from ._tiers import Tier

RUN_BYTES = 8 << 20  # of a column; two runs of each are in memory


def take(rows: Tensor, at: Tensor) -> Tensor:
    """rows[at], for 8-bit dtypes too."""
    if rows.dtype.itemsize == 1:
        return rows.view(torch.uint8)[at].view(rows.dtype)
    return rows[at]


def gather(engine: Engine, name: str, slots: np.ndarray) -> Tensor:
    """Rows of live slots, as a caller reads them. int64 [n] -> [n, dim]."""
    if engine.device_tiers:
        return _through(engine, engine.device_tiers[name], functools.partial(engine.on_device, name), slots)
    return _through(engine, engine.tiers[name], functools.partial(engine.resident, name), slots)


def _through(engine: Engine, tier: Tier, bring, slots: np.ndarray) -> Tensor:
    """Rows out of a tier, into which ``bring(pages)`` brings pages."""
    column, size = tier.pages.column, engine.page_slots
    pages = slots // size
    frames = tier.frame_of[pages]
    here = frames >= 0
    hits = int(here.sum())
    tier.hits += hits
    tier.misses += len(slots) - hits
    engine.reads += 1
    if hits == len(slots):
        tier.touch(frames)
        return _picked(tier, frames, slots % size)
    out = torch.empty(len(slots), column.dim, dtype=column.read_dtype, device=tier.pages.rows.device)
    if hits:
        tier.touch(frames[here])
        out[torch.from_numpy(here)] = _picked(tier, frames[here], slots[here] % size)
    missing = np.unique(pages[~here])
    for first in range(0, len(missing), tier.frames):
        chunk = missing[first : first + tier.frames]
        bring(chunk.tolist())
        wanted = np.isin(pages, chunk)
        out[torch.from_numpy(wanted)] = _picked(tier, tier.frame_of[pages[wanted]], slots[wanted] % size)
    return out


_slot_places: Any = None if _native.missing() else _torch.direct(torch.ops.memkernels_cpu.slot_places.default)


def places(engine: Engine, name: str, slots: Tensor, none: bool = False) -> Tensor | None:
    """Where live slots lie among the rows of a tier, all at once. int64 [...] -> [...].

    None where not all of them are live and in memory, or there is no native library: then the long way says what is
    wrong, or reads them. ``none``: slot -1 stays -1.
    """
    tier = engine.tiers[name]
    if _slot_places is None or slots.dtype != torch.int64 or slots.device.type != "cpu" or slots.numel() == 0:
        return None
    live, frame_of, count = tier.tables(engine.maps["live"].bytes)
    at = _slot_places(slots.reshape(-1).contiguous(), live, engine.capacity, frame_of, engine.page_slots, count, none)
    if at.numel() == 0:
        return None
    tier.hits += at.numel()
    engine.reads += 1
    return at.view(slots.shape)


def at_places(memory: Pages, at: Tensor) -> Tensor:
    """Rows as a caller reads them, by place. int64 [...] -> [..., dim]."""
    flat = at.reshape(-1)
    rows = memory.rows
    if rows.dtype.itemsize == 1:
        rows = rows.view(torch.uint8).index_select(0, flat).view(rows.dtype)
    else:
        rows = rows.index_select(0, flat)
    scales = None if memory.scales is None else memory.scales.index_select(0, flat)
    return memory.column.decode(rows, scales).view(*at.shape, rows.shape[-1])


def _picked(tier: Tier, frames: np.ndarray, offsets: np.ndarray) -> Tensor:
    memory = tier.pages
    at = torch.from_numpy(frames.astype(np.int64) * memory.column.slots + offsets)
    return at_places(memory, at.to(memory.rows.device))


@dataclass
class Run:
    """Pages side by side in memory: ``rows[name]`` [n * S, dim], ``scales[name]`` [n * S] or None."""

    pages: np.ndarray
    rows: dict[str, Tensor]
    scales: dict[str, Tensor | None]

    def numbers(self, at: Tensor, size: int) -> Tensor:
        """Slot numbers of positions in the run; -1 stays."""
        found = torch.from_numpy(self.pages)[at.clamp(min=0) // size] * size + at % size
        return found.masked_fill(at < 0, -1)


def mask(packed: np.ndarray, pages: np.ndarray, size: int) -> Tensor | None:
    """Which slots of a run may be addressed, where there is a page; None: all."""
    bits = page_bits(packed, np.maximum(pages, 0), size)
    bits[pages < 0] = True
    return None if bits.all() else torch.from_numpy(bits.reshape(-1))


def bring_in(engine: Engine, name: str, pages: np.ndarray) -> None:
    """Fill the free frames of a tier, lowest pages first: a scan evicts nothing."""
    tier = engine.tiers[name]
    missing = pages[tier.frame_of[pages] < 0]
    step = max(1, RUN_BYTES // engine.columns[name].extent_bytes)
    first = 0
    while tier.free and first < len(missing):
        chunk = missing[first : first + min(step, tier.free)]
        engine.resident(name, chunk.tolist())
        first += len(chunk)


def arena(engine: Engine, name: str) -> Run:
    """All frames of a tier that are in use, in the order of the frames; page -1 where one is free."""
    tier = engine.tiers[name]
    used = int(np.flatnonzero(tier.page_of >= 0)[-1]) + 1 if tier.resident else 0
    memory, slots = tier.pages, used * engine.page_slots
    scales = None if memory.scales is None else memory.scales[:slots]
    return Run(tier.page_of[:used].copy(), {name: memory.rows[:slots]}, {name: scales})


def stretches(engine: Engine, names: tuple[str, ...], pages: np.ndarray) -> Iterator[Run]:
    """Runs of pages, all resident, that lie in order in the tier of every column: no copy is made."""
    frames = np.stack([engine.tiers[name].frame_of[pages] for name in names]).astype(np.int64)
    cuts = np.flatnonzero((np.diff(frames, axis=1) != 1).any(0)) + 1
    size = engine.page_slots
    for group in np.split(np.arange(len(pages)), cuts):
        if len(group) == 0:
            continue
        rows, scales = {}, {}
        for name, at in zip(names, frames[:, group[0]].tolist()):
            memory = engine.tiers[name].pages
            part = slice(at * size, (at + len(group)) * size)
            rows[name] = memory.rows[part]
            scales[name] = None if memory.scales is None else memory.scales[part]
        yield Run(pages[group], rows, scales)


def stream(engine: Engine, names: tuple[str, ...], pages: np.ndarray) -> Iterator[Run]:
    """Runs of pages off the disk, the next one read while one is used. A run is valid until the next one is taken."""
    size = engine.page_slots
    steps = {name: max(1, RUN_BYTES // engine.columns[name].extent_bytes) for name in names}
    step = min(steps.values())
    chunks = [pages[i : i + step] for i in range(0, len(pages), step)]
    for name in names:
        if chunks and name not in engine.buffers:
            engine.buffers[name] = [Pages(engine.columns[name], steps[name]) for _ in range(2)]
    jobs: list[list] = [[], []]

    def read_ahead(i: int) -> None:
        if i < len(chunks):
            for name in names:
                memory, at = engine.buffers[name][i % 2], 0
                for part in np.array_split(chunks[i], READERS):
                    jobs[i % 2].append(engine.threads().submit(_load, engine, name, part, memory, at))
                    at += len(part)

    try:
        read_ahead(0)
        for i, chunk in enumerate(chunks):
            read_ahead(i + 1)
            for job in jobs[i % 2]:
                job.result()
            jobs[i % 2] = []
            slots = len(chunk) * size
            memory = {name: engine.buffers[name][i % 2] for name in names}
            scales = {n: None if m.scales is None else m.scales[:slots] for n, m in memory.items()}
            yield Run(chunk, {n: m.rows[:slots] for n, m in memory.items()}, scales)
    finally:
        for part in jobs:
            wait(part)


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
