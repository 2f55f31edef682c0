"""sparse_write: tokens write into the few slots that they name.

    v_i <- v_i * (1 - a * e_t) + a * w_t,   i = indices[t, j], a = weights[t, j],   for t = 1 .. T, j = 1 .. k, in order

Sources: Rae et al. 2016, Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes; Graves et al. 2014,
Neural Turing Machines (erase and add).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype
from ._write import check_in_place, erase_options, fold


def reference(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    write: Tensor,
    erase: Tensor | None,
    token_mask: Tensor | None,
    erase_scale: float,
):
    exact = stats_dtype(weights.dtype)
    memory = values.shape[:-2]
    erase = None if erase is None else erase.to(exact)
    index, a, w, e, silent = fold(memory, token_mask, indices, weights.to(exact), write.to(exact), erase)
    if silent is not None:
        index = index.masked_fill(silent, -1)
    v = values.to(exact).clone()
    if known(v.shape[-2] == 0) and bool((index == -1).all()):
        return (v.to(values.dtype),)
    for t in range(index.shape[-2]):
        e_t = erase_scale if e is None else e[..., t, None, :]
        for j in range(index.shape[-1]):
            named = index[..., t, j, None, None]
            at = named.masked_fill(named == -1, 0).expand(*memory, 1, v.shape[-1])
            gate = a[..., t, j, None, None]
            old = torch.gather(v, -2, at)
            new = old * (1 - gate * e_t) + gate * w[..., t, None, :]
            v = v.scatter(-2, at, torch.where(named == -1, old, new))
    return (v.to(values.dtype),)


OP = register(
    Op(
        name="sparse_write",
        args=(
            Arg("values", "N V", "memory", "content"),
            Arg("indices", "T k", "tokens", "index"),
            Arg("weights", "T k", "tokens", "lead", fill="uniform"),
            Arg("write", "T V", "tokens", "content"),
            Arg("erase", "T V", "tokens", "content", optional=True),
            Arg("token_mask", "T", "tokens", "bool", optional=True, hides=True),
        ),
        params=(("erase_scale", "float"),),
        outputs=(Out("values", "N V", lead="memory", dtype="values"),),
        reference=reference,
        flops=lambda s: 4 * s["T"] * s["k"] * s["V"],
        backward_flops=lambda s: 12 * s["T"] * s["k"] * s["V"],  # forward again, d_weights, d_write, d_erase, d_values
        inplace="values",
        over_slots="rows",
        equation="v_i <- v_i (1 - a e_t) + a w_t, i = indices[t, j], a = weights[t, j], in order",
    )
)


def sparse_write(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Write T tokens into the slots that each of them names, exactly as if one after the other.

    ``v_i <- v_i * (1 - a * e_t) + a * w_t`` with ``i = indices[t, j]``, ``a = weights[t, j]``, for t = 1 .. T and
    j = 1 .. k.

    Args:
        values: ``[..., N, V]``, the memory: dtype of ``weights``, or float32 beside 16-bit weights. It is not modified.
        indices: int64 or int32 ``[..., T, k]`` in ``[-1, N)``; -1 is ignored, duplicates are applied in order.
        weights: ``a``, ``[..., T, k]``, float32, bfloat16, float16 or float64. write: ``[..., T, V]``, dtype of
            ``values``.
        erase: 1.0 interpolates (``v + a (w - v)``), 0.0 adds (``v + a w``), a tensor ``[..., T, V]`` in the dtype of
            ``values`` is the erase vector of the Neural Turing Machine.
        token_mask: bool ``[..., T]``; a token at False writes nothing. Its indices are checked all the same.
        backend: as in :func:`softmax_read`.

    Returns:
        the new values ``[..., N, V]`` in the dtype of ``values``: a copy. :func:`sparse_write_` makes none, and costs
        the same for any N. Tokens of a leading dimension that the memory does not have are written in row-major order.
        Differentiable in every float argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. RuntimeError: an index outside ``[-1, N)``.
            NotImplementedError: the named backend cannot run the call.

    Source: Rae et al. 2016, Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes.
    """
    tensors, params = _arguments("sparse_write", values, indices, weights, write, erase, token_mask)
    return call(OP, tensors, params, backend)


def sparse_write_(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`sparse_write` into ``values`` itself, for inference: only the rows that are named are touched.

    Returns ``values``, the same object.

    Raises:
        RuntimeError: a gradient is required, ``values`` overlap themselves, or an index is outside ``[-1, N)``.
            ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.
    """
    tensors, params = _arguments("sparse_write_", values, indices, weights, write, erase, token_mask)
    check_in_place("sparse_write_", tensors, values)
    call(OP, tensors, params, backend, inplace=True)
    return values


def _arguments(op, values, indices, weights, write, erase, token_mask):
    vector, amount = erase_options(op, erase, values, write)
    return [values, indices, weights, write, vector, token_mask], (amount,)
