"""What a configuration of hashed n-gram tables needs: prime sizes and odd multipliers, the same on every platform."""

from __future__ import annotations

import functools
import warnings
from collections.abc import MutableSet, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from ._options import integer

_MASK = 2**64 - 1
# Bases that decide primality of every number below 3.3e24 (Sorenson and Webster 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def prime_sizes(
    base: int | Sequence[int], orders: Sequence[int], heads: int, seen: AbstractSet[int] | None = None
) -> Tensor:
    """Sizes for :func:`ngram_slots`: for each order, then each head, the smallest prime >= ``base`` not used before.

    Two tables of different prime sizes seldom collide at the same n-grams.

    Args:
        base: at least so many rows per table, one number or one per order.
        orders, heads: as in :func:`ngram_slots`.
        seen: primes that are taken, such as those of other layers. The new ones are added to it if it can change.

    Returns:
        int64 ``[len(orders) * heads]``. The same numbers on every platform.

    Raises:
        ValueError, TypeError: base or heads is no integer of at least 1, or as many bases as orders are not given.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """
    name = "prime_sizes"
    heads, orders = integer(name, "heads", heads, 1), [integer(name, "orders", n, 1) for n in orders]
    bases = list(base) if isinstance(base, (Sequence, Tensor)) else [base] * len(orders)
    if len(bases) != len(orders):
        raise ValueError(f"{name}: base must be one number or one per order, {len(orders)}, got {len(bases)}")
    found: list[int] = []
    used = set(seen or ())
    for least in (integer(name, "base", b, 1) for b in bases):
        n = least
        for _ in range(heads):
            while n in used or not _is_prime(n):
                n += 1
            used.add(n)
            found.append(n)
    if isinstance(seen, MutableSet):
        seen.update(found)  # type: ignore[attr-defined]
    return torch.tensor(found, dtype=torch.int64)


def _is_prime(n: int) -> bool:
    """Miller and Rabin's test, exact for 64-bit numbers."""
    if n < 2 or any(n % p == 0 for p in _WITNESSES):
        return n in _WITNESSES
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(pow(a, odd, n), n, twos) for a in _WITNESSES)


def _passes(x: int, n: int, twos: int) -> bool:
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False


def odd_multipliers(seed: int, layer: int, n_max: int) -> Tensor:
    """Multipliers for :func:`ngram_slots`: odd 64-bit numbers that look random, other ones for every seed and layer.

    The numbers of SplitMix64 with state ``mix(seed) + layer``, their lowest bit set. An odd factor permutes the 64-bit
    integers, so that no two tokens become one.

    Args:
        seed, layer: any integers; taken modulo 2^64. n_max: how many.

    Returns:
        int64 ``[n_max]``. The same numbers on every platform and version.

    Raises:
        ValueError, TypeError: n_max is no integer of at least 1, or seed or layer is no integer.

    Source: Steele et al. 2014, Fast Splittable Pseudorandom Number Generators.
    """
    name = "odd_multipliers"
    n_max = integer(name, "n_max", n_max, 1)
    seed, layer = (integer(name, which, x, None) for which, x in (("seed", seed), ("layer", layer)))
    state = (_mixed(seed & _MASK) + layer) & _MASK
    found = []
    for _ in range(n_max):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        odd = _mixed(state) | 1
        found.append(odd - 2**64 if odd >> 63 else odd)
    return torch.tensor(found, dtype=torch.int64)


def _mixed(x: int) -> int:
    """The output function of SplitMix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def warn_of_composites(op: str, sizes: object) -> None:
    """Warn of sizes that are no primes, where the host can look at them without waiting for a device."""
    if torch.compiler.is_compiling() or type(sizes) is not Tensor or sizes.device.type != "cpu":
        return
    if not sizes.is_nested and sizes.layout == torch.strided and sizes.dtype in (torch.int64, torch.int32):
        wrong = _composites(tuple(sizes.flatten().tolist()))
        if wrong:
            sentence = f"{op}: sizes should be primes, which spread n-grams best (prime_sizes), got {', '.join(wrong)}"
            warnings.warn(sentence, stacklevel=3)


@functools.lru_cache(maxsize=256)
def _composites(sizes: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(str(n) for n in sizes if n > 0 and not _is_prime(n))
