"""ngram_slots on a GPU: rows of hash tables, named by the last tokens.

    mix_n[t] = XOR_{j < n} (x[t - j] * multipliers[j]),     slots[t, m] = offset_m + mix_{n(m)}[t] mod sizes[m]

A program takes a block of tokens, of one stream or of several short ones, and goes back from them token by token: each
step adds a factor to the mix, and the tables of that order are written at once. Bound by latency for few tokens, by the
remainders for many. A GPU has no division of 64-bit integers, so each table is divided by once per program, c =
floor((2^64 - 1) / d); the quotient of any u is then high(u c) or one more.

Sizes stay on the device: offsets are added up where they are used. A token without a place in the map, and a size below
1, fail an assertion on the device, without a synchronisation; no such token is followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import FEW, Example, Inputs, operator
from .launch import launch, plan
from .layout import Call
from .tiles import batch


@triton.jit
def _token(tokens, history, b, B1, t, ok, before):
    """Token ``t`` of stream ``b``, counted from the first; those before it are in the history, or are none, -1."""
    token = tl.load(batch(tokens, b, B1) + t.to(tl.int64) * tokens[4], mask=ok & (t >= 0), other=-1)
    if history is not None:
        old = batch(history, b, B1) + (t + before).to(tl.int64) * history[4]
        token = tl.where(t < 0, tl.load(old, mask=ok & (t < 0), other=-1), token)
    return token


@triton.jit
def _mapped(token, token_map, ignore, words, ignored, pad):
    """What stands for a token in n-grams, whether it is ignored, and whether it has a place in the map."""
    none = token < 0
    if ignore is not None:
        for i in range(ignored):
            none = none | (token == tl.load(ignore + i))
    place = tl.full(token.shape, 1, tl.int1)
    x = token
    if token_map is not None:
        place = none | (token < words)
        x = tl.load(token_map + token, mask=place & (none == 0), other=0)
    return tl.where(none, pad, x), none, place


@triton.jit
def _rows_before(sizes, tables, BLOCK: tl.constexpr):
    """The sum of the first ``tables`` sizes: where the next table begins."""
    total = tl.zeros([], tl.int64)
    for start in range(0, tables, BLOCK):
        m = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(sizes + m, mask=m < tables, other=0), 0)
    return total


@triton.jit
def _inverse(d):
    """What divides by an unsigned ``d``: floor((2^64 - 1) / d), and 2^64 mod d in 1 .. d, by which a negative number is
    too large when taken as unsigned."""
    most = tl.full(d.shape, -1, tl.int64).to(tl.uint64, bitcast=True)
    inverse = most // d
    return inverse, most - inverse * d + 1


@triton.jit
def _remainder(x, d, inverse, wrap):
    """x mod d of signed ``x``, never negative, as unsigned."""
    u = x.to(tl.uint64, bitcast=True)
    r = u - tl.umulhi(u, inverse) * d
    r = tl.where(r >= d, r - d, r)
    less = tl.where(x < 0, wrap, wrap - wrap)
    return tl.where(r >= less, r - less, r + (d - less))


@triton.jit
def ngram_slots_kernel(
    tokens, history, first, sizes, multipliers, token_map, ignore, slots, holds,
    total, length, B1, words, ignored, pad, heads, tables,
    ORDERS: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total: tokens of all streams, each of ``length``. holds [programs, 2]: each token that was read has a place;
    sizes are at least 1, and their sum is in range."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    e = start + tl.arange(0, BLOCK_T)
    ok = e < total
    ahead = (start % length).to(tl.int32) + tl.arange(0, BLOCK_T)  # of the beginning of the first stream
    b, t = (start // length).to(tl.int32) + ahead // length, ahead % length
    if first is not None:
        begin = tl.load(batch(first, b, B1) + t.to(tl.int64) * first[4], mask=ok, other=0)
    mix = tl.zeros([BLOCK_T], tl.int64)
    gone = tl.zeros([BLOCK_T], tl.int1)
    placed = tl.full([BLOCK_T], 1, tl.int1)
    sized = tl.full([BLOCK_H], 1, tl.int1)
    for j in tl.static_range(J):
        token = _token(tokens, history, b, B1, t - j, ok, J - 1)
        x, none, place = _mapped(token, token_map, ignore, words, ignored, pad)
        placed = placed & place
        if j == 0:
            gone = none
        if first is not None:
            x = tl.where(t - j < begin, pad, x)
        mix = mix ^ (x * tl.load(multipliers + j))
        for g in tl.static_range(len(ORDERS)):
            if ORDERS[g] == j + 1:
                offset = _rows_before(sizes, g * heads, BLOCK_H)
                for h in range(0, heads, BLOCK_H):
                    head = h + tl.arange(0, BLOCK_H)
                    m = g * heads + head
                    size = tl.load(sizes + m, mask=head < heads, other=1)
                    own = tl.where(head < heads, size, 0)
                    end = offset + tl.cumsum(own, 0)
                    sized = sized & (size >= 1) & (end >= 0)
                    d = tl.maximum(size, 1).to(tl.uint64, bitcast=True)
                    inverse, wrap = _inverse(d)
                    rest = _remainder(mix[:, None], d[None, :], inverse[None, :], wrap[None, :])
                    slot = (end - own)[None, :] + rest.to(tl.int64, bitcast=True)
                    place_out = slots + (e * tables)[:, None] + m[None, :]
                    tl.store(place_out, tl.where(gone[:, None], -1, slot), mask=ok[:, None] & (head < heads)[None, :])
                    offset += tl.sum(own, 0)
    tl.store(holds + 2 * tl.program_id(0), tl.min(placed.to(tl.int32), 0))
    tl.store(holds + 2 * tl.program_id(0) + 1, tl.min(sized.to(tl.int32), 0))


@operator
def ngram_slots(
    tokens: Tensor, sizes: Tensor, multipliers: Tensor, token_map: Tensor | None, history: Tensor | None,
    first: Tensor | None, ignore: Tensor | None, orders: list[int], heads: int, pad: int,
) -> Tensor:  # fmt: skip
    """slots int64 ``[..., T, M]``."""
    T, J, M = tokens.shape[-1], multipliers.shape[-1], len(orders) * heads
    call = Call("ngram_slots", [("tokens", tokens, (T,)), ("history", history, (J - 1,)), ("first", first, (T,))], [])
    for x in (tokens, sizes, multipliers, token_map, history, first, ignore):
        call.require(x is None or x.dtype == torch.int64, "all tensors must be int64")
    call.require(heads >= 1 and len(orders) >= 1, "there must be an order and a head")
    call.require(all(1 <= n <= J for n in orders), f"orders must be in [1, {J}], the multipliers, got {orders}")
    sizes, multipliers = call.flat("sizes", sizes, M), call.flat("multipliers", multipliers, J)
    token_map, ignore = call.flat("token_map", token_map, None), call.flat("ignore", ignore, None)
    slots = torch.empty((*call.whole, T, M), dtype=torch.int64, device=call.device)
    p, total = plan("ngram_slots", 1), call.B * T
    block = p.config.block_t
    programs = triton.cdiv(total, block)
    holds = call.scratch(programs, 2, dtype=torch.int32)
    launch(
        ngram_slots_kernel, programs, call.numbers(tokens), call.numbers(history if J > 1 else None),
        call.numbers(first), sizes, multipliers, token_map, ignore, slots, holds, total, T, call.batches[1],
        0 if token_map is None else token_map.shape[0], 0 if ignore is None else ignore.shape[0], pad, heads, M,
        plan=p, ORDERS=tuple(orders), J=J, BLOCK_T=block, BLOCK_H=min(p.config.block_n, triton.next_power_of_2(heads)),
    )  # fmt: skip
    if programs:
        both = holds.all(0)
        if token_map is not None:
            call.require_on_device(both[0], f"tokens must be below {token_map.shape[0]}, the length of token_map")
        call.require_on_device(both[1], "sizes must be at least 1, and their sum below 2^63")
    return slots


def examples(x: Inputs) -> Iterator[Example]:
    def numbers(*shape: int) -> Tensor:
        return x.integers(*shape, below=x.slots) + 1

    ids, sizes = x.integers(2, 8 * x.tokens, below=x.slots), numbers(16)
    options = ([2, 3], 8, 0)
    table, images = x.integers(x.slots, below=x.slots), x.integers(2, below=x.slots)
    yield Example(ngram_slots, (ids, sizes, numbers(3), table, None, None, images, *options), main=True)
    yield Example(ngram_slots, (ids, sizes, numbers(3), None, None, None, None, *options), variant="no map")
    first, before = x.integers(*ids.shape, below=x.tokens), x.integers(2, 2, below=x.slots)
    packed = (ids, sizes, numbers(3), table, before, first, images, *options)
    yield Example(ngram_slots, packed, variant="history and packed")
    few = (ids[:, :FEW], sizes, numbers(3), table, before, None, None, *options)
    yield Example(ngram_slots, few, variant="history, few tokens")
