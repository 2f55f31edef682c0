"""Calls of the Triton backend that between them launch every kernel: the examples in the files of the ops.

On the ``meta`` device nothing is computed: ``bench.compile`` compiles what would be launched. ``bench.tune`` runs the
same calls on a GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels import _triton
from memkernels.registration import OPS
from memkernels.spec import Op, several


def plain(operator: str) -> Callable:
    """The launcher of one operator of the backend, which notes what it would launch."""
    return getattr(_triton.kernels().file(operator), operator)


@functools.cache
def replayed(operator: str) -> Callable:
    """The same as the dispatcher calls it."""
    return _triton.kernels().launcher(operator)


@dataclass(frozen=True)
class Launch:
    """One call, forward and backward. main, heavy: as ``triton_kernels/declare.py`` has them."""

    name: str
    run: Callable[[], object]
    main: bool
    heavy: bool


def launches(dtype: torch.dtype, width: int, device: str) -> Iterator[Launch]:
    """All calls for rows of ``width`` columns of ``dtype``, main ones first; those on ``meta`` run in a
    ``replay.Recording``."""
    package, launcher = _triton.kernels(), plain if device == "meta" else replayed
    files = dict.fromkeys(map(package.file, package.operators()))
    inputs = importlib.import_module(f"{package.__name__}.declare").Inputs(dtype, width, device)
    found = [one for file in files for one in file.examples(inputs)]
    for one in sorted(found, key=lambda one: not one.main):
        yield Launch(one.name, functools.partial(_run, launcher, one), one.main, one.heavy)


def _run(launcher: Callable, one) -> None:
    """An example, forward and backward."""
    op = OPS[one.operator]
    tensors, params = one.arguments[: len(op.args)], one.arguments[len(op.args) :]
    outputs = several(launcher(op.name)(*one.arguments))
    backward = f"{op.name}_backward"
    if one.gradients != () and backward in _triton.kernels().operators():
        wants = [True for arg in op.args if arg.is_float]
        launcher(backward)(*backward_tensors(op, tensors, outputs, one.gradients), *params, wants)


def backward_tensors(
    op: Op, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], given: Container[str] | None
) -> list[Tensor | None]:
    """The tensors of a backward operator: the forward one's, what it saves of its results, and gradients of those
    ``given`` (None: of all that have one), for which the results themselves stand."""
    saved = [x for name in op.saved for out, x in zip(op.outputs, outputs) if out.name == name]
    both = [(out, x) for out, x in zip(op.outputs, outputs) if out.grad]
    return [*tensors, *saved, *(x if given is None or out.name in given else None for out, x in both)]
