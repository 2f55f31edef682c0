"""The peers: other ways to compute what an op computes. One file each.

A peer module has ``NAME``, ``DIRECTIONS`` (which of forward and backward it has), ``QUICK`` (False: left out of quick
runs, because preparing it takes long), ``DEVICES`` where it is not for all, ``HEADS`` (False: its functions take no
leading dimensions), and for every op it knows a function of the
op's name. That function takes the op's tensor arguments and options by name, prepares what may be prepared (an index, a
view), and returns the call to time. An import that fails is the reason why the peer is missing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from ..case import Case


def peers_of(case: Case, quick: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """Functions by peer name, and the reasons of the peers that cannot be imported."""
    found, missing = {}, {}
    if case.in_place:
        return found, missing
    for name in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        try:
            module = importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:
            missing[name] = str(error)
            continue
        function = getattr(module, case.op, None)
        if not set(case.devices) <= set(getattr(module, "DEVICES", case.devices)):
            continue
        if "H" in case.sizes and not getattr(module, "HEADS", True):
            continue
        if function is not None and case.direction in module.DIRECTIONS and (module.QUICK or not quick):
            found[module.NAME] = function
    return found, missing
