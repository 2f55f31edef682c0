"""Slots of n-grams, against NumPy token by token, NumPy at once, and PyTorch at once: the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import memkernels as mk

from ..cases import ngram_slots
from ..contests.contest import Contest
from ..contests.finding import TOLD, Finding, Wrong, least
from ..peers import eager, loop
from .setting import Setting

BY_TOKEN, NUMPY, TORCH = "NumPy, token by token", "NumPy, at once", "PyTorch, at once"


def slots(setting: Setting) -> Iterator[Finding]:
    """``ngram_slots`` of folded tokens; NumPy goes over tokens, with the tables of each at once, or over tables."""
    for tables in ngram_slots.LENGTHS:
        case = ngram_slots.case(tables)
        inputs = case.make(case.quick if setting.quick else case.sizes, torch.int64, "cpu", seed=0)
        wanted = exact(**inputs, **case.options)

        def check(found: Tensor, wanted=wanted) -> None:
            if not torch.equal(found, wanted):
                raise Wrong("a slot is not that of its n-gram")

        work = {**inputs, **case.options}
        contest = Contest(
            f"ngram_slots of {len(inputs['tokens'])} tokens, {tables} tables",
            lambda work=work: mk.ngram_slots(**work),
            check,
        )
        contest.enter(BY_TOKEN, loop.ngram_slots(**work))
        contest.enter(NUMPY, at_once(**work))
        contest.enter(TORCH, eager.ngram_slots(**work))
        contest.run(setting.seconds)
        yield contest.against(BY_TOKEN, least(50))
        yield contest.against(NUMPY, TOLD)
        yield contest.against(TORCH, least(5))


def exact(tokens, sizes, multipliers, token_map, orders, heads) -> Tensor:
    """In Python's integers."""
    ids, rows, factors = ([int(x) for x in t] for t in (token_map[tokens], sizes, multipliers))
    offsets = [sum(rows[:m]) for m in range(len(rows))]
    found = []
    for t in range(len(ids)):
        mixes = {}
        for n in orders:
            mix = 0
            for j in range(n):
                mix ^= (ids[t - j] if t >= j else 0) * factors[j] % 2**64
            mixes[n] = mix - 2**64 if mix >= 2**63 else mix
        found.append([offsets[m] + mixes[orders[m // heads]] % rows[m] for m in range(len(rows))])
    return torch.tensor(found)


def at_once(tokens, sizes, multipliers, token_map, orders, heads):
    """All tokens of a table at once, as the published code has it."""
    tokens, sizes, multipliers, token_map = (x.numpy() for x in (tokens, sizes, multipliers, token_map))
    offsets = np.cumsum(sizes) - sizes

    def run() -> Tensor:
        x = token_map[tokens]
        out = np.empty((len(tokens), len(sizes)), np.int64)
        mix, done, table = x * multipliers[0], 1, 0
        for n in sorted(orders):
            for j in range(done, n):
                mix = mix ^ (np.concatenate([np.zeros(j, np.int64), x[:-j]])[: len(x)] * multipliers[j])
            done = n
            for _ in range(heads):
                out[:, table] = offsets[table] + mix % sizes[table]
                table += 1
        return torch.from_numpy(out)

    return run


ROWS = {"slots": slots}
