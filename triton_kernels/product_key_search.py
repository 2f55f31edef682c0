"""product_key_search on a GPU: the k best of n * n slots whose keys are pairs of two lists, exactly.

    s[t, i n + j] = a[t, i] + b[t, j],     a[t, i] = scale <q_t[:h], c_i>,     b[t, j] = scale <q_t[h:], d_j>

Both halves go through the kernels of topk_search, as two memories of one search: 2 n dot products in place of n^2. Of
the sorted halves, x and y counted from 0, a pair has at least (x + 1)(y + 1) - 1 pairs before it, so only those with
(x + 1)(y + 1) <= k can be chosen. They lie in rectangles of LIST pairs: 2^e rows from row 2^e - 1 on, none of which has
more than LIST / 2^e candidates. A program takes a block of tokens through all log2(LIST) + 1 of them, each sorted and
merged into the list of the best as in topk_search. Pairs rank by the rounded sum, then by slot number; a pair that is
left out for k others before it has a sum no larger than theirs.

Beyond LARGEST neighbours the ranks of all rectangles go to a workspace, some tokens at a time, and torch.topk selects.
Backward: the gradient of a score goes to one row of each half, so that of topk_search serves both halves at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import SCALE, Example, Inputs, operator
from .launch import launch, plan
from .layout import INDEX_LIMIT, Call
from .sparse_read import check_indices
from .topk_search import LARGEST, WORKSPACE, choice_gradients, search
from .topk_tiles import LOWEST, best_of, ranks, scored, scored_tensor, shares, shares_tensor

KEPT = LARGEST[16]  # neighbours that a list on the chip holds: sums of two numbers need no operands beside it


@triton.jit
def pair_ranks(scores, indices, row, row_ok, T, n, k, found, first, columns, at):
    """Ranks of the pairs ``at`` of the rectangle of ``columns`` columns from row ``first`` on: [tokens, pairs].

    scores, indices: the halves' lists [tokens' streams, 2, T, found]; row: stream T + token.
    """
    x, y = first + at // columns, at % columns
    half = (row // T * 2 * T + row % T) * found
    live = row_ok[:, None] & ((x + 1) * (y + 1) <= k)[None, :] & (x < found)[None, :] & (y < found)[None, :]
    left, right = half[:, None] + x[None, :], (half + T * found)[:, None] + y[None, :]
    i, j = tl.load(indices + left, mask=live, other=-1), tl.load(indices + right, mask=live, other=-1)
    s = tl.load(scores + left, mask=live, other=0.0) + tl.load(scores + right, mask=live, other=0.0)
    return ranks(s, (i * n + j).to(tl.int32), live & (i >= 0) & (j >= 0))


@triton.jit
def pair_kernel(
    half_scores, half_indices, scores, indices, weights, lse, rows, T, n, k, found,
    LIST: tl.constexpr, LEVELS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The k best pairs of a block of tokens: their scores, or weights and lse, and their slots."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = row < rows
    c = tl.arange(0, LIST)
    best = tl.full([BLOCK_T, LIST], LOWEST, tl.int64)
    for level in range(LEVELS):
        rank = pair_ranks(
            half_scores, half_indices, row, row_ok, T, n, k, found, (1 << level) - 1, LIST >> level, c
        )  # fmt: skip
        best = best_of(best, tl.sort(rank, 1, descending=True))
    score, index = scored(best)
    at = (row * k)[:, None] + c[None, :]
    inside = row_ok[:, None] & (c < k)[None, :]
    tl.store(indices + at, index, mask=inside)
    if scores is not None:
        tl.store(scores + at, score.to(scores.dtype.element_ty), mask=inside)
    if weights is not None:
        p, whole = shares(score, (c < k)[None, :])
        tl.store(weights + at, p, mask=inside)
        tl.store(lse + row, whole, mask=row_ok)


@triton.jit
def pair_rank_kernel(
    half_scores, half_indices, out, rows, T, n, k, found, first_row, size, LIST: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Ranks of the pairs of one level, LIST at a time, for the rows from ``first_row`` on: out [rows, levels, size]."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, LIST)
    at = (pid % blocks) * LIST + tl.arange(0, LIST)
    pid = pid // blocks
    levels = tl.num_programs(0) // (blocks * tl.cdiv(rows, BLOCK_T))
    level = pid % levels
    own = (pid // levels).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = pair_ranks(
        half_scores, half_indices, first_row + own, own < rows, T, n, k, found, (1 << level) - 1, size >> level, at
    )
    tl.store(out + ((own * levels + level) * size)[:, None] + at[None, :], rank, mask=(own < rows)[:, None])


def halves(query: Tensor, subkeys: Tensor) -> Tensor:
    """The query ``[..., T, 2 h]`` as a query per half: ``[..., 2, T, h]``."""
    return query.unflatten(-1, (2, subkeys.shape[-1])).movedim(-2, -3)


def calls(
    op: str, query: Tensor, subkeys: Tensor, *more: tuple, values: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Call, Call]:  # fmt: skip
    """The call, and the search of both halves: a leading dimension more, the last, which query and subkeys have."""
    (n, h), T = subkeys.shape[-2:], query.shape[-2]
    table = [] if values is None else [("values", values, (n * n, None))]
    table += [] if value_scale is None else [("value_scale", value_scale, (n * n,))]
    call = Call(op, [("query", query, (T, 2 * h)), *more], [("subkeys", subkeys, (2, n, h)), *table])
    call.floats(query, subkeys)
    call.require(n * n <= INDEX_LIMIT, f"n * n slots must be counted in 31 bits, got n = {n}")
    table = [(name, x.unsqueeze(-1 - len(tail)), tail) for name, x, tail in table]
    return call, Call(op, [("query", halves(query, subkeys), (T, h))], [("subkeys", subkeys, (n, h)), *table])


def search_pairs(
    call: Call, query: Tensor, subkeys: Tensor, k: int, scale: float, scores: Tensor | None, indices: Tensor,
    weights: Tensor | None, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill scores or weights, and indices, each contiguous ``[..., T, k]``; and beside weights ``lse``, contiguous
    ``[..., T]``. call: of the halves."""
    T, n = query.shape[-2], subkeys.shape[-2]
    call.require(k >= 1, "k must be at least 1")
    found = min(k, max(n, 1))
    half_scores, score_view = call.token_result(T, found, dtype=torch.float32)
    half_indices, index_view = call.token_result(T, found, dtype=torch.int64)
    search(call, halves(query, subkeys), subkeys, None, found, scale, score_view, index_view, None)
    lists = call.store(half_scores, score_view), call.store(half_indices, index_view)
    rows = indices.numel() // k
    p = plan("product_pairs", 64, query)
    if k > KEPT:
        score, index = scored_tensor(_many(call, lists, rows, T, n, k, found))
        indices.copy_(index.view(indices.shape))
        if scores is not None:
            scores.copy_(score.view(indices.shape))
        if weights is not None:
            p, whole = shares_tensor(score)
            weights.copy_(p.view(weights.shape))
            lse.copy_(whole.view(lse.shape))
        return
    size = max(16, triton.next_power_of_2(k))
    launch(
        pair_kernel, triton.cdiv(rows, p.config.block_t), *lists, scores, indices, weights, lse, rows, T, n, k, found,
        plan=p, LIST=size, LEVELS=size.bit_length(), BLOCK_T=p.config.block_t,
    )  # fmt: skip


