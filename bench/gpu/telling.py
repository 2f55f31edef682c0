"""Which rows of the contract grid tell most: all of them in rounds, the few of a first look before the rest.

A subject is a case of an op in one dtype. What it tells is read off the declarations as traits: the op in the dtype,
and the edges that the case meets. A round picks, again and again, the subject with most traits that nothing before had.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from memkernels.registration import OPS
from memkernels.spec import Op, letters
from memkernels.testing import CASES, Case, cases
from memkernels.testing.cases import SIZES
from memkernels.testing.inputs import takes

DTYPES = ("bfloat16", "float32", "float16", "int64")  # of the telling rounds: a GPU has kernels for them
FEW = 16  # tokens: up to so many stream a memory
MANY = 256  # tokens: beyond so many, several blocks
LONG = 1000  # slots: beyond so many, parts that are joined
WIDE = 256  # columns: beyond so many, a row lies in several blocks
PATHS = {"few tokens, many slots", "many tokens"}  # an op has other kernels, or other splits, for these
IDLE = {"no streams", "T = 0", "N = 0", "n = 0", "slot_mask is mask_all_empty", "indices is index_none"}  # little runs

_CASES = {case.name: case for case in CASES}

Subject = tuple[str, str, str]  # op, case, dtype


def rounds(ops: Iterable[Op]) -> list[list[Subject]]:
    """All subjects of ``ops``, each in one of three rounds.

    The first has every op in bfloat16 and in float32, or in int64, and on each of its ``PATHS``, every family of ops in
    float16, and every edge in some op. The second has every op in float16 too, and every edge in every family. The
    third is the rest.
    """
    every: list[Subject] = []
    first: dict[Subject, set] = {}
    second: dict[Subject, set] = {}
    for op in ops:
        for dtype in op.dtypes:
            for case in (case for case in cases(op) if takes(case, dtype)):
                subject = (op.name, case.name, str(dtype).removeprefix("torch."))
                every.append(subject)
                # Less than all gradients tells where a fault lies, and finds none.
                if subject[2] in DTYPES and not case.wants and not case.cotangents:
                    first[subject], second[subject] = _traits(op, case, subject[2])
    smoke = _cover(first, second, set())
    more = _cover(second, first, set().union(*(second[s] for s in smoke)))
    before = {*smoke, *more}
    return [smoke, more, [s for s in every if s not in before]]


def _traits(op: Op, case: Case, dtype: str) -> tuple[set, set]:
    """What a subject tells in the first round, and in the second."""
    edges = edges_of(op, case)
    runs = set() if edges & IDLE else {dtype, *(edges & PATHS)}
    first = {(family(op) if what == "float16" else op.name, what) for what in runs}
    return first | edges, {(op.name, what) for what in runs} | {(family(op), edge) for edge in edges}


def _cover(traits: dict[Subject, set], others: dict[Subject, set], met: set) -> list[Subject]:
    """Subjects that between them have every trait not yet ``met``, most new ones first.

    What they tell of ``others`` decides a tie, then how much there is to compute.
    """
    left, left_of_others = set().union(*traits.values()) - met, set().union(*others.values())
    largest_first = sorted(traits, key=lambda s: -_work(s))
    picked = []
    while left:
        best = max(largest_first, key=lambda s: (len(traits[s] & left), len(others[s] & left_of_others)))
        left -= traits[best]
        left_of_others -= others[best]
        picked.append(best)
    return picked


def _work(subject: Subject) -> int:
    op, case = OPS[subject[0]], _CASES[subject[1]]
    return math.prod(size for axis, size in {**SIZES, **case.sizes}.items() if axis in _axes(op))


def family(op: Op) -> str:
    """Ops of one family run the same loops."""
    names = {a.name for a in op.args}
    if "read_query" in names or "D" in _axes(op):
        return "scan"
    if op.inplace is not None:
        return "write"
    if op.selected is not None:
        return "search"
    return "sparse" if names & {"indices", "cache_tokens"} else "read"


def edges_of(op: Op, case: Case) -> set[str]:
    """What is special about a case, in words."""
    size = {name: n for name, n in {**SIZES, **case.sizes}.items() if name in _axes(op)}
    tokens, slots = size.get("T", 0), max(size.get("N", 0), size.get("W", 0))
    open_slots = size.get("n", 0) ** 2 if "n" in size else size.get("N", 0)
    conditions = {
        "few tokens, many slots": 0 < tokens <= FEW and slots >= LONG,
        "many tokens": tokens > MANY,
        "more chosen than there are": size.get("k", 0) > open_slots,
        "odd sizes": any(n % 2 for n in size.values() if n > FEW),
        "shared memory": len(case.memory) < len(case.tokens),
        "grouped heads": 1 in case.memory and 1 not in case.tokens,
        "an argument with leading dimensions of its own": bool(case.leads),
        "no streams": 0 in case.tokens,
        "float32 content": case.mixed,
        "exact ties": case.exact,
        case.layout: case.layout != "contiguous",
    }
    found = {edge for edge, true in conditions.items() if true}
    found |= {f"{name} = 0" for name, n in size.items() if n == 0}
    found |= {f"{name} > {WIDE}" for name in ("K", "V", "D") if size.get(name, 0) > WIDE}
    found |= {f"{name} is {fill}" for name, fill in case.give.items() if fill != "nan_token"}
    found |= {"NaN" for fill in case.give.values() if fill == "nan_token"}
    found |= {f"{name} = {value}" for name, value in case.params.items() if name != "scale"}
    return found


@functools.cache
def _axes(op: Op) -> set[str]:
    return set().union(*(letters(x.axes) for x in (*op.args, *op.outputs)))
