"""The cases, one module per op. Every CPU row of the goals is one or more of them; some stand without a goal."""

from __future__ import annotations

import importlib
import pkgutil

from ..case import Case


def all_cases(device: str = "cpu") -> list[Case]:
    """Every case for ``device`` of every module here, in the order of the module names."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__))
    cases = (case for name in modules for case in importlib.import_module(f"{__name__}.{name}").CASES)
    return [case for case in cases if device in case.devices]


def select(ops: list[str], device: str = "cpu") -> list[Case]:
    """The cases of ``ops`` (all when empty) for ``device``. ValueError names an op that has none."""
    cases = all_cases(device)
    known = dict.fromkeys(case.op for case in cases)
    for op in ops:
        if op not in known:
            raise ValueError(f"no case of {op!r} on {device}; there are cases of {', '.join(known) or 'nothing'}")
    return [case for case in cases if not ops or case.op in ops]
