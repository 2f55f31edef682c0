"""ngram_slots: rows of hash tables, named by the last tokens.

    x[t] = token_map[tokens[t]],    x = pad before the beginning and where a token is ignored
    mix_n[t] = XOR_{j < n} (x[t - j] * multipliers[j])                           (wrapping 64-bit integers)
    slots[t, m] = offset_m + mix_{n(m)}[t] mod sizes[m],    offset_m = sizes[0] + ... + sizes[m - 1]

Sources: Cheng et al. 2026, Conditional Memory via Scalable Lookup (Engram, arXiv 2601.07372); Svenstrup et al. 2017,
Hash Embeddings for Efficient Word Representations (several hash functions in place of one large table).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._hashing import odd_multipliers, warn_of_composites
from ._options import LARGEST, integer


def mapped(ids: Tensor, token_map: Tensor | None, ignore: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """What stands for each token in an n-gram, and which tokens are ignored."""
    none = ids < 0
    if ignore is not None:
        none = none | (ids.unsqueeze(-1) == ignore).any(-1)
    x = ids if token_map is None else token_map[ids.clamp(min=0)]
    return x.masked_fill(none, pad), none


def reference(tokens, sizes, multipliers, token_map, history, first, ignore, orders, heads: int, pad: int):
    T, before = tokens.shape[-1], multipliers.shape[-1] - 1
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in (tokens, history, first) if x is not None))
    x, none = mapped(tokens.expand(*lead, T), token_map, ignore, pad)
    old = x.new_full((*lead, before), pad)
    if history is not None:
        old = mapped(history, token_map, ignore, pad)[0].expand(*lead, before)
    x = torch.cat([old, x], -1)
    position = torch.arange(T, device=tokens.device)
    mix, mixes = torch.zeros_like(tokens).expand(*lead, T), []
    for j in range(max(orders)):
        shifted = x[..., before - j : before - j + T]
        if first is not None:
            shifted = shifted.masked_fill(position - j < first, pad)
        mix = mix ^ (shifted * multipliers[j])
        mixes.append(mix)
    by_table = torch.stack([mixes[n - 1] for n in orders for _ in range(heads)], -1)
    offsets = sizes.cumsum(0) - sizes
    slots = offsets + torch.remainder(by_table, sizes)
    return (slots.masked_fill(none.unsqueeze(-1), -1),)


def _usual_orders(axes) -> list[int]:
    return [2, 3] if axes["M"] % 2 == 0 and axes["J"] >= 3 else [min(axes["J"], 2)]


def _some_tokens(place: int) -> Callable[..., Tensor]:
    """Tokens below 50 for the tests, some of them no token."""

    def fill(*tensors: Any) -> Tensor:
        x = tensors[place]
        return torch.arange(x.numel(), device=x.device).view(x.shape) * 7919 % 51 - 1

    return fill


def _count(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device)


OP = register(
    Op(
        name="ngram_slots",
        args=(
            Arg("tokens", "T", "tokens", "index", of="", fill=_some_tokens(0)),
            Arg("sizes", "M", "memory", "index", flat=True, of="", fill=lambda *x: 7 + 4 * _count(x[1])),
            Arg(
                "multipliers",
                "J",
                "memory",
                "index",
                flat=True,
                of="",
                fill=lambda *x: odd_multipliers(0, 1, len(x[2])),
            ),
            Arg("token_map", "W", "memory", "index", True, flat=True, of="", fill=lambda *x: 2**33 - 3 * _count(x[3])),
            Arg("history", "P", "tokens", "index", True, of="", fill=_some_tokens(4)),
            Arg("first", "T", "tokens", "index", True, of="", fill=lambda *x: _count(x[5]) // 3 * 3 - 1 + 0 * x[5]),
            Arg("ignore", "I", "memory", "index", True, flat=True, of="", fill=lambda *x: 5 * _count(x[6])),
        ),
        params=(("orders", "int[]"), ("heads", "int"), ("pad", "int")),
        usual={"orders": _usual_orders, "heads": lambda axes: axes["M"] // len(_usual_orders(axes)), "pad": 5},
        outputs=(Out("slots", "T M", dtype="index", grad=False, of=""),),
        reference=reference,
        equation="offset_m + (XOR_{j < n(m)} x[t - j] multipliers[j]) mod sizes[m]",
    )
)


def ngram_slots(
    tokens: Tensor,
    sizes: Tensor,
    multipliers: Tensor,
    *,
    orders: Sequence[int],
    heads: int,
    token_map: Tensor | None = None,
    history: Tensor | None = None,
    first: Tensor | None = None,
    ignore: Tensor | Sequence[int] | None = None,
    pad: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The rows of ``M = len(orders) * heads`` hash tables that the n-grams ending at each token name.

    ``mix_n[t] = XOR_{j < n} (x[t - j] * multipliers[j])`` in wrapping int64, with ``x = token_map[tokens]``, and
    ``slots[t, m] = offset_m + mix_{n(m)}[t] mod sizes[m]``, never negative; table ``m`` belongs to order
    ``orders[m // heads]`` and begins at ``offset_m``, the sum of the sizes before it.

    Args:
        tokens: int64 or int32 ``[..., T]``, token ids; a negative one is no token, as if it were ignored.
        sizes: ``[M]``, rows of each table, at least 1; primes spread best (:func:`prime_sizes`).
        multipliers: ``[n_max]``, at least ``max(orders)`` odd numbers (:func:`odd_multipliers`).
        orders: lengths of the n-grams, each at least 1. heads: tables per order.
        token_map: ``[vocabulary]``, the id that stands for each token in the n-grams, such as one of all tokens that
            read alike; None: the tokens themselves.
        history: ``[..., n_max - 1]``, the tokens before the first, the last one last; negative: none. Decoding in
            pieces that hand on their last tokens gives the same slots as one call.
        first: ``[..., T]``, the position at which the sequence of each token begins, for several sequences packed into
            one; negative positions lie in the history. None: they begin at the first token, or in the history.
        ignore: token ids, such as those of images and padding, whose tokens name no slot and count as ``pad`` in the
            n-grams after them.
        pad: stands for what is no token.
        backend: as in :func:`softmax_read`.

    Returns:
        slots int64 ``[..., T, M]`` in ``[0, sum(sizes))``, -1 at ignored tokens: indices of :func:`gather_rows`. The
        same numbers on every backend.

    Raises:
        ValueError: a shape, order or number of heads does not fit. TypeError: a dtype does not fit. RuntimeError: a
            token outside ``token_map``, or a size below 1. NotImplementedError: the named backend cannot run the call.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """
    name = "ngram_slots"
    orders = [integer(name, "orders", n, 1) for n in orders]
    heads = integer(name, "heads", heads, 1)
    pad = integer(name, "pad", pad, -LARGEST - 1)
    if not isinstance(ignore, (Tensor, type(None))):
        like = tokens.device if isinstance(tokens, Tensor) else None
        ignore = torch.tensor(
            [integer(name, "ignore", i, -LARGEST - 1) for i in ignore], dtype=torch.int64, device=like
        )
    _check_options(name, orders, heads, sizes, multipliers, history)
    warn_of_composites(name, sizes)
    tensors = [tokens, sizes, multipliers, token_map, history, first, ignore]
    return call(OP, tensors, (orders, heads, pad), backend)


def _check_options(
    name: str, orders: list[int], heads: int, sizes: object, multipliers: object, history: object
) -> None:
    """The rules between options and shapes, where those are known; the check of the call looks at the rest."""
    if not orders:
        raise ValueError(f"{name}: orders must name at least one length, got none")
    if isinstance(sizes, Tensor) and sizes.dim() == 1 and sizes.shape[0] != len(orders) * heads:
        wanted = f"len(orders) * heads = {len(orders) * heads}"
        raise ValueError(f"{name}: sizes must be [M] with M = {wanted}, got {list(sizes.shape)}")
    if not isinstance(multipliers, Tensor) or multipliers.dim() != 1:
        return
    if multipliers.shape[0] < max(orders):
        raise ValueError(f"{name}: multipliers must be at least {max(orders)}, one per token of the longest n-gram, "
                         f"got {multipliers.shape[0]}")  # fmt: skip
    before = multipliers.shape[0] - 1
    if isinstance(history, Tensor) and history.dim() and history.shape[-1] != before:
        raise ValueError(f"{name}: history must be [..., n_max - 1 = {before}], got {list(history.shape)}")
