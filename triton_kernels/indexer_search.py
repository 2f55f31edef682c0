"""indexer_search on a GPU: the k best slots of every token by a score of many heads, exactly.

    s[t, i] = sum_h w[t, h] relu(scale <q_th, k_i>) + mask_i

The search of topk_search.py with other scores: a program keeps a block of tokens, streams blocks of slots, and loads a
block of keys once for all heads. A product has the rows of several heads of each token, so that few tokens fill a
matrix instruction too; heads are added in a fixed order, in float32. Lists, parts and the workspace for large k are
those of topk_search. With T tokens, H heads and N slots it is bound by the matrix unit, T H N K multiplications; the
queries of a block come from L2 once per block of slots.

Backward (indexer_gradients.py) makes the products of the chosen slots again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import FEW, SCALE, Example, Inputs, operator
from .indexer_gradients import gradients
from .launch import bits, launch, narrowed, plan, summed
from .layout import Call, precision
from .ranges import load_ranges, meets, slot_bounds, within
from .tiles import dots, open_slots, slot_block, tile, tokens
from .topk_search import LARGEST, NARROW, SHORT_LIST, WORKSPACE, merge_parts
from .topk_tiles import LOWEST, ranks, scored_tensor, store_lists, with_block

ROWS = {16: 64, 32: 16}  # of a product, by bits of an element: a warp group of wgmma wants 64
BESIDE = 64, 16  # beside a longer list there are registers for so many rows


@triton.jit
def head_scores(
    q, w, b, B1, t, inner, t_ok, k0, k_rows, ok, H, K, scale,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_h w[t, h] relu(scale <q_th, k_i>): [BLOCK_T, BLOCK_N]."""
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    q_tokens, w_tokens = tokens(q, b, B1, t, inner), tokens(w, b, B1, t, inner)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        live = tl.reshape(t_ok[:, None] & (h < H)[None, :], [BLOCK_T * BLOCK_H])
        q_rows = tl.reshape(q_tokens[:, None] + (h * q[5])[None, :], [BLOCK_T * BLOCK_H])
        q0 = tile(q_rows, live, K, 0, BLOCK_K)
        dot = dots(q0, q_rows, live, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION) * scale
        weight = tl.load(w_tokens[:, None] + h[None, :], mask=t_ok[:, None] & (h < H)[None, :], other=0.0)
        weight = tl.reshape(weight.to(tl.float32), [BLOCK_T * BLOCK_H])
        dot = tl.where(dot < 0, 0.0, dot) * weight[:, None]  # relu keeps NaN
        dot = tl.where(live[:, None], dot, 0.0)
        total += tl.sum(tl.reshape(dot, [BLOCK_T, BLOCK_H, BLOCK_N]), 1)
    return total


