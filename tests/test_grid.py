"""The contract grid: every op, backend, dtype, case and direction against the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from promised import PROMISED
from support import BACKENDS, CASE, NATIVE, has, run_python

from memkernels import backends
from memkernels.registration import OPS
from memkernels.testing import CASES, Subject, cases
from memkernels.testing.inputs import takes

GRID = [
    pytest.param(op.name, case.name, dtype, backend, id=f"{op.name}-{str(dtype)[6:]}-{case.name}-{backend}")
    for op in OPS.values()
    for dtype in op.dtypes
    for case in cases(op)
    if takes(case, dtype)
    for backend in BACKENDS
    if has(op.name, backend)
]


@functools.lru_cache(maxsize=1)  # consecutive backends share inputs and reference
def _subject(op: str, case: str, dtype: torch.dtype) -> Subject:
    return Subject(OPS[op], CASE[case], dtype, "cpu")


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), GRID)
def test_equals_the_float64_reference(op, case, dtype, backend):
    subject = _subject(op, case, dtype)
    rows = subject.rows(backend, [d for d in subject.directions() if has(op, backend, d.replace(" ", "-"))])
    assert rows
    assert all(row.passed for row in rows), "\n".join(str(row) for row in rows if not row.passed)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("op", PROMISED)
def test_the_cpu_backend_has_no_gap(op, backend):
    row = next(b for b in backends.BACKENDS if b.name == backend)
    one = OPS[op]
    whys = [row.gap(op, "cpu", dtype, direction) for dtype in one.dtypes for direction in one.directions]
    whys += [row.gap(f"{op}_", "cpu")] if OPS[op].inplace else []
    assert not any(whys), "\n".join(dict.fromkeys(w for w in whys if w))


def test_every_case_is_taken_by_some_op():
    taken = {case.name for op in OPS.values() for case in cases(op)}
    assert taken == {case.name for case in CASES}
    assert len(taken) == len(CASES), "two cases have one name"


def test_every_op_has_backward_rows():
    for op in (op for op in OPS.values() if op.differentiable):
        assert "backward" in Subject(op, CASE["usual"], torch.float32, "cpu").directions(), op.name


POISONED = """
from memkernels.testing import check, report
rows = check(backend="cpu", dtype="float32", quick=True)
assert rows and all(r.passed for r in rows), report(rows)
"""


def test_scratch_memory_is_not_assumed_to_be_zero():
    """The C library fills what malloc returns with 0xfe bytes: numbers that no sum survives."""
    done = run_python(POISONED, MALLOC_PERTURB_="1")
    assert done.returncode == 0, done.stdout + done.stderr
