"""What the kernels of dense writes share: gates of a tile [slots, tokens], products along the tokens, the arguments.

Gates are sigmoids of scores, a softmax of scores over the slots, or given (GATE). The softmax is normalised by numbers
per token that a first pass took (softmax_write.py): the highest score, its slot, and the sum of exp(s - top) over all
other slots.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .layout import Call, Sizes
from .tiles import dots, scores, sigmoid, softmax_weights, tile, tokens


@triton.jit
def open_tokens(token_mask, b, B1, t, inner, stop):
    """Which tokens exist and write."""
    ok = t < stop
    if token_mask is not None:
        ok = ok & (tl.load(tokens(token_mask, b, B1, t, inner), mask=ok, other=0) != 0)
    return ok


@triton.jit
def gates(
    k0, k_rows, ok, bias, q, norm, b, n, t, t_ok, sizes, scale, erase,
    GATE: tl.constexpr, ERASE: tl.constexpr, BLOCK_K: tl.constexpr, K_STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a, 1 - a and f = 1 - erase a of a tile [slots, tokens]; 0, 1 and 1 where nothing is written.

    q: the token rows that gates come from, queries or the gates themselves. No gate near 1 is subtracted from 1.
    """
    live = ok[:, None] & t_ok[None, :]
    K = sizes.K
    q_rows = tokens(q, b, sizes.B1, t, sizes.inner)
    if GATE == "given":
        a = tl.load(q_rows[None, :] + n[:, None], mask=live, other=0.0).to(tl.float32)
        keep = 1.0 - a
    else:
        q0 = tile(q_rows, t_ok, K, 0, BLOCK_K)
        s = scores(dots(k0, k_rows, ok, q0, q_rows, t_ok, K, BLOCK_K, K_STEPS, PRECISION), scale, bias[:, None])
        if GATE == "softmax":
            at = b.to(tl.int64) * sizes.T + t
            top = tl.load(norm[0] + at, mask=t_ok, other=0.0)[None, :]
            rest = tl.load(norm[1] + at, mask=t_ok, other=0.0)[None, :]
            highest = n[:, None] == tl.load(norm[2] + at, mask=t_ok, other=-1)[None, :]
            p = tl.where(highest, 1.0, softmax_weights(s, top, 0.0))
            a = p / (1.0 + rest)
            keep = tl.where(highest, rest, 1.0 + rest - p) / (1.0 + rest)
        else:
            a = sigmoid(s)
            keep = sigmoid(-s)
        a = tl.where(live, a, 0.0)
        keep = tl.where(live, keep, 1.0)
    f = keep
    if ERASE == "part":
        f = keep + a * (1.0 - erase)
    elif ERASE == "none":
        f = tl.full(a.shape, 1.0, tl.float32)
    return a, keep, f


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def _with_and_without(p, before_p, x, before_x):
    """Products up to an element, with it and without it."""
    return p * x, p * before_x


@triton.jit
def suffix_products(f):
    """prod_{u > t} f[:, u] for every t, and the product over all t."""
    _, behind = tl.associative_scan((f, tl.full(f.shape, 1.0, tl.float32)), 1, _with_and_without, reverse=True)
    return behind, tl.reduce(f, 1, multiply)


@triton.jit
def prefix_products(f):
    """prod_{u < t} f[:, u] for every t."""
    _, before = tl.associative_scan((f, tl.full(f.shape, 1.0, tl.float32)), 1, _with_and_without)
    return before


@triton.jit
def _compose(f, g, before_f, before_g, x, y, before_x, before_y):
    """Maps p -> f p + g one after the other, with and without the last."""
    return f * x, g * x + y, f * before_x, g * before_x + before_y


@triton.jit
def states_before(f, g, p):
    """The state before each token of p_t = f_t p_{t-1} + g_t, where ``p`` comes before all of them."""
    one, zero = tl.full(f.shape, 1.0, tl.float32), tl.zeros(f.shape, tl.float32)
    _, _, before_f, before_g = tl.associative_scan((f, g, one, zero), 1, _compose)
    return before_f * p[:, None] + before_g


class Source(NamedTuple):
    """What a write is made of; q: the gates themselves where they are given, norm: see ``Write``."""

    k: tuple | None
    q: tuple
    w: tuple
    mask: tuple | None
    token_mask: tuple | None
    norm: tuple | None


class Write:
    """The arguments of one write, checked, and as the kernels take them.

    keys: None where ``query`` holds the gates, ``[..., T, N]``. norm: of a softmax, what its first pass took.
    """

    norm: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self, op: str, gate: str, values: Tensor, keys: Tensor | None, query: Tensor, write: Tensor,
        erase: Tensor | None, slot_mask: Tensor | None, token_mask: Tensor | None, scale: float, erase_scale: float,
    ) -> None:  # fmt: skip
        self.gate = gate
        (self.T, width), (self.N, self.V) = query.shape[-2:], values.shape[-2:]
        self.K = 1 if keys is None else width
        T, N, V = self.T, self.N, self.V
        given = ("weights", query, (T, N)) if keys is None else ("query", query, (T, self.K))
        token_side = [given, ("write", write, (T, V)), ("erase", erase, (T, V)), ("token_mask", token_mask, (T,))]
        memory_side = [("values", values, (N, V)), ("keys", keys, (N, self.K)), ("slot_mask", slot_mask, (N,))]
        self.call = call = Call(op, token_side, memory_side)
        call.floats(values, keys, query, write, erase)
        call.mask(slot_mask)
        call.require(token_mask is None or token_mask.element_size() == 1, "token_mask must be bool")
        call.require(0 <= erase_scale <= 1, "erase must be in [0, 1]")
        self.keys, self.query, self.write, self.erase = keys, query, write, erase
        self.slot_mask, self.token_mask = slot_mask, token_mask
        self.scale, self.erase_scale = scale, erase_scale
        self.count = call.F * T

    @property
    def erasing(self) -> str:
        """Which form of f = 1 - erase a the kernels compute."""
        return {1.0: "full", 0.0: "none"}.get(self.erase_scale, "part")

    @property
    def sizes(self) -> Sizes:
        return self.call.sizes(self.T, self.N, self.K, self.V)

    def source(self) -> Source:
        call = self.call
        return Source(
            call.slots(self.keys), call.rows(self.query), call.rows(self.write),
            call.slot_numbers(self.slot_mask), call.numbers(self.token_mask), self.norm,
        )  # fmt: skip

    def memory_rows(self, x: Tensor) -> tuple:
        """A contiguous ``[B, N, V]`` for a kernel."""
        return (x, self.call.batches[1] * self.N * self.V, self.N * self.V, self.V)

    def memory_numbers(self, x: Tensor) -> tuple:
        """A contiguous ``[B, N]`` for a kernel."""
        return (x, self.call.batches[1] * self.N, self.N, 1)
