"""paged_topk_search: the search of topk_search.py over frames of S slots, whose pages lie in any order.

A slot ranks by S times the place of its page among all pages in order, which is below F * S however large the number of
the page. The number follows from that place. What an earlier call found is merged by two stable sorts, by slot and then
by score.

Backward: the frame of a slot is found again by bisection among the pages in order; a gradient whose slot came from the
earlier call goes back to its score.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .declare import COMPRESSED, FEW, SCALE, Example, Inputs, operator
from .layout import Call
from .topk_search import LARGEST, Frames, choice_gradients, search

NONE = torch.iinfo(torch.int64).max  # stands for the page of an empty frame: it comes last


def _call(op: str, query, keys, pages, slot_mask, best_scores, best_slots, k: int, key_scale, *more: tuple) -> Call:
    (T, K), (F, S) = query.shape[-2:], keys.shape[-3:-1]
    tokens = [("best_scores", best_scores, (T, k)), ("best_slots", best_slots, (T, k))]
    memory = [("keys", keys, (F, S, K)), ("pages", pages, (F,)), ("slot_mask", slot_mask, (F, S))]
    call = Call(op, [("query", query, (T, K)), *tokens, *more], [*memory, ("key_scale", key_scale, (F, S))])
    call.floats(query)
    call.compressed("keys", keys, key_scale)
    call.mask(slot_mask)
    call.stats(best_scores)
    call.require((best_scores is None) == (best_slots is None), "best_scores and best_slots must come together")
    integers = [pages] if best_slots is None else [pages, best_slots]
    call.require(all(x.dtype == torch.int64 for x in integers), "pages and slots must be int64")
    call.require(k >= 1, "k must be at least 1")
    return call


def _flat(x: Tensor | None, tail: int) -> Tensor | None:
    """``[..., F, S, (tail axes)]`` as ``[..., F * S, (tail axes)]``."""
    return None if x is None else x.flatten(-2 - tail, -1 - tail)


def _in_order(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pages in ascending order, NONE last, and the frame of each. int64 [..., F] each."""
    return torch.sort(pages.masked_fill(pages < 0, NONE), dim=-1, stable=True)


@operator
def paged_topk_search(
    query: Tensor, keys: Tensor, pages: Tensor, slot_mask: Tensor | None, best_scores: Tensor | None,
    best_slots: Tensor | None, k: int, scale: float,
):  # fmt: skip
    """scores ``[..., T, k]`` in float32, slots ``[..., T, k]``."""
    call = _call("paged_topk_search", query, keys, pages, slot_mask, best_scores, best_slots, k, None)
    return _search(call, query, keys, pages, slot_mask, best_scores, best_slots, None, k, scale)


@operator
def paged_topk_search_compressed(
    query: Tensor, keys: Tensor, pages: Tensor, slot_mask: Tensor | None, best_scores: Tensor | None,
    best_slots: Tensor | None, key_scale: Tensor | None, k: int, scale: float,
):  # fmt: skip
    """The same over keys in 8 bits."""
    op = "paged_topk_search_compressed"
    call = _call(op, query, keys, pages, slot_mask, best_scores, best_slots, k, key_scale)
    return _search(call, query, keys, pages, slot_mask, best_scores, best_slots, key_scale, k, scale)


