"""Repairs to Triton's interpreter, for TRITON_INTERPRET=1 alone: kernels on CPU tensors, one program after another.

Triton 3.6 turns a loop bound into an int in a way that NumPy 2.4 refuses, and goes through scans and reductions one
element at a time, which takes seconds per tile. Neither changes what a kernel computes.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter


def _scan(self, operands):
    """A generic scan that combines whole slices along the axis."""
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in operands]
    results = [np.empty_like(a) for a in arrays]
    state = None
    for i in range(arrays[0].shape[0]):
        here = tuple(self.to_tensor(a[i].copy(), x.dtype) for a, x in zip(arrays, operands))
        state = here if state is None else self.combine_fn.fn(*state, *here)
        state = state if isinstance(state, tuple) else (state,)
        for result, value in zip(results, state):
            result[i] = value.handle.data
    return [self.to_tensor(np.moveaxis(r, 0, self.axis), x.dtype) for r, x in zip(results, operands)]


def _reduce(self, operands):
    """A generic reduction that combines whole slices along the axis."""
    operands, axis = self.unravel(operands, self.axis)
    arrays = [np.moveaxis(x.handle.data, axis, 0) for x in operands]
    state = None
    for i in range(arrays[0].shape[0]):
        here = tuple(self.to_tensor(a[i].copy(), x.dtype) for a, x in zip(arrays, operands))
        state = here if state is None else self.combine_fn.fn(*state, *here)
        state = state if isinstance(state, tuple) else (state,)
    results = [x.handle.data for x in state]
    if self.keep_dims:
        results = [np.expand_dims(r, axis) for r in results]
    return [self.to_tensor(r, x.dtype) for r, x in zip(results, operands)]


def repair() -> None:
    """Apply the repairs; once per process."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.ScanOps.generic_scan = _scan
    interpreter.ReduceOps.generic_reduce = _reduce
