"""paged_topk_search: topk_search over pages of slots that lie in any order, begun with what an earlier call found.

    slot(f, j) = S * pages[f] + j,      s[t, f, j] = scale * <query_t, key_fj> + slot_mask_fj
    scores, slots = the k largest over all (f, j) and of the best found before, ties to the smaller slot number

Sources: Johnson et al. 2017, Billion-scale similarity search with GPUs (exact search by selection fused into the
product); Kwon et al. 2023, Efficient Memory Management for Large Language Model Serving with PagedAttention (a table
that says which page lies in which frame).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import Arg, Op, Out
from ._compressed import choose, compressed
from ._formula import scores
from ._options import neighbours, scaled
from .topk_search import best as best_of


def candidates(query, keys, pages, slot_mask, best_scores, best_slots, scale: float) -> tuple[Tensor, Tensor]:
    """Scores and slot numbers of all that may be found, by number. [..., T, F * S + k] each; -1 and -inf: nothing."""
    frames, size = keys.shape[-3:-1]
    slots = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(-2)
    slots = slots.masked_fill((pages < 0).repeat_interleave(size, -1), -1).unsqueeze(-2)
    held = slots.squeeze(-2) >= 0
    if slot_mask is None:
        opened = held
    elif slot_mask.dtype == torch.bool:
        opened = held & slot_mask.flatten(-2)
    else:
        opened = slot_mask.flatten(-2).masked_fill(~held, -torch.inf)
    s = scores(query, keys.flatten(-3, -2), opened, scale)
    slots = slots.expand(s.shape)
    if best_scores is not None:
        lead = torch.broadcast_shapes(s.shape[:-1], best_scores.shape[:-1], best_slots.shape[:-1])
        found = best_scores.masked_fill(best_slots < 0, -torch.inf)
        s = torch.cat([s.expand(*lead, -1), found.to(s.dtype).expand(*lead, -1)], -1)
        slots = torch.cat([slots.expand(*lead, -1), best_slots.expand(*lead, -1)], -1)
    order = slots.argsort(dim=-1, stable=True)
    return s.gather(-1, order), slots.gather(-1, order)


def reference(query, keys, pages, slot_mask, best_scores, best_slots, k: int, scale: float):
    s, slots = candidates(query, keys, pages, slot_mask, best_scores, best_slots, scale)
    chosen, at = best_of(s, k)
    if known(slots.shape[-1] == 0):
        return chosen, at
    return chosen, slots.gather(-1, at.clamp(min=0)).masked_fill(at < 0, -1)


def ranking(query, keys, pages, slot_mask, best_scores, best_slots, k: int, scale: float) -> Tensor:
    """Scores by slot number, -inf where there is no such slot."""
    s, slots = candidates(query, keys, pages, slot_mask, best_scores, best_slots, scale)
    largest = int(slots.max()) if slots.numel() else -1
    by_number = s.new_full((*s.shape[:-1], largest + 2), -torch.inf)  # the last for slot -1
    return by_number.scatter(-1, slots.where(slots >= 0, largest + 1), s)[..., :-1]


def selected(query, keys, pages, slot_mask, best_scores, best_slots, k: int, scale: float, indices: Tensor):
    s, slots = candidates(query, keys, pages, slot_mask, best_scores, best_slots, scale)
    if known(slots.shape[-1] == 0):
        return s.new_full(indices.shape, -torch.inf), indices
    lead = torch.broadcast_shapes(s.shape[:-1], indices.shape[:-1])
    s, slots, indices = (x.expand(*lead, -1) for x in (s, slots, indices))
    at = torch.searchsorted(slots.contiguous(), indices.contiguous()).clamp(max=slots.shape[-1] - 1)
    return s.gather(-1, at).masked_fill(indices < 0, -torch.inf), indices


def _some_pages(query, keys, pages, *rest) -> Tensor:
    """Distinct pages in no order with gaps between them, and where there are several, a frame without one."""
    order = pages.argsort(-1)
    return torch.where((order > 0) | (order.shape[-1] == 1), 2 * order + 1, -1)


OP = register(
    Op(
        name="paged_topk_search",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "F S K", "memory"),
            Arg("pages", "F", "memory", "index", of="", fill=_some_pages),
            Arg("slot_mask", "F S", "memory", "mask", optional=True),
            Arg("best_scores", "T k", "tokens", "stats", optional=True),
            Arg("best_slots", "T k", "tokens", "index", optional=True, of=""),
        ),
        params=(("k", "int"), ("scale", "float")),
        outputs=(
            Out("scores", "T k", dtype="stats"),
            Out("slots", "T k", dtype="index", grad=False, of="", judge=ranking),
        ),
        saved=("slots",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["F"] * s["S"] * s["K"],
        backward_flops=lambda s: 4 * s["T"] * s["k"] * s["K"],  # d_query, d_keys, of the chosen
        selected=selected,
        autocast=("query", "keys"),
        equation="topk_search over slots S pages[f] + j, and those found before, ties to the smaller slot number",
    )
)
COMPRESSED = register(compressed(OP, keys="key_scale"))


def paged_topk_search(
    query: Tensor,
    keys: Tensor,
    pages: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    best_scores: Tensor | None = None,
    best_slots: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` slots with the largest scores for every token, of slots that lie in pages in any order. Exact.

    ``s[t, f, j] = scale * <query_t, key_fj> + slot_mask_fj``, the score of slot ``S * pages[f] + j``

    Args:
        query: ``[..., T, K]``.
        keys: ``[..., F, S, K]``, F frames of S slots, same dtype, or int8 or float8_e4m3fn with ``key_scale``.
        pages: int64 or int32 ``[..., F]``, the page that lies in each frame, each at most once; -1: none, the frame is
            not read.
        k: how many. scale: as in :func:`softmax_read`. slot_mask: ``[..., F, S]``, bool or float.
        key_scale: ``[..., F, S]``, as in :func:`softmax_read`.
        best_scores, best_slots: what a call over other pages of the same memory returned, for the same tokens. The
            result is then the best of both, and few of the new scores pass the threshold that the old ones set: a
            memory that is read in runs costs about what it costs at once.
        backend: as in :func:`softmax_read`.

    Returns:
        ``(scores [..., T, k] in float32, float64 for float64; slots [..., T, k] int64)``, best first, equal scores by
        smaller slot number, wherever its page lies. Slot -1 and score -inf where fewer than k slots are addressable.
        Scores are differentiable in query, keys, a float mask and ``best_scores``. A NaN score ranks above all
        others, as in :func:`topk_search`.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit, or best_scores comes
            without best_slots.

    Source: Johnson et al. 2017, Billion-scale similarity search with GPUs; Kwon et al. 2023, Efficient Memory
    Management for Large Language Model Serving with PagedAttention.
    """
    k = neighbours("paged_topk_search", k)
    if (best_scores is None) != (best_slots is None):
        absent = "best_scores" if best_scores is None else "best_slots"
        raise TypeError(f"paged_topk_search: best_scores and best_slots must come together, got None for {absent}")
    tensors = [query, keys, pages, slot_mask, best_scores, best_slots]
    op, tensors = choose(OP, COMPRESSED, tensors, key_scale)
    tensors, factor = scaled(op, tensors, scale, "paged_topk_search")
    return call(op, tensors, (k, factor), backend)
