"""Searches and reads over all slots of a store: the library's ops on runs of pages, merged exactly.

    topk:     the k best of every run and of those before it, ties to the smaller slot
    softmax:  read = sum_run exp(lse_run - lse) read_run,      lse = logsumexp_run lse_run

All pages in memory are one run, in the order of their frames.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import ops
from . import _rows
from ._bitmap import pages_with_bits
from ._engine import Engine
from ._rows import Run

SIXTEEN = (torch.bfloat16, torch.float16)


def exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk(engine: Engine, query: Tensor, k: int, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scores in the exact dtype and slot numbers, best first. [T, K] -> [T, k] each."""
    pages = pages_with_bits(packed, engine.page_slots)
    _rows.bring_in(engine, "keys", pages)
    tier = engine.tiers["keys"]
    here = tier.frame_of[pages] >= 0
    tier.hits += int(here.sum()) * engine.page_slots
    tier.misses += int((~here).sum()) * engine.page_slots
    engine.reads += 1
    best = None
    if here.any():
        run = _rows.arena(engine, "keys")
        run.pages[~np.isin(run.pages, pages[here])] = -1
        best = _run(engine, query, k, scale, packed, run, best)
    for run in _rows.stream(engine, ("keys",), pages[~here]):
        best = _run(engine, query, k, scale, packed, run, best)
    return best or nothing(query, k)


def nothing(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (
        torch.full((len(query), k), -torch.inf, dtype=exact(query.dtype)),
        torch.full((len(query), k), -1, dtype=torch.int64),
    )


def _run(engine: Engine, query: Tensor, k: int, scale, packed: np.ndarray, run: Run, best) -> tuple[Tensor, Tensor]:
    """The best of one run and of what was found before."""
    size = engine.page_slots
    found = {} if best is None else {"best_scores": best[0], "best_slots": best[1]}
    scales, mask = run.scales["keys"], _rows.mask(packed, run.pages, size)
    return ops.paged_topk_search(
        query,
        run.rows["keys"].unflatten(0, (-1, size)),
        torch.from_numpy(run.pages),
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
    if scales is not None:
        return rows, scales.to(exact(query.dtype))
    if rows.dtype == query.dtype or (rows.dtype == torch.float32 and query.dtype in SIXTEEN):
        return rows, None
    return rows.to(query.dtype), None


def _runs(engine: Engine, packed: np.ndarray):
    names = ("keys", "values")
    pages = pages_with_bits(packed, engine.page_slots)
    for name in names:
        _rows.bring_in(engine, name, pages)
    here = np.logical_and(*(engine.tiers[name].frame_of[pages] >= 0 for name in names))
    for name in names:
        engine.tiers[name].hits += int(here.sum()) * engine.page_slots
        engine.tiers[name].misses += int((~here).sum()) * engine.page_slots
    engine.reads += 1
    yield from _rows.stretches(engine, names, pages[here])
    yield from _rows.stream(engine, names, pages[~here])


def _read(engine: Engine, query: Tensor, scale, packed: np.ndarray, run: Run) -> tuple[Tensor, Tensor]:
    values, value_scale = _value_rows(engine, query, run)
    key_scale = run.scales["keys"]
    return ops.softmax_read(
        query,
        run.rows["keys"],
        values,
        scale=scale,
        slot_mask=_rows.mask(packed, run.pages, engine.page_slots),
        key_scale=None if key_scale is None else key_scale.to(exact(query.dtype)),
        value_scale=value_scale,
        return_lse=True,
    )


def _softmax(engine: Engine, query: Tensor, scale, packed: np.ndarray) -> tuple[Tensor, Tensor]:
    reads, lses = [], []
    for run in _runs(engine, packed):
        read, lse = _read(engine, query, scale, packed, run)
        reads.append(read.to(exact(query.dtype)))
        lses.append(lse)
        if len(reads) == 16:
            read, lse = ops.merge_reads(reads, lses)
            reads, lses = [read], [lse]
    if not reads:
        width = engine.columns["values"].dim
        return query.new_zeros(len(query), width), query.new_full((len(query),), -torch.inf, dtype=exact(query.dtype))
    read, lse = ops.merge_reads(reads, lses) if len(reads) > 1 else (reads[0], lses[0])
    return read.to(query.dtype), lse


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
        with engine.lock, torch.autocast("cpu", enabled=False):
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
        for run in _runs(engine, packed):
            with torch.enable_grad():
                leaf, factor = query.detach().requires_grad_(), tensor.detach().requires_grad_(scaled)
                part, part_lse = _read(engine, leaf, factor if scaled else number, packed, run)
            weight = torch.where(part_lse.isneginf(), 0.0, (part_lse.detach() - lse).exp())
            along = (d_read * (part.detach().to(dtype) - read)).sum(-1) + d_lse
            given = [(weight.unsqueeze(-1) * d_read).to(part.dtype), (weight * along).to(part_lse.dtype)]
            wanted = [leaf, factor] if scaled else [leaf]
            found = torch.autograd.grad([part, part_lse], wanted, given)
            d_query += found[0]
            if scaled:
                d_tensor += found[1]
        return d_query.to(query.dtype), d_tensor if scaled else None, None, None, None, None
