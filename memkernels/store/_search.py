"""Searches and reads over all slots of a store: the library's ops on runs of pages, merged exactly.

    topk:     the k best of every run and of those before it, ties to the smaller slot
    softmax:  read = sum_run exp(lse_run - lse) read_run,      lse = logsumexp_run lse_run

All pages in memory are one run, in the order of their frames; so are all on the device, where the query lies there.
Pages elsewhere are searched where they lie, while the device runs, and only what was found goes to the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from . import _device, _rows
from ._bitmap import pages_with_bits
from ._columns import as_they_lie
from ._database import COLUMNS
from ._engine import CPU, Engine
from ._rows import Run


def exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk(engine: Engine, query: Tensor, k: int, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scores in the exact dtype and slot numbers, best first, on the device of the query. [T, K] -> [T, k] each."""
    pages = pages_with_bits(packed, engine.page_slots)
    engine.reads += 1
    if not engine.on_device(query.device):
        return _topk_in_memory(engine, query, k, scale, packed, pages)
    here, rest = _device.split(engine, ("keys",), pages)
    there = moved(CPU, query, scale) if len(rest) else ()  # first: a copy to the CPU waits for what the device runs
    best = None
    if len(here):
        with engine.device_tiers["keys"].reading():
            best = _paged(engine, query, k, scale, *_device.keys(engine, packed, here), None)
    if not there:
        return best or nothing(query, k)
    scores, slots = moved(query.device, *_topk_in_memory(engine, there[0], k, there[1], packed, rest))
    return (scores, slots) if best is None else merged([best, (scores, slots)], k)


def moved(device: torch.device, *given) -> tuple[Any, ...]:
    """Tensors on ``device``, and what is no tensor."""
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in given)


def _topk_in_memory(engine: Engine, query: Tensor, k: int, scale, packed, pages) -> tuple[Tensor, Tensor]:
    """The same of some pages, in memory and on disk."""
    size, tier = engine.page_slots, engine.tiers["keys"]
    _rows.bring_in(engine, tier, pages)
    here = tier.frame_of[pages] >= 0
    tier.count_slots(here, size)
    best = None

    def search(run: Run) -> tuple[Tensor, Tensor]:
        mask = _rows.mask(packed, run.pages, size)
        return _paged(engine, query, k, scale, run, torch.from_numpy(run.pages), mask, best)

    if here.any():
        best = search(_rows.arena({"keys": tier}, pages[here]))
    for run in _rows.stream(engine, ("keys",), pages[~here]):
        best = search(run)
    return best or nothing(query, k)


