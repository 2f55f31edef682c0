"""What there is to do on this machine. Asked in a process of its own: loading a broken library may end it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

import memkernels as mk
from memkernels import backends
from memkernels.registration import OPS
from memkernels.spec import Op
from memkernels.testing import find_backends, find_op

from .. import cases, results
from ..case import Case
from . import rows, telling


def plan(device: str, ops: list[str], names: list[str]) -> dict:
    """Rounds of the contract grid, cases to time, gaps and versions.

    Args:
        ops, names: only these ops and backends (empty: all, but the reference).

    Returns:
        ``rounds``: lists of tasks, a task being a case in a dtype. ``speed``: tasks, a task being a row. ``gaps``:
        rows. ``missing``: backend -> why it is not here. ``environment``, ``versions``. Or only ``wrong``: a name that
        is not known.
    """
    try:
        chosen = [find_op(name) for name in ops] or list(OPS.values())
        named = [find_backends(name, device)[0] for name in names] or find_backends(None, device)[1:]
    except ValueError as error:
        return {"wrong": str(error)}
    wanted = [b for b in backends.BACKENDS if b.name in named]
    rounds: list[list[dict]] = [[], [], []]
    for backend in wanted:
        able = [op for op in chosen if backend.gap(op.name, device) is None]
        for tasks, subjects in zip(rounds, telling.rounds(able)):
            tasks += [_task(backend, device, *s) for s in subjects if backend.takes(getattr(torch, s[2]))]
    return {
        "rounds": rounds,
        "speed": [
            dict(zip(rows.KEY, (op, backend.name, *rest)))
            for case in cases.all_cases(device)
            for backend in wanted
            if OPS[case.op] in chosen and not _why_not_timed(case, backend, device)
            for op, *rest in (case_key(case, device),)
        ],
        "gaps": [row for backend in wanted for op in chosen for row in _gaps(op, backend, device)],
        "missing": {b.name: why for b in wanted if (why := b.missing()) is not None},
        "environment": environment(device),
        "versions": _versions(device),
    }


def case_key(case: Case, device: str) -> tuple[str, str, str, str]:
    """Op, dtype, title and direction: what a row of speed is called, but for the backend. Small sizes on a CPU."""
    return case.op, case.dtype, case.title(case.quick if device == "cpu" else case.sizes), case.direction


def environment(device: str) -> dict:
    """Where the check runs. The processor is not known in detail where the native code could not be built."""
    try:
        return results.environment(device, torch.get_num_threads())
    except ImportError:
        name = torch.cuda.get_device_name() if device == "cuda" else device
        known = {"device": name, "processor": platform.processor(), "threads": torch.get_num_threads(), "isa": ""}
        return {**known, "python": platform.python_version(), "torch": torch.__version__, "memkernels": mk.__version__}


def _task(backend: backends.Backend, device: str, op: str, case: str, dtype: str) -> dict:
    without = [d for d in OPS[op].directions if backend.gap(op, device, getattr(torch, dtype), d) is not None]
    return {"op": op, "backend": backend.name, "dtype": dtype, "case": case, "without": without}


def _gaps(op: Op, backend: backends.Backend, device: str) -> list[dict]:
    found = []
    for dtype in filter(backend.takes, op.dtypes):
        for direction in op.directions:
            if (why := backend.gap(op.name, device, dtype, direction)) is not None:
                row = dict(zip(rows.KEY, (op.name, backend.name, str(dtype).removeprefix("torch."), "-", direction)))
                found.append({"stage": "grid", **row, "status": rows.GAP, "message": why})
    return found


def _why_not_timed(case: Case, backend: backends.Backend, device: str) -> str | None:
    directions = dict.fromkeys(("forward", case.direction))
    return next(filter(None, (backend.gap(case.op, device, case.torch_dtype, d) for d in directions)), None)


def _versions(device: str) -> dict:
    """What the kernels were compiled with, and for what."""
    found = {"triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None}
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found