def _search(
    call: Call, query, keys, pages, slot_mask, best_scores, best_slots, key_scale, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    T, (F, S) = query.shape[-2], keys.shape[-3:-1]
    by_order, frame = _in_order(pages)
    place = torch.arange(F, device=call.device).expand(pages.shape)
    place = torch.zeros_like(frame).scatter(-1, frame, place).masked_fill(pages < 0, -1).int()
    scores, score_view = call.token_result(T, k, dtype=torch.float32)
    indices, index_view = call.token_result(T, k, dtype=torch.int64)
    frames = Frames(call.slot_numbers(place), S)
    flat_keys, mask, factor = _flat(keys, 1), _flat(slot_mask, 0), _flat(key_scale, 0)
    search(call, query, flat_keys, mask, k, scale, score_view, index_view, None, factor, frames)
    scores, indices = call.store(scores, score_view), call.store(indices, index_view)
    slots = _numbers(by_order, indices, S)
    return (scores, slots) if best_scores is None else _merged(scores, slots, best_scores, best_slots)


def _numbers(by_order: Tensor, indices: Tensor, S: int) -> Tensor:
    """The slot of each index in the order of pages. int64 [..., F], [..., T, k] -> [..., T, k]."""
    if by_order.shape[-1] == 0:
        return indices
    at = indices.clamp(min=0).flatten(-2)
    page = by_order.expand(*at.shape[:-1], -1).gather(-1, at // S)
    return (page * S + at % S).view(indices.shape).masked_fill(indices < 0, -1)


def _merged(scores: Tensor, slots: Tensor, best_scores: Tensor, best_slots: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of both, equal scores by smaller slot."""
    k, lead = scores.shape[-1], scores.shape[:-1]
    best_scores = best_scores.masked_fill(best_slots < 0, -torch.inf).expand(*lead, -1)
    scores, slots = torch.cat([scores, best_scores], -1), torch.cat([slots, best_slots.expand(*lead, -1)], -1)
    slots, order = torch.sort(slots, dim=-1, stable=True)
    scores, order = torch.sort(scores.gather(-1, order), dim=-1, descending=True, stable=True)
    scores = scores[..., :k].contiguous()
    return scores, slots.gather(-1, order[..., :k]).masked_fill(torch.isneginf(scores), -1)


@operator
def paged_topk_search_backward(
    query: Tensor, keys: Tensor, pages: Tensor, slot_mask: Tensor | None, best_scores: Tensor | None,
    best_slots: Tensor | None, slots: Tensor, d_scores: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, a float mask and best_scores."""
    op = "paged_topk_search_backward"
    return _gradients(
        op, query, keys, pages, slot_mask, best_scores, best_slots, None, slots, d_scores, k, scale, wants
    )


@operator
def paged_topk_search_compressed_backward(
    query: Tensor, keys: Tensor, pages: Tensor, slot_mask: Tensor | None, best_scores: Tensor | None,
    best_slots: Tensor | None, key_scale: Tensor | None, slots: Tensor, d_scores: Tensor | None, k: int, scale: float,
    wants: list[bool],
):  # fmt: skip
    """Gradients of query, a float mask and best_scores."""
    op = "paged_topk_search_compressed_backward"
    wants = [wants[0], False, *wants[1:]]
    d_query, _, d_mask, d_best = _gradients(
        op, query, keys, pages, slot_mask, best_scores, best_slots, key_scale, slots, d_scores, k, scale, wants
    )
    return d_query, d_mask, d_best


def _gradients(
    op: str, query, keys, pages, slot_mask, best_scores, best_slots, key_scale, slots, d_scores, k: int, scale: float,
    wants: list[bool],
):  # fmt: skip
    T, (F, S) = query.shape[-2], keys.shape[-3:-1]
    more = [("slots", slots, (T, k)), ("d_scores", d_scores, (T, k))]
    call = _call(op, query, keys, pages, slot_mask, best_scores, best_slots, k, key_scale, *more)
    call.require(len(wants) == 4, "wants must have 4 entries")
    call.require(d_scores is not None, "d_scores must be given")
    call.require(slots.dtype == torch.int64, "slots must be int64")
    call.stats(d_scores)
    places = _places(pages, slots.expand(*call.whole, T, k), S)
    ds = call.token_view(d_scores, 1).reshape(call.B, call.F * T, k).contiguous()
    d_query, d_keys, d_mask = choice_gradients(
        call, query, _flat(keys, 1), _flat(slot_mask, 0), places, ds, scale, wants[:3], key_scale=_flat(key_scale, 0)
    )
    parted = [
        d.unflatten(at, (F, S)) if want and x is not None and x.is_floating_point() else d
        for d, x, at, want in ((d_keys, keys, -2, wants[1]), (d_mask, slot_mask, -1, wants[2]))
    ]
    return d_query, *parted, _best_gradient(best_scores, best_slots, slots, places, d_scores, wants[3])


def _places(pages: Tensor, slots: Tensor, S: int) -> Tensor:
    """f * S + j of slots in frames, -1 of others. int64 [..., F], [..., T, k] -> [..., T, k]."""
    if pages.shape[-1] == 0 or S == 0:
        return torch.full_like(slots, -1)
    by_order, frame = (x.expand(*slots.shape[:-2], -1).contiguous() for x in _in_order(pages))
    wanted = torch.div(slots, S, rounding_mode="floor").flatten(-2)
    at = torch.searchsorted(by_order, wanted).clamp(max=pages.shape[-1] - 1)
    held = (by_order.gather(-1, at) == wanted) & (wanted >= 0)
    found = frame.gather(-1, at) * S + slots.flatten(-2) % S
    return found.masked_fill(~held, -1).view(slots.shape)


def _best_gradient(best_scores, best_slots, slots: Tensor, places: Tensor, d_scores: Tensor, wanted: bool) -> Tensor:
    """d_best[t, i] = d_scores[t, j] where slot j of the result is slot i of the earlier call."""
    if not wanted or best_scores is None:
        return d_scores.new_empty((0,))
    lead, k = places.shape[:-1], places.shape[-1]
    named, order = torch.sort(best_slots.expand(*lead, -1), dim=-1, stable=True)
    slots, d_scores = (x.expand(*lead, -1).contiguous() for x in (slots, d_scores))
    at = torch.searchsorted(named, slots).clamp(max=k - 1)
    found = (named.gather(-1, at) == slots) & (slots >= 0) & (places < 0)
    column = order.gather(-1, at).masked_fill(~found, k)  # the last for none; no other is written twice
    d_best = torch.zeros((*lead, k + 1), dtype=d_scores.dtype, device=d_scores.device)
    d_best = d_best.scatter(-1, column, d_scores.masked_fill(~found, 0))[..., :k]
    return d_best.sum_to_size(best_scores.shape).contiguous()


def examples(x: Inputs) -> Iterator[Example]:
    S = 128
    F = x.slots // S

    def best(T: int, k: int, found: bool, **which) -> Example:
        before = (x(2, T, k, dtype=torch.float32), x.integers(2, T, k, below=10)) if found else (None, None)
        keys, pages = x(2, F, S, x.width), x.integers(2, F, below=F)
        arguments = (x(2, T, x.width), keys, pages, None, *before, k, SCALE)
        return Example(paged_topk_search, arguments, variant=f"k = {k}", **which)

    yield best(x.tokens, 32, True, main=True)
    yield best(FEW, 8, False)
    yield best(x.tokens, LARGEST[32], False, heavy=True)
    yield best(FEW, 1000, True)
    q, pages, scales = x(2, x.tokens, x.width), x.integers(2, F, below=F), x(2, F, S, dtype=torch.float32)
    for kind, dtype in COMPRESSED.items():
        keys = x.compressed(2, F, S, x.width, dtype=dtype)
        arguments = (q, keys, pages, None, None, None, scales, 32, SCALE)
        yield Example(paged_topk_search_compressed, arguments, variant=kind, gradients=())