@operator
def product_key_search(query: Tensor, subkeys: Tensor, k: int, scale: float):
    """scores ``[..., T, k]`` in the dtype of query, indices ``[..., T, k]``."""
    call, inner = calls("product_key_search", query, subkeys)
    call.require(k >= 1, "k must be at least 1")
    shape = (*call.whole, query.shape[-2], k)
    scores = torch.empty(shape, dtype=query.dtype, device=call.device)
    indices = torch.empty(shape, dtype=torch.int64, device=call.device)
    search_pairs(inner, query, subkeys, k, scale, scores, indices, None)
    return scores, indices


def _many(call: Call, lists: tuple[Tensor, Tensor], rows: int, T: int, n: int, k: int, found: int) -> Tensor:
    """The best k ranks ``[rows, k]`` by way of a workspace, for k beyond KEPT."""
    best = torch.empty((rows, k), dtype=torch.int64, device=call.device)
    size = triton.next_power_of_2(k)
    levels, p = size.bit_length(), plan("product_pairs", 64, lists[0])
    step = max(1, WORKSPACE // (levels * size))
    for first in range(0, rows, step):
        some = min(step, rows - first)
        found_ranks = call.scratch(some, levels * size, dtype=torch.int64)
        programs = triton.cdiv(some, p.config.block_t) * levels * (size // KEPT)
        launch(
            pair_rank_kernel, programs, *lists, found_ranks, some, T, n, k, found, first, size,
            plan=p, LIST=KEPT, BLOCK_T=p.config.block_t,
        )  # fmt: skip
        best[first : first + some] = torch.topk(found_ranks, k, -1).values
    return best


def pair_gradients(
    call: Call, query: Tensor, subkeys: Tensor, indices: Tensor, ds: Tensor, scale: float, wants: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of query and subkeys from ``ds [B, F * T, k]``, float32, of the chosen pairs. call: of the halves."""
    some = max(subkeys.shape[-2], 1)  # no subkeys: every index is -1
    none = indices < 0
    pairs = torch.stack([indices // some, indices % some], -3).masked_fill(none.unsqueeze(-3), -1)
    ds = ds.unsqueeze(1).expand(-1, 2, -1, -1).reshape(call.B, *ds.shape[1:]).contiguous()
    parts = halves(query, subkeys)
    d_parts, d_subkeys, _ = choice_gradients(call, parts, subkeys, None, pairs, ds, scale, [*wants, False])
    return d_parts.movedim(-3, -2).flatten(-2) if wants[0] else d_parts, d_subkeys


@operator
def product_key_search_backward(
    query: Tensor, subkeys: Tensor, indices: Tensor, d_scores: Tensor | None, k: int, scale: float, wants: list[bool]
):  # fmt: skip
    """Gradients of query and subkeys."""
    T, n = query.shape[-2], subkeys.shape[-2]
    more = [("indices", indices, (T, k)), ("d_scores", d_scores, (T, k))]
    call, inner = calls("product_key_search_backward", query, subkeys, *more)
    call.require(len(wants) == 2, "wants must have 2 entries")
    call.require(d_scores is not None, "d_scores must be given")
    call.floats(d_scores)
    check_indices(call, indices, n * n)
    ds = call.token_view(d_scores, 1).reshape(call.B, call.F * T, k).float()
    return pair_gradients(inner, query, subkeys, indices, ds, scale, wants)


def examples(x: Inputs) -> Iterator[Example]:
    q, subkeys = x(2, x.tokens, 2 * x.width), x(2, 512, x.width)
    yield Example(product_key_search, (q, subkeys, 32, SCALE), variant="k = 32", main=True)
    for k in (KEPT, 300):  # the most that a list on the chip holds, and more
        yield Example(product_key_search, (q, subkeys, k, SCALE), variant=f"k = {k}")
