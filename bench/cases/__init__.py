"""The cases, one module per op. Every CPU row of the goals is one or more of them; some stand without a goal."""

from __future__ import annotations

import importlib
import pkgutil

from ..case import Case


def all_cases() -> list[Case]:
    """Every case of every module here, in the order of the module names."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [case for name in modules for case in importlib.import_module(f"{__name__}.{name}").CASES]


def select(ops: list[str], device: str = "cpu") -> list[Case]:
    """The cases of ``ops`` (all when empty) for ``device``. ValueError names an op that has none."""
    cases = [case for case in all_cases() if device in case.devices]
    known = dict.fromkeys(case.op for case in cases)
    for op in ops:
        if op not in known:
            raise ValueError(f"no case of {op!r} on {device}; there are cases of {', '.join(known) or 'nothing'}")
    return [case for case in cases if not ops or case.op in ops]
