"""Proof that every op equals its reference, for this library's tests and for yours.

    from memkernels import testing
    rows = testing.check("softmax_read")
    assert all(row.passed for row in rows), testing.report(rows)

``cases.py`` declares the situations, ``inputs.py`` makes their tensors, ``compare.py`` holds the one tolerance table,
``grid.py`` runs. ``python -m memkernels check`` is the same from a shell.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .. import backends
from ..registration import OPS
from ..spec import Op
from .cases import CASES, Case, cases
from .compare import TOLERANCE
from .grid import (
    DIRECTIONS,
    DTYPES,
    Row,
    Subject,
    find_backends,
    find_device,
    find_dtype,
    find_op,
    nan_in_new_memory,
    subjects,
)
from .report import report, summary

__all__ = [
    "CASES",
    "DIRECTIONS",
    "TOLERANCE",
    "Case",
    "Row",
    "Subject",
    "cases",
    "check",
    "nan_in_new_memory",
    "report",
    "summary",
]


def check(
    op: str | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    *,
    quick: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Run the contract grid: each op on each backend, dtype, case and direction against the float64 reference.

    Args:
        op, backend, dtype: one of them; default all (backends: the reference and all that serve the device).
        device: ``"cpu"`` (default) or ``"cuda"``.
        quick: the subset that finds most mistakes, about a sixth of the time.
        progress: called as ``progress(done, total)`` while it runs.

    Returns:
        one :class:`Row` each. A backend that is missing is a failed row that says why, so that a broken installation
        cannot pass. A backend that is here but has no kernel for an op is a failed row where it was asked for by name,
        else a row that passes as a ``gap``.

    Raises:
        ValueError: an unknown op, backend or dtype, or a device that is not here.
    """
    device = find_device(device)
    ops = list(OPS.values()) if op is None else [find_op(op)]
    dtypes = [*DTYPES] if dtype is None else [find_dtype(dtype)]
    names = find_backends(backend, device)
    work = subjects(ops, dtypes, device, quick)
    rows: list[Row] = []
    seen: set[tuple] = set()
    for done, (one, case, kind, where) in enumerate(work):
        subject = None
        for name in names:
            if dtype is None and not _claims(name, kind):
                continue
            if (key := (one.name, name, kind)) not in seen:
                seen.add(key)
                rows += _gaps(one, name, kind, where, named=backend is not None)
            if _why_not(one.name, name, kind, where, "forward") is None:
                subject = subject or Subject(one, case, kind, where)
                has = [d for d in subject.directions() if _why_not(one.name, name, kind, where, d) is None]
                rows += subject.rows(name, has)
        if progress is not None:
            progress(done + 1, len(work))
    return rows


def _claims(name: str, dtype: torch.dtype) -> bool:
    """Whether a backend takes ``dtype`` at all. One that does not is asked about it only by name."""
    return all(b.takes(dtype) for b in backends.BACKENDS if b.name == name)


def _why_not(op: str, name: str, dtype: torch.dtype, device: str, direction: str) -> str | None:
    if name == "reference":
        return None
    return next(b for b in backends.BACKENDS if b.name == name).gap(op, device, dtype, direction.replace(" ", "-"))


def _gaps(op: Op, name: str, dtype: torch.dtype, device: str, named: bool) -> list[Row]:
    kind = str(dtype).removeprefix("torch.")
    directions = (*op.directions, *(["in place"] if op.inplace else []))
    whys = {direction: _why_not(op.name, name, dtype, device, direction) for direction in directions}
    gap = not named and all(b.missing() is None for b in backends.BACKENDS if b.name == name)
    return [Row(op.name, name, kind, device, "-", d, math.nan, 0.0, gap, why, gap) for d, why in whys.items() if why]
