"""topk_search on a GPU: the k best-scoring slots of every token, exactly.

    s[t, i] = scale <q_t, k_i> + mask_i

k <= 256 (float32: 128): a program keeps a block of tokens and streams blocks of slots. The scores of a block become
ranks (topk_tiles.py); where none exceeds the worst of the list of its token, which is soon the rule, the block is done.
Otherwise the best of the block are sorted and merged into the lists. Scores never leave the chip. Where tokens are
few, N is split and a second kernel merges the lists of the parts, whose order cannot matter. That kernel also turns
ranks into scores and indices, or for topk_read into weights.

Larger k: ranks go to a workspace of bounded size, some tokens and some slots at a time, and torch.topk selects.

Backward: the gradient of a score touches one key: a gather for the query, sums over sorted entries for keys and mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import COMPRESSED, FEW, SCALE, Example, Inputs, operator
from .launch import bits, launch, narrowed, plan, summed
from .layout import Call, Gradient, precision
from .ranges import load_ranges, meets, slot_bounds, within
from .segments import Segments
from .sparse_read import check_indices, gather
from .tiles import dots, open_slots, row_scales, scores, slot_block, slots, token_block, tokens
from .topk_tiles import (
    LOWEST,
    best_of,
    ranks,
    scored,
    scored_tensor,
    shares,
    shares_tensor,
    store_lists,
    with_block,
)

LARGEST = {16: 256, 32: 128}  # neighbours that a list on the chip holds, by bits of an element: more would spill
SHORT_LIST, NARROW = 128, 64  # beside a longer list there are registers for so many columns of keys at a time
WORKSPACE = 1 << 25  # ranks in memory at a time, for larger k


class Frames(NamedTuple):
    """Slots that lie in frames rank by ``order``, the place of a frame's page in the order of pages, -1 for none:
    ``(tensor, stride of B0, of B1, of a frame)``. S: slots of a frame."""

    order: tuple
    S: int


@triton.jit
def score_ranks(
    q0, q_rows, t_ok, k, mask, ranges, first, stop, k_scale, order, S, b, B1, n, N, K, scale,
    BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Ranks of slots ``n`` for a block of tokens."""
    ok, bias = open_slots(mask, b, B1, n, N)
    index = n
    if order is not None:
        frame = n // S
        place = tl.load(slots(order, b, B1, frame), mask=ok, other=-1)
        ok = ok & (place >= 0)
        index = n + (place - frame) * S
    k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
    dot = dots(q0, q_rows, t_ok, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION)
    if k_scale is not None:
        dot *= row_scales(k_scale, b, B1, n, ok)[None, :]
    s = scores(dot, scale, bias[None, :])
    live = within(ranges, ok[None, :], first[:, None], stop[:, None], n[None, :])
    return ranks(s, tl.broadcast_to(index[None, :], s.shape), tl.broadcast_to(live, s.shape))


