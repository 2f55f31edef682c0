"""slot_write: tokens write into slots by explicit weights, the erase and add of the Neural Turing Machine.

    v_i <- v_i * (1 - a[t, i] * e_t) + a[t, i] * w_t              for t = 1 .. T, one after the other

Sources: Graves et al. 2014, Neural Turing Machines (erase and add); Graves et al. 2016, Hybrid computing using a neural
network with dynamic external memory.
"""

from __future__ import annotations

from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype
from ._write import check_in_place, erase_options, fold, write_tokens


def reference(
    values: Tensor,
    weights: Tensor,
    write: Tensor,
    erase: Tensor | None,
    token_mask: Tensor | None,
    erase_scale: float,
):
    exact = stats_dtype(weights.dtype)
    erase = None if erase is None else erase.to(exact)
    a, w, e, _ = fold(values.shape[:-2], token_mask, weights.to(exact), write.to(exact), erase)
    return (write_tokens(values, a, w, e, erase_scale).to(values.dtype),)


OP = register(
    Op(
        name="slot_write",
        args=(
            Arg("values", "N V", "memory", "content"),
            Arg("weights", "T N", "tokens", "lead", fill="uniform"),
            Arg("write", "T V", "tokens", "content"),
            Arg("erase", "T V", "tokens", "content", optional=True),
            Arg("token_mask", "T", "tokens", "bool", optional=True, hides=True),
        ),
        params=(("erase_scale", "float"),),
        outputs=(Out("values", "N V", lead="memory", dtype="values"),),
        reference=reference,
        flops=lambda s: 4 * s["T"] * s["N"] * s["V"],
        backward_flops=lambda s: 12 * s["T"] * s["N"] * s["V"],  # forward again, d_weights, d_write, d_erase, d_values
        inplace="values",
        equation="v_i <- v_i (1 - a[t, i] e_t) + a[t, i] w_t, t = 1..T in order",
    )
)


def slot_write(
    values: Tensor,
    weights: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Write T tokens into a memory by explicit weights ``a``, exactly as if one after the other.

    ``v_i <- v_i * (1 - a[t, i] * e_t) + a[t, i] * w_t`` for t = 1 .. T.

    Args:
        values: ``[..., N, V]``, the memory: dtype of ``weights``, or float32 beside 16-bit weights. It is not modified.
        weights: ``a``, ``[..., T, N]``, float32, bfloat16, float16 or float64. Meant to be in [0, 1]; outside, the
            result may grow without bound.
        write: ``[..., T, V]``, dtype of ``values``.
        erase: 1.0 interpolates (``v + a (w - v)``), 0.0 adds (``v + a w``), a tensor ``[..., T, V]`` in the dtype of
            ``values`` is the erase vector of the Neural Turing Machine.
        token_mask: bool ``[..., T]``; a token at False writes nothing.
        backend: as in :func:`softmax_read`.

    Returns:
        the new values ``[..., N, V]`` in the dtype of ``values``, with the leading dimensions of ``values``; tokens of
        a leading dimension that the memory does not have are written in row-major order. Differentiable in every float
        argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Graves et al. 2014, Neural Turing Machines.
    """
    tensors, params = _arguments("slot_write", values, weights, write, erase, token_mask)
    return call(OP, tensors, params, backend)


def slot_write_(
    values: Tensor,
    weights: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`slot_write` into ``values`` itself, for inference. Returns ``values``, the same object.

    Raises:
        RuntimeError: a gradient is required, or ``values`` overlap themselves. ValueError, TypeError: a shape, dtype or
            device does not fit. NotImplementedError: the named backend cannot run the call.
    """
    tensors, params = _arguments("slot_write_", values, weights, write, erase, token_mask)
    check_in_place("slot_write_", tensors, values)
    call(OP, tensors, params, backend, inplace=True)
    return values


def _arguments(op, values, weights, write, erase, token_mask):
    vector, amount = erase_options(op, erase, values, write)
    return [values, weights, write, vector, token_mask], (amount,)
