"""The backward kernel of memory_scan. With g_i = dv[t, i] from what comes behind, delta_t = <dr_t, r_t>, t = T .. 1:

    dp[t, i] = <dr_t, v[t, i]>,         g_i <- g_i + p[t, i] dr_t       (read first: after the next line, and of v[t-1])
    da[t, i] = <g_i, w_t - v[t-1, i]>,  dw_t = sum_i a[t, i] g_i,       g_i <- g_i (1 - a[t, i])
    ds_r = p (dp - delta),  ds_w = da a (1 - a)

The sums of the softmax are known, so slots do not depend on one another. v cannot be run back, as a gate of 1 forgets
it: the forward kernel, run again, stores it at the start of every chunk of tokens, and a chunk replays its tokens into
a workspace and walks back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .score_gradients import shifted_lse
from .tiles import dots, open_slots, put, scores, slot_block, slots, softmax_weights, tile, tokens
from .write_scan import at_token, token_row
from .write_tiles import gates, open_tokens


@triton.jit
def read_weights(
    k0, k_rows, ok, bias, q, lse, rest, b, t, t_ok, sizes, scale,
    BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p of a tile [slots, tokens]; 0 where nothing is read."""
    T, K, B1, inner = sizes.T, sizes.K, sizes.B1, sizes.inner
    q_rows = tokens(q, b, B1, t, inner)
    q0 = tile(q_rows, t_ok, K, 0, BLOCK_K)
    s = scores(dots(k0, k_rows, ok, q0, q_rows, t_ok, K, BLOCK_K, K_STEPS, PRECISION), scale, bias[:, None])
    rest_t = tl.load(tokens(rest, b, B1, t, inner), mask=t_ok, other=0.0)
    p = softmax_weights(s, shifted_lse(lse, b, B1, t, inner, T)[None, :], rest_t[None, :])
    return tl.where(ok[:, None] & t_ok[None, :], p, 0.0)


@triton.jit
def memory_scan_backward_kernel(
    source, lse, rest, delta, d_reads, d_new, states, replay, d_v, ds, dw, first, blocks, sizes, B, scale,
    READ_FIRST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens, last to first, of one block of columns and one of the ``blocks`` blocks of slots from ``first``.

    Of this group of slots: states [B, chunks, slots, V], ds [column blocks, B, 2, T, slots], read before write, and
    dw [blocks, B, T, V]: parts, to be added.
    """
    T, N, K, V, B1, inner = sizes
    pid = tl.program_id(0)
    own = replay + pid.to(tl.int64) * BLOCK_T * BLOCK_N * BLOCK_V
    block = pid % blocks
    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = first * BLOCK_N + place
    pid = pid // blocks
    step = pid % tl.cdiv(V, BLOCK_V)
    column = step * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    group = tl.minimum(N - first * BLOCK_N, blocks * BLOCK_N)
    exists = n < N
    d = column + tl.arange(0, BLOCK_V)
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    grad = tile(slots(d_new, b, B1, n), ok, V, column, BLOCK_V).to(tl.float32)
    chunks = tl.cdiv(T, BLOCK_T)
    cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    for c in range(chunks):
        t0 = (chunks - 1 - c) * BLOCK_T
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
        a, keep, _ = gates(
            k0, k_rows, ok, bias, source.q_write, None, b, n, t, t_ok, sizes, scale, 1.0,
            "sigmoid", "full", BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        p = read_weights(
            k0, k_rows, ok, bias, source.q_read, lse, rest, b, t, t_ok, sizes, scale, BLOCK_K, K_STEPS, PRECISION
        )
        x = tile(states + ((b.to(tl.int64) * chunks + chunks - 1 - c) * group + place) * V, ok, V, column, BLOCK_V)
        count = tl.minimum(BLOCK_T, T - t0)
        for i in range(count):
            tl.store(own + i * BLOCK_N * BLOCK_V + cell, x)
            w_i = token_row(source.w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            x = x * at_token(keep, i, BLOCK_T)[:, None] + at_token(a, i, BLOCK_T)[:, None] * w_i
        tl.debug_barrier()  # what one thread stored, another may read
        da = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        dp = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for back in range(count):
            i = count - 1 - back
            here = (tl.arange(0, BLOCK_T) == i)[None, :]
            x = tl.load(own + i * BLOCK_N * BLOCK_V + cell)
            a_i = at_token(a, i, BLOCK_T)[:, None]
            keep_i = at_token(keep, i, BLOCK_T)[:, None]
            p_i = at_token(p, i, BLOCK_T)[:, None]
            w_i = token_row(source.w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            dr_i = token_row(d_reads, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            if READ_FIRST:
                dp_i = tl.sum(dr_i * x, 1)
            else:
                dp_i = tl.sum(dr_i * (x * keep_i + a_i * w_i), 1)
                grad += p_i * dr_i
            dp = tl.where(here, dp_i[:, None], dp)
            da = tl.where(here, tl.sum(grad * (w_i - x), 1)[:, None], da)
            if dw is not None:
                row = ((block.to(tl.int64) * B + b) * T + t0 + i) * V + d
                tl.store(dw + row, tl.sum(a_i * grad, 0), mask=d < V)
            grad = grad * keep_i
            if READ_FIRST:
                grad += p_i * dr_i
        tl.debug_barrier()
        if ds is not None:
            live = ok[:, None] & t_ok[None, :]
            inside = exists[:, None] & (t < T)[None, :]
            delta_t = tl.load(tokens(delta, b, B1, t, inner), mask=t_ok & (column == 0), other=0.0)
            to = ds + (((step.to(tl.int64) * B + b) * 2 * T + t) * group)[None, :] + place[:, None]
            tl.store(to, tl.where(live, p * (dp - delta_t[None, :]), 0.0), mask=inside)
            to += (tl.full([], 0, tl.int64) + T) * group
            tl.store(to, tl.where(live, da * a * keep, 0.0), mask=inside)
    if d_v is not None:  # an empty slot kept its content
        passed = tile(slots(d_new, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
        put(slots(d_v, b, B1, n), exists, V, column, tl.where(ok[:, None], grad, passed), BLOCK_V)
