"""Repairs to Triton's interpreter, for TRITON_INTERPRET=1 alone: kernels on CPU tensors, one program after another.

Triton 3.6 turns a loop bound into an int in a way that NumPy 2.4 refuses, goes through scans and reductions one element
at a time, which takes seconds per tile, and prepares its language again at every call of a function, which takes a
millisecond. None of that changes what a kernel computes. Matrix products it leaves to NumPy, where the rounding depends
on how the summed axis is cut into blocks; on a GPU it does not, and kernels that compute a score twice count on that.
"""

from __future__ import annotations

import functools

import numpy as np
import triton.language as tl
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


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """acc + a @ b, product after product along the summed axis, as the compiled kernel adds them."""
    left, right = (x.data.astype(d.data.dtype, copy=False) for x in (a, b))
    terms = np.empty((1 + len(right), *d.data.shape), d.data.dtype)  # summed axis outermost: no pairwise sums
    terms[0] = d.data
    np.multiply(left.T[:, :, None], right[:, None, :], out=terms[1:])
    return interpreter.TensorHandle(np.add.reduce(terms, 0), d.dtype.scalar)


@functools.cache
def _languages(function) -> frozenset[int]:
    """The modules that the interpreter prepares for ``function``."""
    return frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)


def _prepare_once() -> None:
    """Prepare the language once per launch and module; what a launch has prepared it undoes itself."""
    prepare, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def prepare_missing(function):
        if _languages(function) <= prepared:
            return None
        prepared.update(_languages(function))
        return prepare(function)

    def run_afresh(self, *args, **kwargs):
        prepared.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_missing, run_afresh


def repair() -> None:
    """Apply the repairs; once per process."""
    _prepare_once()
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.ScanOps.generic_scan = _scan
    interpreter.ReduceOps.generic_reduce = _reduce
