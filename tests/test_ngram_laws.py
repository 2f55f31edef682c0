"""ngram_slots, prime_sizes and odd_multipliers against the published formula in Python's integers, which never wrap."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
import torch

import memkernels as mk

ORDERS, HEADS = (2, 3), 4
SIZES, MULTIPLIERS = mk.prime_sizes(1000, ORDERS, HEADS), mk.odd_multipliers(7, 2, 3)


def signed(x: int) -> int:
    """``x`` modulo 2^64 as a signed 64-bit integer."""
    x &= 2**64 - 1
    return x - 2**64 if x >> 63 else x


def by_formula(tokens, sizes, multipliers, orders, heads, token_map=None, history=(), first=None, ignore=(), pad=0):
    """One sequence, token by token, in integers of any size: a list of lists."""
    before, n_max = list(history), len(multipliers)
    before = [-1] * (n_max - 1 - len(before)) + before

    def x(at: int, begin: int) -> int:
        token = -1 if at < begin or at < 1 - n_max else tokens[at] if at >= 0 else before[at]
        return pad if token < 0 or token in ignore else token if token_map is None else token_map[token]

    rows = []
    for t, token in enumerate(tokens):
        begin = -n_max if first is None else first[t]
        row, offset = [], 0
        for m, size in enumerate(sizes):
            mix = 0
            for j in range(orders[m // heads]):
                mix ^= signed(x(t - j, begin) * multipliers[j])
            row.append(offset + mix % size)  # Python's modulus has the sign of the divisor
            offset += size
        rows.append([-1] * len(sizes) if token < 0 or token in ignore else row)
    return rows


def test_a_million_random_ngrams(backend):
    """Ids up to 2^31, so that products wrap: numpy's 64-bit integers, and Python's for a sample."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 2**31, 1_000_000)
    sizes, factors = SIZES.numpy(), MULTIPLIERS.numpy()
    padded = np.concatenate([np.zeros(2, np.int64), tokens])
    mix, wanted, offset = padded[2:] * factors[0], [], 0
    for n in ORDERS:
        mix = mix ^ (padded[3 - n : len(padded) - n + 1] * factors[n - 1])
        for _ in range(HEADS):
            size = sizes[len(wanted)]
            wanted.append(offset + np.mod(mix, size))
            offset += size
    got = mk.ngram_slots(torch.from_numpy(tokens), SIZES, MULTIPLIERS, orders=ORDERS, heads=HEADS, backend=backend)
    assert (mix < 0).mean() > 0.4, "products must wrap to negative numbers"
    assert torch.equal(got, torch.from_numpy(np.stack(wanted, -1)))
    some = by_formula(tokens[:200].tolist(), SIZES.tolist(), MULTIPLIERS.tolist(), ORDERS, HEADS)
    assert got[:200].tolist() == some


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(backend, seed):
    r = random.Random(seed)
    orders, heads, n_max = r.choice([((1, 4), 3, 5), ((3,), 2, 3), ((2, 3, 5), 1, 6), ((4, 2), 2, 4)])
    vocabulary, T = 40, 33
    tokens = [r.randrange(-1, vocabulary) for _ in range(T)]
    options = {
        "token_map": [r.randrange(2**40) for _ in range(vocabulary)],
        "history": [r.randrange(-1, vocabulary) for _ in range(n_max - 1)],
        "first": [t // 7 * 7 - 2 for t in range(T)],
        "ignore": [3, 17, 25],
    }
    sizes = [r.choice((2, 3, 97, 2**31 - 1, 2**61 - 1)) for _ in range(len(orders) * heads)]
    factors = [signed(r.getrandbits(64) | 1) for _ in range(n_max)]
    wanted = by_formula(tokens, sizes, factors, orders, heads, pad=-9, **options)
    tensors = {name: torch.tensor(x) for name, x in options.items()}
    lists = torch.tensor(tokens), torch.tensor(sizes), torch.tensor(factors)
    got = mk.ngram_slots(*lists, orders=orders, heads=heads, pad=-9, backend=backend, **tensors)
    assert got.tolist() == wanted
    tensors["ignore"] = options["ignore"]  # a list of ids too
    again = mk.ngram_slots(lists[0].int(), *lists[1:], orders=orders, heads=heads, pad=-9, backend=backend, **tensors)
    assert torch.equal(got, again)


def test_pieces_equal_the_whole_at_every_cut(backend):
    tokens = torch.randint(-1, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    call = {"orders": ORDERS, "heads": HEADS, "ignore": [5], "backend": backend}
    whole = mk.ngram_slots(tokens, SIZES, MULTIPLIERS, **call)
    none = torch.full((2, 2), -1)
    for cut in range(13):
        first = mk.ngram_slots(tokens[:, :cut], SIZES, MULTIPLIERS, **call)
        history = torch.cat([none, tokens[:, :cut]], -1)[:, -2:]
        second = mk.ngram_slots(tokens[:, cut:], SIZES, MULTIPLIERS, history=history, **call)
        assert torch.equal(torch.cat([first, second], 1), whole), cut


def test_packed_sequences_equal_separate_ones(backend):
    lengths = [1, 4, 2, 5]
    parts = [torch.randint(0, 500, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    first = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    call = {"orders": ORDERS, "heads": HEADS, "backend": backend}
    packed = mk.ngram_slots(torch.cat(parts), SIZES, MULTIPLIERS, first=first, **call)
    assert torch.equal(packed, torch.cat([mk.ngram_slots(p, SIZES, MULTIPLIERS, **call) for p in parts]))


def test_primes_by_trial_division():
    def prime(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    seen = {101, 107}
    got = mk.prime_sizes(100, (2, 3), 3, seen).tolist()
    assert got == [103, 109, 113, 127, 131, 137] and all(map(prime, got))
    assert seen == {101, 107, *got}
    assert mk.prime_sizes(100, (2,), 2, seen).tolist() == [139, 149]
    assert mk.prime_sizes([10, 1], (2, 3), 2).tolist() == [11, 13, 2, 3]
    assert mk.prime_sizes(2**31, (2,), 2, frozenset()).tolist() == [2147483659, 2147483693]
    small = [n for n in range(1, 3000) if prime(n)]
    assert mk.prime_sizes(1, (1,), len(small)).tolist() == small
    # Strong pseudoprimes to the first bases, the square of a prime, and a Carmichael number.
    for composite in (3215031751, 341550071728321, 1000003**2, 561):
        assert mk.prime_sizes(composite, (1,), 1).item() > composite


def test_vectors_by_hand():
    """SplitMix64 seeded with 1234567 begins with 6457827717110365317 (its authors' test vector): state = mix(seed)."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert mix((1234567 + 0x9E3779B97F4A7C15) & mask) == 6457827717110365317
    for seed, layer in ((0, 0), (0, 1), (-5, 3), (2**70, 12)):
        state = (mix(seed & mask) + layer) & mask
        wanted = [signed(mix((state + (i + 1) * 0x9E3779B97F4A7C15) & mask) | 1) for i in range(4)]
        assert mk.odd_multipliers(seed, layer, 4).tolist() == wanted
    assert mk.odd_multipliers(0, 1, 3).tolist() == [-7995527694508729151, -4689498862643123097, -534904783426661025]
    assert mk.ngram_slots(
        torch.tensor([3, 1]), torch.tensor([7, 11]), torch.tensor([5, 3]), orders=(1, 2), heads=1
    ).tolist() == [[15 % 7, 7 + 15 % 11], [5 % 7, 7 + (5 ^ 9) % 11]]


BAD = [
    ({"orders": ()}, ValueError, "orders must name at least one length, got none"),
    ({"orders": (0, 1)}, ValueError, "orders must be at least 1, got 0"),
    ({"heads": 3}, ValueError, "sizes must be [M] with M = len(orders) * heads = 6, got [8]"),
    ({"heads": 2.0}, TypeError, "heads must be an int, got float"),
    ({"orders": (2, 4)}, ValueError, "multipliers must be at least 4, one per token of the longest n-gram, got 3"),
    ({"history": torch.zeros(3, dtype=torch.int64)}, ValueError, "history must be [..., n_max - 1 = 2], got [3]"),
    ({"token_map": torch.zeros(9)}, TypeError, "token_map must be int64 or int32, got float32"),
    ({"first": torch.zeros(4, dtype=torch.int64)}, ValueError, "first must be [..., T=5], got [4]"),
    ({"token_map": torch.zeros(2, 9, dtype=torch.int64)}, ValueError, "token_map must be [W], got [2, 9]"),
    ({"pad": "0"}, TypeError, "pad must be an int, got str"),
    ({"ignore": [1.5]}, TypeError, "ignore must be an int, got float"),
]


@pytest.mark.parametrize(("change", "error", "sentence"), BAD)
def test_bad_input_is_one_sentence(backend, change, error, sentence):
    call = {"orders": ORDERS, "heads": HEADS, **change}
    with pytest.raises(error, match=f"^ngram_slots: {re.escape(sentence)}$"):
        mk.ngram_slots(torch.arange(5), SIZES, MULTIPLIERS, backend=backend, **call)
    with pytest.raises(TypeError, match="^ngram_slots: tokens must be int64 or int32, got float32$"):
        mk.ngram_slots(torch.ones(5), SIZES, MULTIPLIERS, orders=ORDERS, heads=HEADS, backend=backend)


def test_a_token_map_smaller_than_the_vocabulary():
    call = {"orders": ORDERS, "heads": HEADS, "token_map": torch.arange(9), "backend": "cpu"}
    tokens = torch.tensor([1, 9, 2])
    sentence = "ngram_slots: tokens must be below 9, the length of token_map, got 9"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        mk.ngram_slots(tokens, SIZES, MULTIPLIERS, **call)
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        mk.ngram_slots(tokens[:1], SIZES, MULTIPLIERS, history=torch.tensor([0, 9]), **call)
    mk.ngram_slots(tokens, SIZES, MULTIPLIERS, ignore=[9], **call)  # an ignored one needs no place in the map


def test_sizes_that_are_no_primes_are_warned_of(backend):
    sizes = SIZES.clone()
    sizes[2] = 1000
    with pytest.warns(UserWarning, match=r"^ngram_slots: sizes should be primes.*, got 1000$"):
        mk.ngram_slots(torch.arange(5), sizes, MULTIPLIERS, orders=ORDERS, heads=HEADS, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.ngram_slots(torch.arange(5), SIZES, MULTIPLIERS, orders=ORDERS, heads=HEADS, backend=backend)
    with pytest.raises(ValueError, match="^prime_sizes: base must be at least 1, got 0$"):
        mk.prime_sizes(0, (2,), 1)
    with pytest.raises(ValueError, match="^prime_sizes: base must be one number or one per order, 2, got 3$"):
        mk.prime_sizes([5, 6, 7], (2, 3), 1)
    with pytest.raises(TypeError, match="^odd_multipliers: seed must be an int, got float$"):
        mk.odd_multipliers(0.5, 0, 2)
