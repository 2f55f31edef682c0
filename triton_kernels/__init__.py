"""Triton kernels of memkernels: every hot-path op on any GPU that Triton serves.

Installed as ``memkernels.triton_kernels``; imports nothing of memkernels. :func:`register` adds the kernels to the
operators ``memkernels_triton::<op>``, ``<op>_backward`` and ``<op>_``, whose schemas memkernels defines. Triton itself,
and the file of an op, are imported at the first call of that op.

One file per op: the kernels, then their launchers, each marked as an operator, then examples of calls (``declare.py``);
dense writes share their kernels in ``write.py`` and the files it names. ``tiles.py`` and ``score_gradients.py`` hold
what kernels share, ``layout.py`` and ``launch.py`` what launchers share, ``configs.json`` the launch configurations.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import torch

_MARKED = re.compile(r"^@operator\ndef (\w+)\(", re.MULTILINE)


@functools.cache
def operators() -> dict[str, str]:
    """Operator -> the file of its launcher, which has its name (``gated_write_`` writes in place).

    Read off the text of the files, which takes a few milliseconds; importing them would import Triton. Triton itself
    compiles a kernel from its text, so wherever kernels run there is one.
    """
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {name: file.stem for file in files for name in _MARKED.findall(file.read_text(encoding="utf-8"))}


def register(device: str) -> torch.library.Library:
    """Add the kernels to the operators on ``"cuda"``, or on ``"cpu"`` for Triton's interpreter.

    The caller keeps the result alive: kernels leave with it.
    """
    library = torch.library.Library("memkernels_triton", "IMPL")
    for name in operators():
        library.impl(name, _at_first_call(name), device.upper())
    return library


def file(operator: str):
    """The module that holds the launcher of ``operator``."""
    return importlib.import_module(f"{__name__}.{operators()[operator]}")


def launcher(operator: str):
    """The launcher of ``operator``, replayed (``replay.py``)."""
    from . import launch, replay

    return replay.Launcher(getattr(file(operator), operator), launch.architecture)


def _at_first_call(operator: str):
    """The launcher of ``operator``, found at the first call."""
    found = []

    def run(*arguments):
        if not found:
            found.append(launcher(operator))
        return found[0](*arguments)

    return run
