"""selected_read on a GPU: a softmax read over the slots that each token names.

    s[t, j] = scale <q_t, k_{i_j}> + mask_{i_j},     i_j = indices[t, j],     p = softmax_j(s)
    r_t = sum_j p[t, j] v_{i_j},     lse_t = log sum_j exp(s[t, j])

A program keeps a few tokens and goes through the slots that they name in blocks: it gathers the rows of keys,
multiplies them with the query, and gathers the rows of values, with a running maximum, sum and accumulator. Bound by
the bandwidth of the gather: every named row is read once. Where few tokens would leave SMs idle, the named slots are
split, and merge_reads joins the parts in their order. Scores wait in the memory of the weights, which a last kernel
makes of them with the lse. Values wider than one block go to further programs, which compute the scores again.

Backward: ds = p (dp - sum_j p dp + dlse) with dp[t, j] = <dr_t, v_{i_j}> + d_weights[t, j], then the gradients of a
search that chose these slots; one sort serves keys, values and mask. A slot that the mask empties counts as not named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import COMPRESSED, FEW, SCALE, Example, Inputs, operator
from .launch import launch, plan, width
from .layout import Call, Gradient
from .merge_reads import merge_parts
from .segments import Segments, gathered_dots
from .softmax_read import finish_read
from .sparse_read import check_indices
from .tiles import batch, decoded, open_slots, scores, softmax_weights, tile, tokens, weigh
from .topk_read import kept_and_gradients, score_gradient
from .topk_search import choice_gradients


@triton.jit
def named_slots(indices, mask, b, B1, t, inner, inside, j, N):
    """The slots that tokens ``t`` name at places ``j``, 0 where none is addressable; which are, and what the mask adds
    to their scores: [tokens, places]."""
    slot = tl.load(tokens(indices, b, B1, t, inner)[:, None] + j[None, :], mask=inside, other=-1)
    ok, bias = open_slots(mask, b, B1, tl.where(slot < 0, N, slot), N)
    return tl.where(ok, slot, 0), ok, bias


class Cut(NamedTuple):
    """Of the loop over named slots: their count k, the count and the length of parts, and the steps between those of
    results."""

    k: int
    parts: int
    span: int
    read_part: int
    lse_part: int


@triton.jit
def selected_read_kernel(
    q, keys, values, indices, mask, k_scale, v_scale, read, lse, rest, kept, sizes, cut, scale,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of tokens, one block of value columns, the named slots ``part * span ..``. kept: takes the scores."""
    T, N, K, V, B1, inner = sizes
    k, parts, span, read_part, lse_part = cut
    pid = tl.program_id(0)
    blocks = tl.cdiv(T, BLOCK_T)
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    pid = pid // tl.cdiv(V, BLOCK_V)
    part = pid % parts
    b = pid // parts
    t_ok = t < T
    kept_rows = tokens(kept, b, B1, t, inner)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for j0 in range(part * span, tl.minimum(k, (part + 1) * span), BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        inside = t_ok[:, None] & (j < k)[None, :]
        slot, ok, bias = named_slots(indices, mask, b, B1, t, inner, inside, j, N)
        dot = gathered_dots(q, keys, k_scale, b, B1, t, inner, t_ok, slot, ok, K, BLOCK_K, K_STEPS)
        s = tl.where(ok, scores(dot, scale, bias), float("-inf"))
        if column == 0:
            tl.store(kept_rows[:, None] + j[None, :], s, mask=inside)
        p, shrink, m, total = weigh(s, m, total)
        if v_scale is not None:
            p *= tl.load(batch(v_scale, b, B1) + slot * v_scale[3], mask=ok, other=0.0)
        rows = tl.reshape(batch(values, b, B1) + slot * values[3], [BLOCK_T * BLOCK_J])
        picked = decoded(tile(rows, tl.reshape(ok, [BLOCK_T * BLOCK_J]), V, column, BLOCK_V), tl.float32)
        picked = tl.reshape(picked, [BLOCK_T, BLOCK_J, BLOCK_V])
        acc = acc * shrink[:, None] + tl.sum(picked * p[:, :, None], 1)
    read_rows = tokens(read, b, B1, t, inner) + part.to(tl.int64) * read_part
    lse_rows = tokens(lse, b, B1, t, inner) + part.to(tl.int64) * lse_part
    rest_rows = tokens(rest, b, B1, t, inner) + part.to(tl.int64) * lse_part
    finish_read(read_rows, lse_rows, rest_rows, t_ok, V, column, m, total, acc, BLOCK_V)


@triton.jit
def selected_weights_kernel(kept, lse, rest, T, k, B1, inner, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr):
    """Scores become weights, where they are."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_J)
    j = (pid % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    pid = pid // blocks
    t = (pid % tl.cdiv(T, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // tl.cdiv(T, BLOCK_T)
    t_ok = t < T
    own_lse = tl.load(tokens(lse, b, B1, t, inner), mask=t_ok, other=0.0)
    own_rest = tl.load(tokens(rest, b, B1, t, inner), mask=t_ok, other=0.0)
    places = tokens(kept, b, B1, t, inner)[:, None] + j[None, :]
    inside = t_ok[:, None] & (j < k)[None, :]
    s = tl.load(places, mask=inside, other=float("-inf"))
    w = softmax_weights(s, own_lse[:, None], own_rest[:, None])
    tl.store(places, tl.where(s == float("-inf"), 0.0, w), mask=inside)


@triton.jit
def addressable_kernel(
    indices, mask, out, T, N, k, B1, inner, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """indices, with -1 where the mask leaves the slot empty."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_J)
    j = (pid % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    pid = pid // blocks
    t = (pid % tl.cdiv(T, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // tl.cdiv(T, BLOCK_T)
    inside = (t < T)[:, None] & (j < k)[None, :]
    slot, ok, _ = named_slots(indices, mask, b, B1, t, inner, inside, j, N)
    tl.store(tokens(out, b, B1, t, inner)[:, None] + j[None, :], tl.where(ok, slot, -1), mask=inside)


def _call(
    op: str, query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, *more: tuple,
    key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Call:  # fmt: skip
    (T, K), (N, V), k = query.shape[-2:], values.shape[-2:], indices.shape[-1]
    memory = [("keys", keys, (N, K)), ("values", values, (N, V)), ("slot_mask", slot_mask, (N,))]
    memory += [("key_scale", key_scale, (N,)), ("value_scale", value_scale, (N,))]
    call = Call(op, [("query", query, (T, K)), ("indices", indices, (T, k)), *more], memory)
    call.floats(query)
    call.compressed("keys", keys, key_scale)
    call.compressed("values", values, value_scale)
    call.mask(slot_mask)
    check_indices(call, indices, N)
    return call


@operator
def selected_read(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, scale: float
):  # fmt: skip
    """read ``[..., T, V]``, weights ``[..., T, k]`` and lse ``[..., T]`` in float32."""
    call = _call("selected_read", query, keys, values, indices, slot_mask)
    return _read(call, query, keys, values, indices, slot_mask, scale)


@operator
def selected_read_compressed(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, key_scale: Tensor | None,
    value_scale: Tensor | None, scale: float,
):  # fmt: skip
    """The same over slots of which keys, values or both have 8 bits and a scale."""
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    call = _call("selected_read_compressed", query, keys, values, indices, slot_mask, **scales)
    return _read(call, query, keys, values, indices, slot_mask, scale, **scales)


def _read(
    call: Call, query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, scale: float,
    key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, K), (N, V), k, count = query.shape[-2:], values.shape[-2:], indices.shape[-1], call.F * query.shape[-2]
    read, read_view = call.token_result(T, V, dtype=query.dtype)
    weights, kept = call.token_result(T, k, dtype=torch.float32)
    lse, lse_view = call.token_result(T, dtype=torch.float32)
    p = plan("selected_read", max(K, V), query, keys, values)
    wide_k, wide_v, c = width(K, query, keys, values), width(V, query, keys, values), p.config
    block_j = min(c.block_n, triton.next_power_of_2(max(k, 1)))
    programs = call.B * triton.cdiv(count, c.block_t) * max(1, wide_v.steps)
    parts, span = p.cut(programs, k, block_j)
    reads = read_view.unsqueeze(0) if parts == 1 else call.scratch(parts, *read_view.shape)
    lses = lse_view.unsqueeze(0) if parts == 1 else call.scratch(parts, *lse_view.shape)
    rest = call.scratch(*lse_view.shape)
    rests = rest.unsqueeze(0) if parts == 1 else call.scratch(parts, *lse_view.shape)
    kept_rows, inner = (kept, *kept.stride()[:4]), T if call.F > 1 else None
    launch(
        selected_read_kernel, programs * parts, call.rows(query), call.slots(keys), call.slots(values),
        call.rows(indices), *map(call.slot_numbers, (slot_mask, key_scale, value_scale)),
        (reads, *reads.stride()[1:5]), (lses, *lses.stride()[1:]), (rests, *rests.stride()[1:]), kept_rows,
        call.sizes(T, N, K, V), Cut(k, parts, span, reads.stride(0), lses.stride(0)), scale,
        plan=p, BLOCK_T=c.block_t, BLOCK_J=block_j, BLOCK_K=wide_k.block, K_STEPS=wide_k.steps, BLOCK_V=wide_v.block,
    )  # fmt: skip
    if parts > 1:
        merge_parts(call, reads, lses, rests, read_view, lse_view, rest, T, V)
    p = plan("selected_weights", 64, query)
    launch(
        selected_weights_kernel, _tiles(call, p, T, k), kept_rows, (lse_view, *lse_view.stride()),
        (rest, *rest.stride()), count, k, call.batches[1], inner, plan=p, BLOCK_T=p.config.block_t,
        BLOCK_J=p.config.block_n,
    )  # fmt: skip
    return call.store(read, read_view), call.store(weights, kept), call.store(lse, lse_view)


def _tiles(call: Call, p, T: int, k: int) -> int:
    """Programs of a kernel on blocks of tokens and named slots."""
    return call.B * triton.cdiv(call.F * T, p.config.block_t) * triton.cdiv(k, p.config.block_n)


def _addressable(call: Call, query: Tensor, indices: Tensor, slot_mask: Tensor | None, N: int) -> Tensor:
    """``indices``, with -1 where the mask leaves the slot empty."""
    if slot_mask is None:
        return indices
    (T, k), count = indices.shape[-2:], call.F * indices.shape[-2]
    out, view = call.token_result(T, k, dtype=torch.int64)
    p = plan("selected_weights", 64, query)
    launch(
        addressable_kernel, _tiles(call, p, T, k), call.rows(indices), call.slot_numbers(slot_mask),
        (view, *view.stride()[:4]), count, N, k, call.batches[1], T if call.F > 1 else None,
        plan=p, BLOCK_T=p.config.block_t, BLOCK_J=p.config.block_n,
    )  # fmt: skip
    return call.store(out, view)


@operator
def selected_read_backward(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, weights: Tensor,
    d_read: Tensor | None, d_weights: Tensor | None, d_lse: Tensor | None, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query, keys, values and a float mask."""
    more = kept_and_gradients(query, values, indices, weights, d_read, d_weights, d_lse)[1:]  # indices are arguments
    call = _call("selected_read_backward", query, keys, values, indices, slot_mask, *more)
    call.require(len(wants) == 4, "wants must have 4 entries")
    gradients = weights, d_read, d_weights, d_lse
    return _gradients(call, query, keys, values, indices, slot_mask, *gradients, scale, wants)


@operator
def selected_read_compressed_backward(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None, key_scale: Tensor | None,
    value_scale: Tensor | None, weights: Tensor, d_read: Tensor | None, d_weights: Tensor | None,
    d_lse: Tensor | None, scale: float, wants: list[bool],
):  # fmt: skip
    """Gradients of query and a float mask."""
    more = kept_and_gradients(query, values, indices, weights, d_read, d_weights, d_lse)[1:]  # indices are arguments
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    call = _call("selected_read_compressed_backward", query, keys, values, indices, slot_mask, *more, **scales)
    call.require(len(wants) == 2, "wants must have 2 entries")
    gradients, wants = (weights, d_read, d_weights, d_lse), [wants[0], False, False, wants[1]]
    d = _gradients(call, query, keys, values, indices, slot_mask, *gradients, scale, wants, **scales)
    return d[0], d[3]


def _gradients(
    call: Call, query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, slot_mask: Tensor | None,
    weights: Tensor, d_read: Tensor | None, d_weights: Tensor | None, d_lse: Tensor | None, scale: float,
    wants: list[bool], key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    N, V = values.shape[-2:]
    indices = _addressable(call, query, indices, slot_mask, N)
    p, ds = score_gradient(call, values, value_scale, indices, weights, d_read, d_weights, d_lse)
    d_values = Gradient(call, values, wants[2], "memory", N, V)
    segments = Segments(call, indices, N) if any(wants[1:]) else None
    if d_values.wanted and d_read is not None:
        segments.sum(d_values, p, d_read, 1.0)
    else:
        d_values.fill(0.0)
    some = [wants[0], wants[1], wants[3]]
    choice = choice_gradients(call, query, keys, slot_mask, indices, ds, scale, some, segments, key_scale)
    return choice[0], choice[1], d_values.result(), choice[2]


def examples(x: Inputs) -> Iterator[Example]:
    mask = x(2, x.slots, dtype=torch.float32)

    def read(T: int, mask: Tensor | None = None, **which) -> Example:
        k, v = (x(2, x.slots, x.width) for _ in range(2))
        arguments = (x(2, T, x.width), k, v, x.integers(2, T, 256, below=x.slots), mask, SCALE)
        return Example(selected_read, arguments, **which)

    yield read(x.tokens, main=True)
    yield read(x.tokens, mask, variant="mask")
    yield read(FEW, variant="few tokens")
    scales = x(2, x.slots, dtype=torch.float32)
    for kind, dtype in COMPRESSED.items():
        k, v = (x.compressed(2, x.slots, x.width, dtype=dtype) for _ in range(2))
        arguments = (x(2, x.tokens, x.width), k, v, x.integers(2, x.tokens, 32, below=x.slots), mask, scales, scales)
        yield Example(selected_read_compressed, (*arguments, SCALE), variant=kind)