@triton.jit
def store_best(
    q, k, mask, ranges, k_scale, order, S, lists, T, N, K, B1, inner, parts, span, scale,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The best LIST ranks of a block of tokens among the slots ``part * span ..``: lists [parts, B, T, LIST]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    part = pid % parts
    b = pid // parts
    t_ok = t < T
    q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
    best = tl.full([BLOCK_T, LIST], LOWEST, tl.int64)
    worst = tl.full([BLOCK_T], LOWEST, tl.int64)
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    begin, end = slot_bounds(ranges, first, stop, part * span, tl.minimum(N, (part + 1) * span), BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        rank = score_ranks(
            q0, q_rows, t_ok, k, mask, ranges, first, stop, k_scale, order, S, b, B1, n, N, K, scale,
            BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        best, worst = with_block(best, worst, rank, t_ok, LIST, BLOCK_N)
    store_lists(lists, best, part, parts, blocks, b, t, t_ok, T, LIST)


@triton.jit
def topk_search_kernel(
    q, k, mask, ranges, k_scale, lists, T, N, K, B1, inner, parts, span, scale,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    store_best(
        q, k, mask, ranges, k_scale, None, None, lists, T, N, K, B1, inner, parts, span, scale,
        LIST, BLOCK_T, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
    )  # fmt: skip


@triton.jit
def paged_topk_search_kernel(
    q, k, mask, k_scale, order, S, lists, T, N, K, B1, inner, parts, span, scale,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    store_best(
        q, k, mask, None, k_scale, order, S, lists, T, N, K, B1, inner, parts, span, scale,
        LIST, BLOCK_T, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
    )  # fmt: skip


@triton.jit
def topk_merge_kernel(
    lists, scores, indices, weights, lse, T, B, B1, inner, k, parts, LIST: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Merge the lists of all parts; write scores, or weights and their lse, and indices."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // blocks
    t_ok = t < T
    j = tl.arange(0, LIST)
    rows = lists + ((b.to(tl.int64) * T + t) * LIST)[:, None] + j[None, :]
    between = tl.full([], 1, tl.int64) * B * T * LIST
    best = tl.load(rows, mask=t_ok[:, None], other=LOWEST)
    for part in range(1, parts):
        best = best_of(best, tl.load(rows + part * between, mask=t_ok[:, None], other=LOWEST))
    score, index = scored(best)
    inside = t_ok[:, None] & (j < k)[None, :]
    tl.store(tokens(indices, b, B1, t, inner)[:, None] + j[None, :], index, mask=inside)
    if scores is not None:
        tl.store(
            tokens(scores, b, B1, t, inner)[:, None] + j[None, :], score.to(scores[0].dtype.element_ty), mask=inside
        )
    if weights is not None:
        p, whole = shares(score, (j < k)[None, :])
        tl.store(tokens(weights, b, B1, t, inner)[:, None] + j[None, :], p, mask=inside)
        tl.store(tokens(lse, b, B1, t, inner), whole, mask=t_ok)


@triton.jit
def store_ranks(
    q, k, mask, ranges, k_scale, order, S, out, T, N, K, B1, inner, first_t, count_t, first_n, count_n, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Ranks of ``count_t`` tokens on ``count_n`` slots: out [B, count_t, count_n]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(count_t, BLOCK_T)
    own_t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    own_n = (pid % tl.cdiv(count_n, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = pid // tl.cdiv(count_n, BLOCK_N)
    t = first_t + own_t
    t_ok = own_t < count_t
    q_rows, q0 = token_block(q, b, B1, t, inner, t_ok, K, BLOCK_K)
    n = first_n + own_n
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    rank = tl.full([BLOCK_T, BLOCK_N], LOWEST, tl.int64)
    if ranges is None or meets(first, stop, tl.min(n, 0), tl.max(n, 0) + 1):
        rank = score_ranks(
            q0, q_rows, t_ok, k, mask, ranges, first, stop, k_scale, order, S, b, B1, n, N, K, scale,
            BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
    row = (b.to(tl.int64) * count_t + own_t) * count_n
    tl.store(out + row[:, None] + own_n[None, :], rank, mask=t_ok[:, None] & (own_n < count_n)[None, :])


@triton.jit
def rank_kernel(
    q, k, mask, ranges, k_scale, out, T, N, K, B1, inner, first_t, count_t, first_n, count_n, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    store_ranks(
        q, k, mask, ranges, k_scale, None, None, out, T, N, K, B1, inner, first_t, count_t, first_n, count_n, scale,
        BLOCK_T, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
    )  # fmt: skip


@triton.jit
def paged_rank_kernel(
    q, k, mask, k_scale, order, S, out, T, N, K, B1, inner, first_t, count_t, first_n, count_n, scale,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    store_ranks(
        q, k, mask, None, k_scale, order, S, out, T, N, K, B1, inner, first_t, count_t, first_n, count_n, scale,
        BLOCK_T, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
    )  # fmt: skip


def _row(frames: Frames | None) -> str:
    """The name of the configurations. A search of frames needs more registers than rows of topk_search give it."""
    return "topk_search" if frames is None else "paged_topk_search"


def _sources(
    call: Call, query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    key_scale: Tensor | None, frames: Frames | None,
) -> tuple:  # fmt: skip
    """What is searched, as the kernels take it; slots in frames have no ranges."""
    rows, numbers = (call.rows(query), call.slots(keys)), (call.slot_numbers(slot_mask), call.slot_numbers(key_scale))
    return (*rows, *numbers, *frames) if frames else (*rows, numbers[0], call.rows(slot_range), numbers[1])


def _many(
    call: Call, query: Tensor, keys: Tensor, slot_mask: Tensor | None, key_scale: Tensor | None, k: int, scale: float,
    frames: Frames | None, slot_range: Tensor | None,
) -> Tensor:  # fmt: skip
    """The best k ranks ``[B, F * T, k]`` by way of a workspace, for k beyond LARGEST."""
    (T, K), N, count = query.shape[-2:], keys.shape[-2], call.F * query.shape[-2]
    best = torch.full((call.B, count, k), -(2**63), dtype=torch.int64, device=call.device)
    p, wide = plan(_row(frames), K, query, keys, compressed=key_scale is not None), summed(K, query, keys)
    sources = _sources(call, query, keys, slot_mask, slot_range, key_scale, frames)
    kernel = rank_kernel if frames is None else paged_rank_kernel
    step_n = min(N, max(4 * k, 8192))
    step_t = max(1, WORKSPACE // max(1, call.B * step_n))
    for t in range(0, count, step_t):
        some_t = min(step_t, count - t)
        for n in range(0, N, step_n):
            some_n = min(step_n, N - n)
            tiles = triton.cdiv(some_t, p.config.block_t) * triton.cdiv(some_n, p.config.block_n)
            found = call.scratch(call.B, some_t, some_n, dtype=torch.int64)
            launch(
                kernel, call.B * tiles, *sources, found, count, N, K, call.batches[1],
                T if call.F > 1 else None, t, some_t, n, some_n, scale, plan=p, BLOCK_T=p.config.block_t,
                BLOCK_N=p.config.block_n, BLOCK_K=wide.block, K_STEPS=wide.several, PRECISION=precision(query),
            )  # fmt: skip
            found = torch.cat([best[:, t : t + some_t], found], -1)
            best[:, t : t + some_t] = torch.topk(found, k, -1).values
    return best


def search(
    call: Call, query: Tensor, keys: Tensor, slot_mask: Tensor | None, k: int, scale: float,
    scores: Tensor | None, indices: Tensor, weights: Tensor | None, key_scale: Tensor | None = None,
    frames: Frames | None = None, slot_range: Tensor | None = None, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the views ``[B0, B1, F, T, k]`` of scores or weights, and of indices: with ``frames``, those in the order of
    pages; and beside weights the view ``[B0, B1, F, T]`` of ``lse``."""
    call.require(k >= 1, "k must be at least 1")
    (T, K), N, count = query.shape[-2:], keys.shape[-2], call.F * query.shape[-2]
    if k > LARGEST[bits(query, keys)]:
        score, index = scored_tensor(_many(call, query, keys, slot_mask, key_scale, k, scale, frames, slot_range))
        indices.copy_(index.view(indices.shape))
        if scores is not None:
            scores.copy_(score.view(scores.shape))
        if weights is not None:
            p, whole = shares_tensor(score)
            weights.copy_(p.view(weights.shape))
            lse.copy_(whole.view(lse.shape))
        return
    size = max(16, triton.next_power_of_2(k))
    p, wide = plan(_row(frames), K, query, keys, compressed=key_scale is not None), summed(K, query, keys)
    if size > SHORT_LIST:
        wide = narrowed(wide, NARROW)
    c, inner, block_n = p.config, T if call.F > 1 else None, max(p.config.block_n, size)
    programs = call.B * triton.cdiv(count, c.block_t)
    parts, span = p.cut(programs, N, block_n, sums=False)
    lists = call.scratch(parts, call.B, count, size, dtype=torch.int64)
    sources = _sources(call, query, keys, slot_mask, slot_range, key_scale, frames)
    kernel = topk_search_kernel if frames is None else paged_topk_search_kernel
    launch(
        kernel, programs * parts, *sources, lists, count, N, K, call.batches[1], inner, parts, span, scale, plan=p,
        LIST=size, BLOCK_T=c.block_t, BLOCK_N=block_n, BLOCK_K=wide.block, K_STEPS=wide.several,
        PRECISION=precision(query),
    )  # fmt: skip
    merge_parts(call, query, lists, k, scores, indices, weights, lse)


def merge_parts(
    call: Call, query: Tensor, lists: Tensor, k: int, scores: Tensor | None, indices: Tensor,
    weights: Tensor | None = None, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Merge the lists ``[parts, B, F * T, size]`` of all parts into the results; see :func:`search`."""
    (parts, _, count, size), T = lists.shape, indices.shape[-2]
    p = plan("topk_merge", 64, query)
    launch(
        topk_merge_kernel, call.B * triton.cdiv(count, p.config.block_t), lists,
        *(None if x is None else (x, *x.stride()[:4]) for x in (scores, indices, weights, lse)),
        count, call.B, call.batches[1], T if call.F > 1 else None, k, parts, plan=p, LIST=size,
        BLOCK_T=p.config.block_t,
    )  # fmt: skip


def _call(
    op: str, query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, *more: tuple,
    key_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    (T, K), N = query.shape[-2:], keys.shape[-2]
    memory = [("keys", keys, (N, K)), ("slot_mask", slot_mask, (N,)), ("key_scale", key_scale, (N,))]
    call = Call(op, [("query", query, (T, K)), ("slot_range", slot_range, (T, 2)), *more], memory)
    call.floats(query)
    call.compressed("keys", keys, key_scale)
    call.mask(slot_mask)
    call.ranges(slot_range)
    return call


@operator
def topk_search(query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, k: int, scale: float):
    """scores ``[..., T, k]`` in the dtype of query, indices ``[..., T, k]``."""
    call = _call("topk_search", query, keys, slot_mask, slot_range)
    return _search(call, query, keys, slot_mask, slot_range, None, k, scale)


@operator
def topk_search_compressed(
    query: Tensor,
    keys: Tensor,
    slot_mask: Tensor | None,
    slot_range: Tensor | None,
    key_scale: Tensor | None,
    k: int,
    scale: float,
):
    """The same over keys in 8 bits."""
    call = _call("topk_search_compressed", query, keys, slot_mask, slot_range, key_scale=key_scale)
    return _search(call, query, keys, slot_mask, slot_range, key_scale, k, scale)


def _search(
    call: Call, query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    key_scale: Tensor | None, k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T = query.shape[-2]
    call.require(k >= 1, "k must be at least 1")
    scores, score_view = call.token_result(T, k, dtype=query.dtype)
    indices, index_view = call.token_result(T, k, dtype=torch.int64)
    search(call, query, keys, slot_mask, k, scale, score_view, index_view, None, key_scale, slot_range=slot_range)
    return call.store(scores, score_view), call.store(indices, index_view)


def choice_gradients(
    call: Call, query: Tensor, keys: Tensor, slot_mask: Tensor | None, indices: Tensor, ds: Tensor, scale: float,
    wants: list[bool], segments: Segments | None = None, key_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, keys and mask from ``ds [B, F * T, k]``, float32, of the chosen scores."""
    (T, K), N, k = query.shape[-2:], keys.shape[-2], indices.shape[-1]
    d_query = Gradient(call, query, wants[0], "tokens", T, K)
    d_keys = Gradient(call, keys, wants[1], "memory", N, K)
    d_mask = Gradient(call, slot_mask, wants[2], "memory", N)
    if d_query.wanted:
        rows = (ds, call.batches[1] * call.F * T * k, call.F * T * k, T * k, k)
        gather(call, keys, indices, rows, d_query.rows(), T, scale, key_scale)
    if d_keys.wanted or d_mask.wanted:
        segments = segments or Segments(call, indices, N)
        segments.sum(d_keys, ds, query, scale)
        segments.sum(d_mask, ds, None, 1.0)
    return d_query.result(), d_keys.result(), d_mask.result()


@operator
def topk_search_backward(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, indices: Tensor,
    d_scores: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys and a float mask."""
    call = _call("topk_search_backward", query, keys, slot_mask, slot_range, *_more(query, indices, d_scores, k))
    call.require(len(wants) == 3, "wants must have 3 entries")
    return choice_gradients(
        call, query, keys, slot_mask, indices, _score_gradient(call, keys, indices, d_scores), scale, wants
    )


@operator
def topk_search_compressed_backward(
    query: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, key_scale: Tensor | None,
    indices: Tensor, d_scores: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query and a float mask."""
    more = _more(query, indices, d_scores, k)
    call = _call("topk_search_compressed_backward", query, keys, slot_mask, slot_range, *more, key_scale=key_scale)
    call.require(len(wants) == 2, "wants must have 2 entries")
    ds = _score_gradient(call, keys, indices, d_scores)
    wants = [wants[0], False, wants[1]]
    d_query, _, d_mask = choice_gradients(
        call, query, keys, slot_mask, indices, ds, scale, wants, key_scale=key_scale
    )  # fmt: skip
    return d_query, d_mask


def _more(query: Tensor, indices: Tensor, d_scores: Tensor | None, k: int) -> list[tuple]:
    T = query.shape[-2]
    return [("indices", indices, (T, k)), ("d_scores", d_scores, (T, k))]


def _score_gradient(call: Call, keys: Tensor, indices: Tensor, d_scores: Tensor | None) -> Tensor:
    """d_scores as ``[B, F * T, k]``, float32."""
    call.require(d_scores is not None, "d_scores must be given")
    call.floats(d_scores)
    check_indices(call, indices, keys.shape[-2])
    T, k = indices.shape[-2:]
    return call.token_view(d_scores, 1).reshape(call.B, call.F * T, k).float().contiguous()


def examples(x: Inputs) -> Iterator[Example]:
    def best(T: int, k: int, **which) -> Example:
        arguments = (x(2, T, x.width), x(2, x.slots, x.width), None, None, k, SCALE)
        return Example(topk_search, arguments, variant=f"k = {k}", **which)

    yield best(x.tokens, 32, main=True)
    yield best(FEW, 8)
    yield best(x.tokens, LARGEST[32], heavy=True)
    yield best(x.tokens, LARGEST[16], heavy=True)
    yield best(FEW, 1000)
    q, k, ranges = x(2, x.tokens, x.width), x(2, x.slots, x.width), x.ranges(2, x.tokens)
    for count in (32, 1000):
        yield Example(topk_search, (q, k, None, ranges, count, SCALE), variant=f"ranges, k = {count}", gradients=())
    q, scales = x(2, x.tokens, x.width), x(2, x.slots, dtype=torch.float32)
    for kind, dtype in COMPRESSED.items():
        arguments = (q, x.compressed(2, x.slots, x.width, dtype=dtype), None, None, scales, 32, SCALE)
        yield Example(topk_search_compressed, arguments, variant=kind, gradients=())
