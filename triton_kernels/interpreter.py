"""Repairs to Triton's interpreter, for TRITON_INTERPRET=1 alone: kernels on CPU tensors, one program after another.

Triton 3.6 turns a loop bound into an int in a way that NumPy 2.4 refuses, goes through scans and reductions one
element at a time, which takes seconds per tile, and prepares triton.language anew at every call of a function by a
kernel, a third of the time. None of this changes what a kernel computes.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter


def _combine(self, operands, left, right):
    """``combine_fn`` of two lists of arrays."""
    both = [self.to_tensor(a, x.dtype) for arrays in (left, right) for a, x in zip(arrays, operands)]
    result = self.combine_fn.fn(*both)
    return [x.handle.data for x in (result if isinstance(result, tuple) else (result,))]


def _scan(self, operands):
    """A generic scan in steps of doubling length, the whole tile at a time: a tile must keep its size."""
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in operands]
    step = 1
    while step < len(arrays[0]):
        joined = _combine(self, operands, [np.roll(a, step, 0) for a in arrays], arrays)
        arrays = [np.concatenate([a[:step], j[step:]]) for a, j in zip(arrays, joined)]
        step *= 2
    return [self.to_tensor(np.moveaxis(a, 0, self.axis), x.dtype) for a, x in zip(arrays, operands)]


def _reduce(self, operands):
    """A generic reduction by halves (lengths are powers of two), neighbours first, so that order is kept."""
    operands, axis = self.unravel(operands, self.axis)
    arrays = [np.moveaxis(x.handle.data, axis, 0) for x in operands]
    while len(arrays[0]) > 1:
        arrays = _combine(self, operands, [a[0::2] for a in arrays], [a[1::2] for a in arrays])
    results = [a[0] for a in arrays]
    if self.keep_dims:
        results = [np.expand_dims(r, axis) for r in results]
    return [self.to_tensor(r, x.dtype) for r, x in zip(results, operands)]


_prepared = set()


def _call(self, *args, **kwargs):
    """A call by a kernel. What the function sees of triton.language stays prepared, or is by the launch."""
    if self.fn not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def repair() -> None:
    """Apply the repairs; once per process."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.ScanOps.generic_scan = _scan
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.InterpretedFunction.__call__ = _call
