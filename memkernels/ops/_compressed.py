"""Compressed slots: keys and values of a read in 8 bits, each row with a scale.

    k_i = key_scale_i * keys_i,      v_i = value_scale_i * values_i

An op that reads slots has a twin that reads compressed ones. :func:`compressed` derives its declaration from that of
the op. The reference of the twin multiplies each row by its scale and calls the reference of the op; a kernel
multiplies as it loads a row. The query is not compressed. Compressed slots are constants: only the query and a float
mask have gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spec import COMPRESSED, Arg, Op, stats_dtype

_EIGHT_BITS = frozenset(COMPRESSED)
_places: dict[str, list[int]] = {}  # name of a twin -> positions of the arguments that may be compressed


def compressed(op: Op, **scales: str) -> Op:
    """The twin of ``op`` over compressed slots. ``scales``: compressed argument -> name of its scale."""
    args = [replace(a, dtype="slots") if a.name in scales else a for a in op.args]
    slots = {a.name: a.axes.rsplit(maxsplit=1)[0] for a in op.args if a.name in scales}
    args += [Arg(scale, slots[name], "memory", "scale", optional=True, of=name) for name, scale in scales.items()]
    lead = next(i for i, a in enumerate(op.args) if a.dtype == "lead")
    rows = [(op.index(name), len(op.args) + i) for i, name in enumerate(scales)]
    twin = f"{op.name}_compressed"
    _places[twin] = [place for place, _ in rows]

    def over_floats(function: Any) -> Any:
        """``function``, which takes the arguments of ``op``, as a function of those of the twin."""
        return function and (lambda *inputs: function(*multiplied_out(inputs)))

    def multiplied_out(inputs) -> list:
        exact = stats_dtype(inputs[lead].dtype)
        inputs = list(inputs)
        for at, scale in rows:
            if inputs[scale] is not None:
                inputs[at] = inputs[at].to(exact) * inputs[scale].to(exact).unsqueeze(-1)
        return [*inputs[: len(op.args)], *inputs[len(args) :]]

    return replace(
        op,
        name=twin,
        args=tuple(args),
        outputs=tuple(replace(out, judge=over_floats(out.judge)) for out in op.outputs),
        reference=over_floats(op.reference),
        selected=over_floats(op.selected),
        autocast=tuple(name for name in op.autocast if name not in scales),
        twin_of=op.name,
    )


def choose(op: Op, twin: Op, tensors: list[Tensor | None], *scales: Tensor | None) -> tuple[Op, list]:
    """The op that a call needs, ``op`` or its twin, with its tensors. ``scales``: of the arguments that may be
    compressed, in their order."""
    places = _places[twin.name]
    for place, scale in zip(places, scales):  # a loop: any() would take a tenth of a small call
        if scale is not None or getattr(tensors[place], "dtype", None) in _EIGHT_BITS:
            break
    else:
        return op, tensors
    slots = [tensors[place] for place in places]
    for place, scale, x, arg in zip(places, scales, slots, twin.args[len(op.args) :]):
        name = op.args[place].name
        if isinstance(x, Tensor) and (x.dtype in COMPRESSED) != (scale is not None):
            wanted = "must be a tensor, got None" if scale is None else "is for int8 and float8_e4m3fn, got one"
            raise TypeError(f"{op.name}: {arg.name} {wanted} beside {name} in {str(x.dtype).removeprefix('torch.')}")
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(f"{op.name}: {name} must not require a gradient beside compressed slots, got one")
    return twin, [*tensors, *scales]
