"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators: the cost that each op declares."""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys

import torch

from . import spec
from .spec import Op

COUNTER = "torch.utils.flop_counter"
_operators: list[tuple[Op, str, str]] = []  # (op, namespace, suffix) of every operator


def count_operator(op: Op, namespace: str, suffix: str) -> None:
    """Count the operator ``<op><suffix>`` of ``namespace``."""
    if (op.backward_flops if suffix == "_backward" else op.flops) is None:
        return
    _operators.append((op, namespace, suffix))
    if COUNTER in sys.modules:
        _register(op, namespace, suffix)


def _register(op: Op, namespace: str, suffix: str) -> None:
    n = len(op.args)
    backward = suffix == "_backward"
    cost = op.backward_flops if backward else op.flops
    assert cost is not None

    def count(*inputs, out_val=None, **kwargs) -> int:
        inputs = inputs[:-1] if backward else inputs  # without the list of wanted gradients
        layout = spec.check(op, inputs[:n], inputs[len(inputs) - len(op.params) :])
        return cost(layout.axes) * math.prod(layout.lead)

    packet = getattr(getattr(torch.ops, namespace), op.name + suffix)
    sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(count)


class _Late(importlib.abc.MetaPathFinder):
    """Registers the costs when the counter is imported: importing it here would double the import time."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        assert found is not None and found.loader is not None
        execute = found.loader.exec_module

        def exec_module(module):
            execute(module)
            for operator in _operators:
                _register(*operator)

        found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Late())