def nothing(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (
        query.new_full((len(query), k), -torch.inf, dtype=exact(query.dtype)),
        query.new_full((len(query), k), -1, dtype=torch.int64),
    )


def merged(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of several answers, equal scores by smaller slot."""
    scores, slots = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
    order = slots.argsort(dim=1, stable=True)
    scores, slots = scores.gather(1, order), slots.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), slots.gather(1, order)


def _paged(engine: Engine, query: Tensor, k: int, scale, run: Run, pages: Tensor, mask, best) -> tuple[Tensor, Tensor]:
    """The best of one run and of what was found before."""
    size = engine.page_slots
    found = {} if best is None else {"best_scores": best[0], "best_slots": best[1]}
    scales = run.scales["keys"]
    return ops.paged_topk_search(
        query,
        run.rows["keys"].unflatten(0, (-1, size)),
        pages,
        k,
        scale=scale,
        slot_mask=None if mask is None else mask.unflatten(0, (-1, size)),
        key_scale=None if scales is None else scales.to(exact(query.dtype)).unflatten(0, (-1, size)),
        **found,
    )


def rescored(query: Tensor, rows: Tensor, scale) -> Tensor:
    """scale_t <query_t, row_tj>. [T, K], [T, k, K] -> [T, k] in the exact dtype."""
    dtype = exact(query.dtype)
    scores = torch.einsum("tc,tjc->tj", query.to(dtype), rows.to(dtype))
    return scores * (scale.to(dtype).unsqueeze(1) if isinstance(scale, Tensor) else scale)


def softmax(engine: Engine, query: Tensor, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    """read [T, V] and lse [T], with gradients to the query and a scale that is a tensor."""
    tensor = scale if isinstance(scale, Tensor) else torch.ones(())
    number = 1.0 if isinstance(scale, Tensor) else scale
    if torch.is_grad_enabled() and (query.requires_grad or tensor.requires_grad):
        return _SoftmaxRead.apply(query, tensor, engine, number, isinstance(scale, Tensor), packed)
    return _softmax(engine, query, scale, packed)


def _value_rows(engine: Engine, query: Tensor, run: Run) -> tuple[Tensor, Tensor | None]:
    """Values of a run as softmax_read takes them beside this query."""
    rows, scales = run.rows["values"], run.scales["values"]
    if not as_they_lie(engine.columns["values"], query.dtype):
        rows = rows.to(query.dtype)
    return rows, None if scales is None else scales.to(exact(query.dtype))


def _runs(engine: Engine, query: Tensor, scale, packed: np.ndarray) -> Iterator[tuple]:
    """Runs of all slots, each with its mask, and query and scale on the device of the run."""
    pages = pages_with_bits(packed, engine.page_slots)
    engine.reads += 1
    if engine.on_device(query.device):
        here, pages = _device.split(engine, COLUMNS, pages)
        there = moved(CPU, query, scale) if len(pages) else ()  # first, as in topk
        tiers = engine.device_tiers
        with tiers["keys"].reading(), tiers["values"].reading():
            for run, mask in _device.together(engine, packed, here, query.dtype):
                yield run, mask, query, scale
        if not there:
            return
        query, scale = there
    memory = engine.tiers
    for name in COLUMNS:
        _rows.bring_in(engine, memory[name], pages)
    here = np.logical_and(*(memory[name].frame_of[pages] >= 0 for name in COLUMNS))
    for name in COLUMNS:
        memory[name].count_slots(here, engine.page_slots)
    for run in itertools.chain(
        _rows.stretches(memory, pages[here]),
        _rows.stream(engine, COLUMNS, pages[~here]),
    ):
        yield run, _rows.mask(packed, run.pages, engine.page_slots), query, scale


def _read(engine: Engine, query: Tensor, scale, mask: Tensor | None, run: Run) -> tuple[Tensor, Tensor]:
    values, value_scale = _value_rows(engine, query, run)
    key_scale = run.scales["keys"]
    return ops.softmax_read(
        query,
        run.rows["keys"],
        values,
        scale=scale,
        slot_mask=mask,
        key_scale=None if key_scale is None else key_scale.to(exact(query.dtype)),
        value_scale=value_scale,
        return_lse=True,
    )


def _softmax(engine: Engine, query: Tensor, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    found: dict[torch.device, list] = {}
    for run, mask, near, factor in _runs(engine, query, scale, packed):
        read, lse = _read(engine, near, factor, mask, run)
        parts = found.setdefault(near.device, [])
        parts.append((read.to(exact(query.dtype)), lse))
        if len(parts) == 16:
            parts[:] = [_merged_reads(parts)]
    if not found:
        width = engine.columns["values"].dim
        return query.new_zeros(len(query), width), query.new_full((len(query),), -torch.inf, dtype=exact(query.dtype))
    read, lse = _merged_reads([moved(query.device, *_merged_reads(parts)) for parts in found.values()])
    return read.to(query.dtype), lse


def _merged_reads(parts: list) -> tuple[Tensor, Tensor]:
    return parts[0] if len(parts) == 1 else ops.merge_reads(*zip(*parts))


class _SoftmaxRead(torch.autograd.Function):
    """The read, whose backward goes over the runs again: rows are not kept.

    With w_run = exp(lse_run - lse), g and h the gradients of read and lse, a run receives
    w_run g for its read and w_run (<g, read_run - read> + h) for its lse.
    """

    @staticmethod
    def forward(ctx, query, tensor, engine, number, scaled, packed):
        read, lse = _softmax(engine, query, tensor if scaled else number, packed)
        ctx.save_for_backward(query, tensor, read, lse)
        ctx.call = engine, number, scaled, packed, engine.generation
        return read, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_read, d_lse):
        engine, generation = ctx.call[0], ctx.call[-1]
        with engine.lock, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            engine.check_process()
            if engine.closed or engine.generation != generation:
                now = "closed" if engine.closed else f"at {engine.generation}"
                wanted = f"the slots that were read, of generation {generation}"
                raise RuntimeError(f"softmax_read: backward needs {wanted}; the store is {now}")
            return _SoftmaxRead.again(ctx, d_read, d_lse)

    @staticmethod
    def again(ctx, d_read, d_lse):
        query, tensor, read, lse = ctx.saved_tensors
        engine, number, scaled, packed, _ = ctx.call
        dtype = exact(query.dtype)
        d_read, read = d_read.to(dtype), read.to(dtype)
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.to(dtype)
        d_query, d_tensor = torch.zeros_like(query, dtype=dtype), torch.zeros_like(tensor)
        for run, mask, near, factor in _runs(engine, query.detach(), tensor.detach() if scaled else number, packed):
            with torch.enable_grad():
                wanted = [near.detach().requires_grad_()]
                if scaled:
                    wanted.append(factor.detach().requires_grad_())
                part, part_lse = _read(engine, wanted[0], wanted[1] if scaled else factor, mask, run)
            g, h, whole, whole_lse = moved(near.device, d_read, d_lse, read, lse)
            weight = torch.where(part_lse.isneginf(), 0.0, (part_lse.detach() - whole_lse).exp())
            along = (g * (part.detach().to(dtype) - whole)).sum(-1) + h
            given = [(weight.unsqueeze(-1) * g).to(part.dtype), (weight * along).to(part_lse.dtype)]
            found = torch.autograd.grad([part, part_lse], wanted, given)
            d_query += found[0].to(d_query.device)
            if scaled:
                d_tensor += found[1].to(d_tensor.device)
        return d_query.to(query.dtype), d_tensor if scaled else None, None, None, None, None
