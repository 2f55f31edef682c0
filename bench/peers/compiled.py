"""torch.compile of the vectorised eager form. Only where it makes another program than torch's own fused operator."""

from __future__ import annotations

import functools

import torch

from . import eager

NAME = "torch.compile"
DIRECTIONS = ("forward", "backward")
QUICK = False  # compiling takes far longer than timing


@functools.cache  # also because naming torch.compile imports the compiler
def _compiled(function):
    return torch.compile(function, dynamic=False)


def gated_write(values, keys, query, write):
    return lambda: _compiled(eager.written)(values, keys, query, write)
