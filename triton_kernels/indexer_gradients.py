"""The gradients of indexer_search, from those of the chosen scores, ds[t, j].

    z[t, h, j] = scale <q_th, k_{i_j}>,        dz[t, h, j] = ds[t, j] w[t, h]   where z > 0, else 0
    dw[t, h]   = sum_j ds[t, j] relu(z[t, h, j])
    dq_th      = scale sum_j dz[t, h, j] k_{i_j}
    dk_i       = scale sum over (t, j) with i_j = i, and h, of dz[t, h, j] q_th

Nothing but scores was kept, so products are made again. For the query a program takes some heads of one token and its
chosen slots in blocks, whose keys all heads share: two matrix products. For the keys entries are sorted by slot
(segments.py); the row of an entry is a sum over heads, which stays on the chip.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, narrowed, plan, width
from .layout import Call, Gradient, precision
from .segments import COLUMNS, Segments, chunk_entries, store_stretches
from .sparse_read import check_indices
from .tiles import batch, columns, dots, product, put, tile, tokens


@triton.jit
def indexer_query_kernel(
    q, w, keys, indices, ds, d_query, d_weights, T, N, H, K, k, B1, inner, scale,
    BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One token, a block of heads and one of columns: the gradients of its query, and of its head weights."""
    pid = tl.program_id(0)
    t = pid % T
    pid = pid // T
    h = (pid % tl.cdiv(H, BLOCK_H)) * BLOCK_H + tl.arange(0, BLOCK_H)
    pid = pid // tl.cdiv(H, BLOCK_H)
    column = (pid % tl.cdiv(K, BLOCK_K)) * BLOCK_K
    b = pid // tl.cdiv(K, BLOCK_K)
    h_ok = h < H
    q_rows = tokens(q, b, B1, t, inner) + h * q[5]
    q0 = tile(q_rows, h_ok, K, 0, BLOCK_K)
    weight = tl.load(tokens(w, b, B1, t, inner) + h, mask=h_ok, other=0.0).to(tl.float32)
    index_row, number_row = tokens(indices, b, B1, t, inner), ds + (b.to(tl.int64) * T + t) * k
    acc = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for j0 in range(0, k, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        slot = tl.load(index_row + j, mask=j < k, other=-1)
        ok = (slot >= 0) & (slot < N)
        g = tl.load(number_row + j, mask=ok, other=0.0)
        k_rows = batch(keys, b, B1) + tl.where(ok, slot, 0) * keys[3]
        k0 = tile(k_rows, ok, K, 0, BLOCK_K)
        z = dots(q0, q_rows, h_ok, k0, k_rows, ok, K, BLOCK_K, K_STEPS, PRECISION) * scale
        total += tl.sum(tl.where(z <= 0, 0.0, z * g[None, :]), 1)
        dz = tl.where(z <= 0, 0.0, g[None, :] * weight[:, None])
        k_columns = columns(k0, k_rows, ok, K, column, BLOCK_K, K_STEPS)
        acc = product(dz.to(k_columns.dtype), k_columns, acc, PRECISION)
    if d_query is not None:
        put(tokens(d_query, b, B1, t, inner) + h * d_query[5], h_ok, K, column, acc * scale, BLOCK_K)
    if d_weights is not None:
        row = tokens(d_weights, b, B1, t, inner)
        tl.store(row + h, total.to(d_weights[0].dtype.element_ty), mask=h_ok & (column == 0))


@triton.jit
def indexer_key_kernel(
    order, sorted_slots, numbers, q, w, keys, out, border, T, N, k, D, B, B1, inner, entries, scale, H,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, D_STEPS: tl.constexpr,
):  # fmt: skip
    """One chunk of sorted entries and block of columns. numbers: ds, by entry."""
    pid = tl.program_id(0)
    chunk = (pid % tl.cdiv(entries, CHUNK)).to(tl.int64)
    column = (pid // tl.cdiv(entries, CHUNK)) * BLOCK_D
    d = column + tl.arange(0, BLOCK_D)
    e, slot, after, ahead, outside, live, entry, b = chunk_entries(order, sorted_slots, chunk, N, B, entries, CHUNK)
    g = tl.load(numbers + entry, mask=live, other=0.0)
    t = ((entry // k) % T).to(tl.int32)
    q_tokens, w_tokens = tokens(q, b, B1, t, inner), tokens(w, b, B1, t, inner)
    k_rows = batch(keys, b, B1) + tl.where(live, slot % N, 0) * keys[3]
    k0 = tile(k_rows, live, D, 0, BLOCK_D).to(tl.float32)
    terms = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    for h in range(H):
        q_rows = q_tokens + h * q[5]
        q0 = tile(q_rows, live, D, 0, BLOCK_D)
        z = tl.sum(q0.to(tl.float32) * k0, 1)
        for step in range(1, D_STEPS):
            more = tile(k_rows, live, D, step * BLOCK_D, BLOCK_D).to(tl.float32)
            z += tl.sum(tile(q_rows, live, D, step * BLOCK_D, BLOCK_D).to(tl.float32) * more, 1)
        weight = tl.load(w_tokens + h, mask=live, other=0.0).to(tl.float32)
        dz = tl.where(z * scale <= 0, 0.0, g * weight)
        terms += dz[:, None] * columns(q0, q_rows, live, D, column, BLOCK_D, D_STEPS).to(tl.float32)
    store_stretches(
        terms, out, border, chunk, e, slot, after, ahead, outside, live, b, d, N, D, B1, scale, CHUNK, BLOCK_D
    )  # fmt: skip


def gradients(
    call: Call, query: Tensor, head_weights: Tensor, keys: Tensor, slot_mask: Tensor | None, indices: Tensor,
    d_scores: Tensor, scale: float, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, head_weights, keys and mask."""
    (T, H, K), N, k = query.shape[-3:], keys.shape[-2], indices.shape[-1]
    call.floats(d_scores)
    check_indices(call, indices, N)
    d_query = Gradient(call, query, wants[0], "tokens", T, H, K)
    d_weights = Gradient(call, head_weights, wants[1], "tokens", T, H)
    d_keys = Gradient(call, keys, wants[2], "memory", N, K)
    d_mask = Gradient(call, slot_mask, wants[3], "memory", N)
    ds = call.token_view(d_scores, 1).reshape(call.B, call.F * T, k).float().contiguous()
    heads = call.token_view(query if K == 1 or query.stride(-1) == 1 else query.contiguous(), 2)
    rows, weights = (heads, *heads.stride()[:5]), call.rows(head_weights)
    if d_query.wanted or d_weights.wanted:
        p, wide = plan("indexer_query", K, query, keys), width(K, query, keys)
        block_h = min(p.config.block_t, max(16, triton.next_power_of_2(H)))
        programs = call.B * call.F * T * triton.cdiv(H, block_h) * (wide.steps if d_query.wanted else 1)
        launch(
            indexer_query_kernel, programs, rows, weights, call.slots(keys), call.rows(indices), ds,
            (d_query.view, *d_query.view.stride()[:5]) if d_query.wanted else None, d_weights.rows(),
            call.F * T, N, H, K, k, call.batches[1], T if call.F > 1 else None, scale, plan=p, BLOCK_H=block_h,
            BLOCK_J=p.config.block_n, BLOCK_K=wide.block, K_STEPS=wide.several, PRECISION=precision(query),
        )  # fmt: skip
    if d_keys.wanted or d_mask.wanted:
        segments = Segments(call, indices, N)
        p, wide = plan("indexer_keys", K, query, keys), narrowed(width(K, query, keys), COLUMNS)
        given = ds, rows, weights, call.slots(keys)
        segments.add(d_keys, indexer_key_kernel, p, K, wide.block, given, scale, H, D_STEPS=wide.steps)
        segments.sum(d_mask, ds, None, 1.0)
    return d_query.result(), d_weights.result(), d_keys.result(), d_mask.result()
