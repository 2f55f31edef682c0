"""sparse_read: a weighted sum of a few slots per token.

    r_t = sum_j weights[t, j] * values[indices[t, j]]          (index -1 is ignored, duplicates all count)

Sources: Rae et al. 2016, Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes; Lample et al. 2019,
Large Memory Layers with Product Keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import known
from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype
from ._compressed import choose, compressed
from ._sparse_gradient import read_sparse, wants_sparse


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices], and 0 where the index is -1; leading dimensions broadcast. [..., N, D] -> [..., T, k, D]."""
    lead = torch.broadcast_shapes(rows.shape[:-2], indices.shape[:-2])
    rows, indices = rows.expand(*lead, *rows.shape[-2:]), indices.expand(*lead, *indices.shape[-2:])
    if known(rows.shape[-2] == 0):
        return rows.new_zeros(*indices.shape, rows.shape[-1])
    flat = indices.masked_fill(indices == -1, 0).flatten(-2).unsqueeze(-1).expand(*lead, -1, rows.shape[-1])
    picked = torch.gather(rows, -2, flat).unflatten(-2, indices.shape[-2:])
    return picked.masked_fill((indices == -1).unsqueeze(-1), 0)


def reference(values: Tensor, indices: Tensor, weights: Tensor):
    exact = stats_dtype(weights.dtype)
    used = weights.to(exact).masked_fill(indices < 0, 0)
    read = torch.einsum("...tk,...tkv->...tv", used, gather_rows(values.to(exact), indices))
    return (read.to(weights.dtype),)


OP = register(
    Op(
        name="sparse_read",
        args=(
            Arg("values", "N V", "memory", "content"),
            Arg("indices", "T k", "tokens", "index"),
            Arg("weights", "T k", "tokens", "lead"),
        ),
        outputs=(Out("read", "T V"),),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["k"] * s["V"],
        backward_flops=lambda s: 4 * s["T"] * s["k"] * s["V"],  # d_weights, d_values
        over_slots="rows",
        equation="r_t = sum_j weights[t, j] values[indices[t, j]]",
    )
)
COMPRESSED = register(compressed(OP, values="value_scale"))


def sparse_read(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    value_scale: Tensor | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of the slots that each token names.

    ``r_t = sum_j weights[t, j] * values[indices[t, j]]``

    Args:
        values: ``[..., N, V]``, dtype of ``weights``, or float32 beside 16-bit weights, or int8 or float8_e4m3fn with
            ``value_scale``.
        indices: int64 or int32 ``[..., T, k]`` in ``[-1, N)``; -1 is ignored, duplicates all count.
        weights: ``[..., T, k]``, float32, bfloat16, float16 or float64.
        value_scale, backend: as in :func:`softmax_read`.
        sparse_grad: the gradient of ``values [N, V]`` is a sparse tensor, as in :func:`gather_rows`.

    Returns:
        read ``[..., T, V]`` in the dtype of ``weights``. Differentiable in values and weights; the gradient of values
        sums each touched row in token order, so it is the same bits on every run.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. RuntimeError: an index outside ``[-1, N)``.
            NotImplementedError: the named backend cannot run the call.

    Source: Rae et al. 2016, Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes.
    """
    op, tensors = choose(OP, COMPRESSED, [values, indices, weights], value_scale)
    if wants_sparse("sparse_read", sparse_grad, values):
        return read_sparse(op, tensors, (), backend)
    return call(op, tensors, (), backend)
