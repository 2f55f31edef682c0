"""memory_scan on a GPU: token after token, v_i <- v_i (1 - a[t, i]) + a[t, i] w_t and r_t = sum_i p[t, i] v_i, with
a = sigmoid(s_w) and p = softmax_i(s_r).

Keys do not change: the scores of a chunk of tokens are two matrix products, and the sums of the softmax come from a
first pass. Only v is a recurrence, in which neither slots nor columns depend on one another: a program keeps a block of
them in registers and goes through the tokens, as write_scan.py does, and writes its share of each read. The shares of
blocks of slots are added in their order. Bound by latency along T, and by arithmetic in registers, 4 T N V.

Backward, see memory_scan_backward.py: it gives ds of both scores, from which score_gradients.py makes the gradients of
queries, keys and mask, both at once. Slots go in groups that bound the memory of all this, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import SCALE, Example, Inputs, operator
from .launch import bits, launch, narrowed, plan, summed, width
from .layout import Call, Gradient, precision
from .memory_scan_backward import memory_scan_backward_kernel, read_weights
from .score_gradients import row_dots, score_gradients
from .softmax_read import softmax_lse
from .tiles import open_slots, put, slot_block, slots, tile
from .write_scan import WORKSPACE, at_token, token_row
from .write_tiles import gates, open_tokens

# The widest block of columns, by bits of an element: a tile of v lies in registers beside the operands of two products,
# and in TF32 those of more columns do not fit.
BLOCKS = {16: 256, 32: 64}


class Source(NamedTuple):
    """What both kernels take of the arguments."""

    k: tuple
    q_read: tuple
    q_write: tuple
    w: tuple
    mask: tuple | None
    token_mask: tuple | None


@triton.jit
def memory_scan_kernel(
    v, source, lse, rest, out, reads, states, first, blocks, sizes, B, scale,
    READ_FIRST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    K_STEPS: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens for one block of columns and one of the ``blocks`` blocks of slots from ``first``.

    ``out`` and the shares ``reads [blocks, B, T, V]``, or, for the backward pass, only ``states``: v before each chunk.
    """
    T, N, K, V, B1, inner = sizes
    pid = tl.program_id(0)
    block = pid % blocks
    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = first * BLOCK_N + place
    pid = pid // blocks
    column = (pid % tl.cdiv(V, BLOCK_V)) * BLOCK_V
    b = pid // tl.cdiv(V, BLOCK_V)
    group = tl.minimum(N - first * BLOCK_N, blocks * BLOCK_N)
    exists = n < N
    d = column + tl.arange(0, BLOCK_V)
    ok, bias = open_slots(source.mask, b, B1, n, N)
    k_rows, k0 = slot_block(source.k, b, B1, n, ok, K, BLOCK_K)
    x = tile(slots(v, b, B1, n), ok, V, column, BLOCK_V).to(tl.float32)  # what is in an empty slot is never read
    chunk = b.to(tl.int64) * tl.cdiv(T, BLOCK_T)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t_ok = open_tokens(source.token_mask, b, B1, t, inner, T)
        a, keep, _ = gates(
            k0, k_rows, ok, bias, source.q_write, None, b, n, t, t_ok, sizes, scale, 1.0,
            "sigmoid", "full", BLOCK_K, K_STEPS, PRECISION,
        )  # fmt: skip
        if states is not None:
            put(states + (chunk * group + place) * V, exists, V, column, x, BLOCK_V)
        else:
            p = read_weights(
                k0, k_rows, ok, bias, source.q_read, lse, rest, b, t, t_ok, sizes, scale, BLOCK_K, K_STEPS, PRECISION
            )
        for i in range(tl.minimum(BLOCK_T, T - t0)):
            w_i = token_row(source.w, b, B1, t0, i, t_ok, inner, V, column, BLOCK_T, BLOCK_V)[None, :]
            before = x
            x = x * at_token(keep, i, BLOCK_T)[:, None] + at_token(a, i, BLOCK_T)[:, None] * w_i
            if states is None:
                share = tl.sum(at_token(p, i, BLOCK_T)[:, None] * (before if READ_FIRST else x), 0)
                tl.store(reads + ((block.to(tl.int64) * B + b) * T + t0 + i) * V + d, share, mask=d < V)
        chunk += 1
    if out is not None:
        old = tile(slots(v, b, B1, n), exists, V, column, BLOCK_V).to(tl.float32)
        put(slots(out, b, B1, n), exists, V, column, tl.where(ok[:, None], x, old), BLOCK_V)


