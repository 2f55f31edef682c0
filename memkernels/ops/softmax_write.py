"""softmax_write: every token moves the slots towards its write vector by weights that sum to one over the slots.

    a[t, i] = softmax_i(scale * <query_t, key_i> + slot_mask_i)
    v_i    <- v_i * (1 - a[t, i] * e_t) + a[t, i] * w_t              for t = 1 .. T, one after the other

Sources: Graves et al. 2014, Neural Turing Machines (content-based addressing, erase and add).
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..registration import register
from ..spec import Arg, Op, Out
from ._formula import scores, softmax
from ._write import write_by_scores, write_scores


def reference(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    erase: Tensor | None,
    slot_mask: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    erase_scale: float,
):
    def gates_of(q: Tensor, keys: Tensor, slot_mask: Tensor | None) -> Tensor:
        return softmax(scores(q, keys, slot_mask, scale))[0]

    return write_scores(values, keys, query, write, erase, slot_mask, token_mask, erase_scale, gates_of)


OP = register(
    Op(
        name="softmax_write",
        args=(
            Arg("values", "N V", "memory", "content"),
            Arg("keys", "N K", "memory"),
            Arg("query", "T K", "tokens", "lead"),
            Arg("write", "T V", "tokens", "content"),
            Arg("erase", "T V", "tokens", "content", optional=True),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("token_mask", "T", "tokens", "bool", optional=True, hides=True),
        ),
        params=(("scale", "float"), ("erase_scale", "float")),
        outputs=(
            Out("values", "N V", lead="memory", dtype="values"),
            Out("retained", "N", lead="memory", dtype="stats"),
        ),
        saved=("retained",),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * (2 * s["K"] + s["V"]),  # scores twice, for the sums and for the weights
        # scores twice, <d_values, write>, d_query, d_keys, d_write
        backward_flops=lambda s: 2 * s["T"] * s["N"] * (4 * s["K"] + 2 * s["V"]),
        autocast=("keys", "query"),
        inplace="values",
        over_slots="whole",
        equation="v_i <- v_i (1 - a[t, i] e_t) + a[t, i] w_t, a = softmax_i(scale q_t.k_i + mask_i), t = 1..T in order",
    )
)


@overload
def softmax_write(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def softmax_write(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def softmax_write(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def softmax_write(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Write T tokens into a memory by softmax weights over its slots, exactly as if one after the other.

    ``a[t, i] = softmax_i(scale * <query_t, key_i> + slot_mask_i)``;
    ``v_i <- v_i * (1 - a[t, i] * e_t) + a[t, i] * w_t`` for t = 1 .. T.

    Args:
        values: ``[..., N, V]``, the memory: dtype of ``query``, or float32 beside a 16-bit query. It is not modified.
        keys: ``[..., N, K]``. query: ``[..., T, K]``, same dtype: float32, bfloat16, float16 or float64.
        write: ``[..., T, V]``, dtype of ``values``.
        erase: 1.0 interpolates (``v + a (w - v)``), 0.0 adds (``v + a w``), a tensor ``[..., T, V]`` in the dtype of
            ``values`` is the erase vector of the Neural Turing Machine.
        scale: as in :func:`softmax_read`. slot_mask: ``[..., N]``, bool or float; an empty slot (-inf) is not written.
        token_mask: bool ``[..., T]``; a token at False writes nothing.
        return_retained: also return ``retained`` ``[..., N]``, ``prod_t (1 - a[t, i])`` over the tokens that write,
            whatever ``erase`` is; float32 (float64 for float64).
        backend: as in :func:`softmax_read`.

    Returns:
        the new values ``[..., N, V]`` in the dtype of ``values``, with ``return_retained`` also ``retained``. Leading
        dimensions are those of the memory (values, keys, slot_mask); tokens of a leading dimension that the memory does
        not have are written in row-major order. Differentiable in every float argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Graves et al. 2014, Neural Turing Machines.
    """
    tensors = (values, keys, query, write, erase, slot_mask, token_mask)
    new, retained = write_by_scores(OP, "softmax_write", tensors, scale, backend)
    return (new, retained) if return_retained else new


@overload
def softmax_write_(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def softmax_write_(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def softmax_write_(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def softmax_write_(
    values: Tensor,
    keys: Tensor,
    query: Tensor,
    write: Tensor,
    *,
    erase: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_retained: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`softmax_write` into ``values`` itself, for inference.

    Arguments as there; ``values`` must have all leading dimensions of the memory. Returns ``values`` (the same
    object), with ``return_retained`` also ``retained``.

    Raises:
        RuntimeError: a gradient is required, or ``values`` overlap themselves. ValueError, TypeError: a shape, dtype or
            device does not fit. NotImplementedError: the named backend cannot run the call.
    """
    tensors = (values, keys, query, write, erase, slot_mask, token_mask)
    new, retained = write_by_scores(OP, "softmax_write_", tensors, scale, backend)
    return (new, retained) if return_retained else new