@triton.jit
def head_ranks(
    q, w, k, mask, ranges, first, stop, b, B1, t, inner, t_ok, n, N, H, K, scale,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Ranks of slots ``n`` for a block of tokens."""
    ok, bias = open_slots(mask, b, B1, n, N)
    k_rows, k0 = slot_block(k, b, B1, n, ok, K, BLOCK_K)
    s = head_scores(
        q, w, b, B1, t, inner, t_ok, k0, k_rows, ok, H, K, scale,
        BLOCK_T, BLOCK_H, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
    )  # fmt: skip
    s += bias[None, :]
    live = within(ranges, ok[None, :], first[:, None], stop[:, None], n[None, :])
    return ranks(s, tl.broadcast_to(n[None, :], s.shape), tl.broadcast_to(live, s.shape))


@triton.jit
def indexer_search_kernel(
    q, w, k, mask, ranges, lists, T, N, H, K, B1, inner, parts, span, scale,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best LIST ranks of a block of tokens among the slots ``part * span ..``: lists [parts, B, T, LIST]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    part = pid % parts
    b = pid // parts
    t_ok = t < T
    best = tl.full([BLOCK_T, LIST], LOWEST, tl.int64)
    worst = tl.full([BLOCK_T], LOWEST, tl.int64)
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    begin, end = slot_bounds(ranges, first, stop, part * span, tl.minimum(N, (part + 1) * span), BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        rank = head_ranks(
            q, w, k, mask, ranges, first, stop, b, B1, t, inner, t_ok, n, N, H, K, scale,
            BLOCK_T, BLOCK_H, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        best, worst = with_block(best, worst, rank, t_ok, LIST, BLOCK_N)
    store_lists(lists, best, part, parts, blocks, b, t, t_ok, T, LIST)


@triton.jit
def indexer_rank_kernel(
    q, w, k, mask, ranges, out, T, N, H, K, B1, inner, first_t, count_t, first_n, count_n, scale,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Ranks of ``count_t`` tokens on ``count_n`` slots: out [B, count_t, count_n]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(count_t, BLOCK_T)
    own_t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    own_n = (pid % tl.cdiv(count_n, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = pid // tl.cdiv(count_n, BLOCK_N)
    t, n, t_ok = first_t + own_t, first_n + own_n, own_t < count_t
    first, stop = load_ranges(ranges, b, B1, t, inner, t_ok, N)
    rank = tl.full([BLOCK_T, BLOCK_N], LOWEST, tl.int64)
    if ranges is None or meets(first, stop, tl.min(n, 0), tl.max(n, 0) + 1):
        rank = head_ranks(
            q, w, k, mask, ranges, first, stop, b, B1, t, inner, t_ok, n, N, H, K, scale,
            BLOCK_T, BLOCK_H, BLOCK_N, BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
    row = (b.to(tl.int64) * count_t + own_t) * count_n
    tl.store(out + row[:, None] + own_n[None, :], rank, mask=t_ok[:, None] & (own_n < count_n)[None, :])


def _call(
    op: str, query: Tensor, head_weights: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    *more: tuple,
) -> Call:  # fmt: skip
    (T, H, K), N = query.shape[-3:], keys.shape[-2]
    token_side = [("query", query, (T, H, K)), ("head_weights", head_weights, (T, H))]
    token_side += [("slot_range", slot_range, (T, 2)), *more]
    call = Call(op, token_side, [("keys", keys, (N, K)), ("slot_mask", slot_mask, (N,))])
    call.floats(query, head_weights, keys)
    call.mask(slot_mask)
    call.require(slot_range is None or slot_range.dtype == torch.int64, "slot_range must be int64")
    return call


def _blocks(count: int, block_t: int, size: int, *tensors: Tensor) -> dict[str, int]:
    """Tokens and heads of the rows of a product beside lists of ``size``: where tokens are few, more heads."""
    block_t, rows = min(block_t, triton.next_power_of_2(max(1, count))), ROWS[bits(*tensors)]
    rows = rows if size <= BESIDE[0] else min(rows, BESIDE[1])
    return {"BLOCK_T": block_t, "BLOCK_H": max(1, rows // block_t)}


def _many(call: Call, sources: tuple, query: Tensor, keys: Tensor, k: int, scale: float) -> Tensor:
    """The best k ranks ``[B, F * T, k]`` by way of a workspace, for k beyond LARGEST."""
    (T, H, K), N, count = query.shape[-3:], keys.shape[-2], call.F * query.shape[-3]
    best = torch.full((call.B, count, k), -(2**63), dtype=torch.int64, device=call.device)
    p, wide = plan("indexer_ranks", K, query, keys), summed(K, query, keys)
    step_n = min(N, max(4 * k, 8192))
    step_t = max(1, WORKSPACE // max(1, call.B * step_n))
    for t in range(0, count, step_t):
        some_t = min(step_t, count - t)
        blocks = _blocks(some_t, p.config.block_t, 0, query, keys)
        for n in range(0, N, step_n):
            some_n = min(step_n, N - n)
            tiles = triton.cdiv(some_t, blocks["BLOCK_T"]) * triton.cdiv(some_n, p.config.block_n)
            found = call.scratch(call.B, some_t, some_n, dtype=torch.int64)
            launch(
                indexer_rank_kernel, call.B * tiles, *sources, found, count, N, H, K, call.batches[1],
                T if call.F > 1 else None, t, some_t, n, some_n, scale, plan=p, **blocks,
                BLOCK_N=p.config.block_n, BLOCK_K=wide.block, K_STEPS=wide.several, PRECISION=precision(query),
            )  # fmt: skip
            found = torch.cat([best[:, t : t + some_t], found], -1)
            best[:, t : t + some_t] = torch.topk(found, k, -1).values
    return best


@operator
def indexer_search(
    query: Tensor, head_weights: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, k: int,
    scale: float,
):  # fmt: skip
    """scores ``[..., T, k]`` in the dtype of query, indices ``[..., T, k]``."""
    call = _call("indexer_search", query, head_weights, keys, slot_mask, slot_range)
    call.require(k >= 1, "k must be at least 1")
    (T, H, K), N, count = query.shape[-3:], keys.shape[-2], call.F * query.shape[-3]
    scores, score_view = call.token_result(T, k, dtype=query.dtype)
    indices, index_view = call.token_result(T, k, dtype=torch.int64)
    heads = call.token_view(query if K == 1 or query.stride(-1) == 1 else query.contiguous(), 2)
    sources = (heads, *heads.stride()[:5]), call.rows(head_weights), call.slots(keys)
    sources = *sources, call.slot_numbers(slot_mask), call.rows(slot_range)
    if k > LARGEST[bits(query, keys)]:
        score, index = scored_tensor(_many(call, sources, query, keys, k, scale))
        index_view.copy_(index.view(index_view.shape))
        score_view.copy_(score.view(score_view.shape))
        return call.store(scores, score_view), call.store(indices, index_view)
    size = max(16, triton.next_power_of_2(k))
    p, wide, inner = plan("indexer_search", K, query, keys), summed(K, query, keys), T if call.F > 1 else None
    if size > SHORT_LIST:
        wide = narrowed(wide, NARROW // 2)  # heads take registers, too
    blocks, block_n = _blocks(count, p.config.block_t, size, query, keys), max(p.config.block_n, size)
    programs = call.B * triton.cdiv(count, blocks["BLOCK_T"])
    parts, span = p.cut(programs, N, block_n, sums=False)
    lists = call.scratch(parts, call.B, count, size, dtype=torch.int64)
    launch(
        indexer_search_kernel, programs * parts, *sources, lists, count, N, H, K, call.batches[1], inner, parts, span,
        scale, plan=p, LIST=size, **blocks, BLOCK_N=block_n, BLOCK_K=wide.block, K_STEPS=wide.several,
        PRECISION=precision(query),
    )  # fmt: skip
    merge_parts(call, query, lists, k, score_view, index_view)
    return call.store(scores, score_view), call.store(indices, index_view)


@operator
def indexer_search_backward(
    query: Tensor, head_weights: Tensor, keys: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None,
    indices: Tensor, d_scores: Tensor | None, k: int, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, head_weights, keys and a float mask."""
    T = query.shape[-3]
    more = [("indices", indices, (T, k)), ("d_scores", d_scores, (T, k))]
    call = _call("indexer_search_backward", query, head_weights, keys, slot_mask, slot_range, *more)
    call.require(len(wants) == 4, "wants must have 4 entries")
    call.require(d_scores is not None, "d_scores must be given")
    return gradients(call, query, head_weights, keys, slot_mask, indices, d_scores, scale, wants)


def examples(x: Inputs) -> Iterator[Example]:
    def best(T: int, k: int, ranges: Tensor | None = None, **which) -> Example:
        mask = x(2, x.slots, dtype=torch.float32)
        arguments = (x(2, T, 32, x.width), x(2, T, 32), x(2, x.slots, x.width), mask, ranges, k, SCALE)
        return Example(
            indexer_search, arguments, variant=f"k = {k}" + (", ranges" if ranges is not None else ""), **which
        )

    yield best(x.tokens, 32, main=True)
    yield best(x.tokens, 32, x.integers(2, x.tokens, 2, below=x.slots))
    yield best(FEW, 8)
    yield best(x.tokens, LARGEST[32], heavy=True)
    yield best(x.tokens, LARGEST[16], heavy=True)
    yield best(x.tokens, 1024)
    yield best(FEW, 1000)
