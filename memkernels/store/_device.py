"""The part of a search that lies on the device: all frames that hold what it wants, in one call.

Where keys and values of a page lie in frames of the same number, a read takes both arenas as they are; the pages that
came in another order are read in stretches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _rows
from ._columns import as_they_lie
from ._database import COLUMNS
from ._engine import Engine
from ._rows import Run


def split(engine: Engine, names: tuple[str, ...], pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pages that the device has in all of the columns, whose free frames are filled first, and the others."""
    tiers = [engine.device_tiers[name] for name in names]
    for tier in tiers:
        _rows.bring_in(engine, tier, pages)
    here = np.logical_and.reduce([tier.frame_of[pages] >= 0 for tier in tiers])
    for tier in tiers:
        tier.count_slots(here, engine.page_slots)
    return pages[here], pages[~here]


def keys(engine: Engine, packed: np.ndarray, pages: np.ndarray) -> tuple[Run, Tensor, Tensor | None]:
    """Their keys, the page of each frame, and which slots may be addressed."""
    tier = engine.device_tiers["keys"]
    run = _rows.arena({"keys": tier}, pages)

    def make() -> tuple[Tensor, Tensor | None]:
        mask = _rows.mask(packed, run.pages, engine.page_slots)
        return torch.from_numpy(run.pages).to(tier.copies.device), _moved(mask, tier.copies.device)

    return run, *_kept(engine, ("keys",), packed, make)


def together(
    engine: Engine, packed: np.ndarray, pages: np.ndarray, dtype: torch.dtype
) -> Iterator[tuple[Run, Tensor | None]]:
    """Runs of their keys and values, each with its mask; short ones where a query of ``dtype`` needs copies."""
    tiers, size = engine.device_tiers, engine.page_slots
    device = tiers["keys"].copies.device
    alike = tiers["keys"].frame_of[pages] == tiers["values"].frame_of[pages]
    whole = as_they_lie(engine.columns["values"], dtype)
    if alike.any():
        run = _rows.arena(tiers, pages[alike])

        def make() -> Tensor | None:
            return _moved(_rows.mask(packed, run.pages, size, absent=False), device)

        mask = _kept(engine, COLUMNS, packed, make)
        step = len(run.pages) if whole else _rows.run_pages(engine, "values")
        for first in range(0, len(run.pages), step):
            part = slice(first * size, (first + step) * size)
            yield run.part(first, first + step, size), None if mask is None else mask[part]
    for run in _rows.stretches(tiers, pages[~alike]):
        yield run, _moved(_rows.mask(packed, run.pages, size), device)


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


def _kept(engine: Engine, names: tuple[str, ...], packed: np.ndarray, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made again where slots or frames changed since. A filter is another one in every call."""
    live = engine.maps["live"]
    if packed is not live.bytes:
        return make()
    now = live.changes, *(engine.device_tiers[name].moves for name in names)
    memory, then, made = engine.kept.get(names, (None, (), None))
    if memory is not packed or then != now:
        with torch.inference_mode(False):  # a call with gradients may come next
            made = make()
        engine.kept[names] = packed, now, made
    return made