class Scan:
    """The arguments of one call, checked, and as the kernels take them."""

    def __init__(
        self, op: str, values: Tensor, keys: Tensor, read_query: Tensor, write_query: Tensor, write: Tensor,
        slot_mask: Tensor | None, token_mask: Tensor | None, scale: float, read_first: bool, *more: tuple,
    ) -> None:  # fmt: skip
        (self.T, self.K), (self.N, self.V) = read_query.shape[-2:], values.shape[-2:]
        T, N, K, V = self.T, self.N, self.K, self.V
        given = [("read_query", read_query, (T, K)), ("write_query", write_query, (T, K)), ("write", write, (T, V))]
        memory = [("values", values, (N, V)), ("keys", keys, (N, K)), ("slot_mask", slot_mask, (N,))]
        self.call = call = Call(op, [*given, ("token_mask", token_mask, (T,)), *more], memory)
        call.floats(values, keys, read_query, write_query, write)
        call.mask(slot_mask)
        call.require(token_mask is None or token_mask.element_size() == 1, "token_mask must be bool")
        self.values, self.scale, self.count = values, scale, call.F * T
        self.plan = plan("memory_scan", max(K, V), read_query, values)
        most = BLOCKS[bits(read_query, values)]
        wide_k, wide_v = (narrowed(f(n, read_query, values), most) for f, n in ((summed, K), (width, V)))
        self.blocks, self.columns = triton.cdiv(N, self.plan.config.block_n), triton.cdiv(V, wide_v.block)
        self.source = Source(
            call.slots(keys), call.rows(read_query), call.rows(write_query), call.rows(write),
            call.slot_numbers(slot_mask), call.numbers(token_mask),
        )  # fmt: skip
        self.constants = {
            "plan": self.plan, "READ_FIRST": read_first, "BLOCK_T": self.plan.config.block_t,
            "BLOCK_N": self.plan.config.block_n, "BLOCK_K": wide_k.block, "K_STEPS": wide_k.several,
            "BLOCK_V": wide_v.block, "PRECISION": precision(read_query, values),
        }  # fmt: skip

    def groups(self, numbers: int) -> list[tuple[int, int]]:
        """The first block of slots of each group, and how many, where a block takes so many ``numbers`` of memory."""
        most = max(1, WORKSPACE // max(1, numbers))
        return [(first, min(most, self.blocks - first)) for first in range(0, max(1, self.blocks), most)]

    def sizes(self, first: int, blocks: int) -> tuple:
        """The group of blocks of slots, and what ends the arguments of both kernels."""
        call = self.call
        return first, blocks, call.sizes(self.T, self.N, self.K, self.V), call.B, self.scale

    def forward(self, group: tuple[int, int], stats: tuple, out: tuple | None, reads, states) -> None:
        """stats: lse and lse_rest of the read scores, or None of both where nothing is read."""
        launch(
            memory_scan_kernel, self.call.B * self.columns * group[1], self.call.slots(self.values), self.source,
            *stats, out, reads, states, *self.sizes(*group), **self.constants,
        )  # fmt: skip


@operator
def memory_scan(
    values: Tensor, keys: Tensor, read_query: Tensor, write_query: Tensor, write: Tensor, slot_mask: Tensor | None,
    token_mask: Tensor | None, scale: float, read_first: bool,
):  # fmt: skip
    """reads ``[..., T, V]``, new values ``[..., N, V]``, lse and lse_rest of the read scores ``[..., T]``."""
    s = Scan("memory_scan", values, keys, read_query, write_query, write, slot_mask, token_mask, scale, read_first)
    call, T, N, V = s.call, s.T, s.N, s.V
    out = call.memory_result(N, V, dtype=values.dtype)
    reads, view = call.token_result(T, V, dtype=read_query.dtype)
    lse, rest = softmax_lse(call, read_query, keys, slot_mask, scale)
    if token_mask is not None:
        lse, rest = lse.masked_fill(~token_mask, float("-inf")), rest.masked_fill(~token_mask, 0.0)
    rows = (out, call.batches[1] * N * V, N * V, V)
    total = None
    for group in s.groups(call.B * s.count * V):
        shares = call.scratch(group[1], *view.shape)
        s.forward(group, (call.numbers(lse), call.numbers(rest)), rows, shares, None)
        total = shares.sum(0) if total is None else total + shares.sum(0)
    view.copy_(total)
    return call.store(reads, view), out, lse, rest


@operator
def memory_scan_backward(
    values: Tensor, keys: Tensor, read_query: Tensor, write_query: Tensor, write: Tensor, slot_mask: Tensor | None,
    token_mask: Tensor | None, reads: Tensor, lse: Tensor, lse_rest: Tensor, d_reads: Tensor | None,
    d_values: Tensor | None, scale: float, read_first: bool, wants: list[bool],
):  # fmt: skip
    """Gradients of values, keys, both queries, write and a float mask."""
    T, K = read_query.shape[-2:]
    N, V = values.shape[-2:]
    d_reads = reads.new_zeros(V).expand(reads.shape) if d_reads is None else d_reads
    s = Scan(
        "memory_scan_backward", values, keys, read_query, write_query, write, slot_mask, token_mask, scale, read_first,
        ("reads", reads, (T, V)), ("lse", lse, (T,)), ("lse_rest", lse_rest, (T,)), ("d_reads", d_reads, (T, V)),
    )  # fmt: skip
    call, c, wide_v = s.call, s.plan.config, s.constants["BLOCK_V"]
    shape = (*call.memory, N, V)
    d_values = values.new_zeros(V).expand(shape) if d_values is None else d_values
    call.require(len(wants) == 6, "wants must have 6 entries")
    call.require(tuple(d_values.shape) == shape, "d_values must have the shape of values")
    call.floats(reads, d_reads, d_values)
    call.stats(lse, lse_rest)
    d_old = Gradient(call, values, wants[0], "memory", N, V)
    d_write = Gradient(call, write, wants[4], "tokens", T, V)
    by_scores = any(wants[i] for i in (1, 2, 3, 5))
    queries = None
    if by_scores:  # stacked: tokens twice as many, which share the keys
        queries = torch.stack([q.expand(*call.whole, T, K) for q in (read_query, write_query)])
        if token_mask is not None:  # a silent token may hold anything
            queries = queries.masked_fill(~token_mask.unsqueeze(-1), 0)
    delta = row_dots(call, d_reads, reads)
    chunks = triton.cdiv(s.count, c.block_t)
    # of one block of slots: replays, states, ds, dw
    block = s.columns * c.block_t * c.block_n * wide_v + chunks * c.block_n * V
    block += s.columns * 2 * s.count * c.block_n + s.count * V
    dw, parts = None, []
    for first, blocks in s.groups(call.B * block):
        slots_here = slice(first * c.block_n, (first + blocks) * c.block_n)
        size = min(N, slots_here.stop) - slots_here.start
        states = call.scratch(call.B, chunks, size, V)
        s.forward((first, blocks), (None, None), None, None, states)
        programs = call.B * s.columns * blocks
        replay = call.scratch(programs, c.block_t, c.block_n, wide_v)
        ds = call.scratch(s.columns, *call.batches, 2 * call.F, T, size) if by_scores else None
        shares = call.scratch(blocks, *call.batches, call.F, T, V) if d_write.wanted else None
        launch(
            memory_scan_backward_kernel, programs, s.source, call.numbers(lse), call.numbers(lse_rest),
            (delta, *delta.stride()), call.rows(d_reads), call.slots(d_values), states, replay, d_old.rows(), ds,
            shares, *s.sizes(first, blocks), **s.constants,
        )  # fmt: skip
        if shares is not None:
            dw = shares.sum(0) if dw is None else dw + shares.sum(0)
        if ds is not None:
            here = [None if x is None else x[..., slots_here, :] for x in (values, keys)]
            mask = None if slot_mask is None else slot_mask[..., slots_here]
            parts.append(_from_scores(*here, queries, mask, ds.sum(0), scale, wants))
    if d_write.wanted:
        d_write.view.copy_(dw)
    nothing = reads.new_empty(0)
    d_read_query = d_write_query = d_keys = d_mask = nothing
    if by_scores:
        d_queries, d_keys, d_mask = zip(*parts)
        d_keys = torch.cat(d_keys, -2) if wants[1] else nothing
        d_mask = torch.cat(d_mask, -1)
        if wants[2] or wants[3]:
            summed = sum((g.float() for g in d_queries[1:]), d_queries[0].float())
            d_read_query, d_write_query = (
                g.sum_to_size(q.shape).to(q.dtype) for g, q in zip(summed, (read_query, write_query))
            )
    return d_old.result(), d_keys, d_read_query, d_write_query, d_write.result(), d_mask


def _from_scores(
    values: Tensor, keys: Tensor, queries: Tensor, slot_mask: Tensor | None, ds: Tensor, scale: float, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both queries, keys and mask of a group of slots from ds ``[B0, B1, 2 F, T, N]``."""
    (T, K), (N, V) = queries.shape[-2:], values.shape[-2:]
    memory = [("values", values, (N, V)), ("keys", keys, (N, K)), ("slot_mask", slot_mask, (N,))]
    call = Call("memory_scan_backward", [("queries", queries, (T, K))], memory)
    d_queries = Gradient(call, queries, wants[2] or wants[3], "tokens", T, K)
    d_keys = Gradient(call, keys, wants[1], "memory", N, K)
    d_mask = Gradient(call, slot_mask, wants[5], "memory", N)
    score_gradients(
        call, "given", queries, keys, slot_mask, scale, d_queries, d_keys, d_mask, d_weights=(ds, *ds.stride()[:4])
    )
    return d_queries.result(), d_keys.result(), d_mask.result()


def examples(x: Inputs) -> Iterator[Example]:
    def scan(N: int, mask: Tensor | None, read_first: bool, **which) -> Example:
        rows = (x(2, n, x.width) for n in (N, N, x.tokens, x.tokens, x.tokens))
        return Example(memory_scan, (*rows, mask, None, SCALE, read_first), **which)

    yield scan(x.slots // 16, None, False, main=True)
    yield scan(x.slots, x(2, x.slots, dtype=torch.float32), True, variant="mask, read first")
