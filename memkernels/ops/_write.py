"""Shared by the writes: the recurrence, the options, and the check of what may be written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call
from ..spec import Op, shaped, stats_dtype
from ._folds import fold_tokens
from ._formula import stretch
from ._options import fraction, scaled, single, stays_tensor


def fold(memory: tuple[int, ...], token_mask: Tensor | None, *tensors: Tensor | None):
    """Fold token tensors ``[..., T, D]`` over the dimensions that share a memory; masked tokens become 0.

    Returns ``[*tensors, silent]`` with silent ``[..., T', 1]``, True where the mask is False: the token writes nothing.
    """
    leads = [t.shape[:-2] for t in tensors if t is not None]
    leads += [] if token_mask is None else [token_mask.shape[:-1]]
    lead = torch.broadcast_shapes(memory, *leads)
    folded = [None if t is None else fold_tokens(t, memory, lead, tail=1) for t in tensors]
    if token_mask is None:
        return [*folded, None]
    silent = ~fold_tokens(token_mask, memory, lead, tail=0).unsqueeze(-1)
    return [*(None if t is None else t.masked_fill(silent, 0) for t in folded), silent]


def write_tokens(values: Tensor, a: Tensor, write: Tensor, erase: Tensor | None, erase_scale: float) -> Tensor:
    """v_i <- v_i * (1 - a[t, i] * e_t) + a[t, i] * w_t for t = 1 .. T, in the dtype of ``a``.

    values: ``[..., N, V]``, a: ``[..., T, N]``, write and erase: ``[..., T, V]``.
    """
    lead = torch.broadcast_shapes(values.shape[:-2], a.shape[:-2])
    v = values.to(a.dtype).expand(*lead, *values.shape[-2:]).clone()  # never an alias of values, not even for T = 0
    for t in range(a.shape[-2]):
        gate = a[..., t, :].unsqueeze(-1)
        e_t = erase_scale if erase is None else erase[..., t, :].unsqueeze(-2)
        v = v * (1 - gate * e_t) + gate * write[..., t, :].unsqueeze(-2)
    return v


def write_scores(values, keys, query, write, erase, slot_mask, token_mask, erase_scale, gates_of):
    """A write by gates made from scores, ``gates_of(query, keys, slot_mask)``. Returns new values and retained."""
    exact = stats_dtype(query.dtype)
    mask_lead = () if slot_mask is None else slot_mask.shape[:-1]
    memory = torch.broadcast_shapes(values.shape[:-2], keys.shape[:-2], mask_lead)
    erase = None if erase is None else erase.to(exact)
    q, w, e, silent = fold(memory, token_mask, query.to(exact), write.to(exact), erase)
    a = gates_of(q, keys, slot_mask)
    if silent is not None:
        a = a.masked_fill(silent, 0)
    a = a.expand(*memory, *a.shape[-2:])
    return write_tokens(values, a, w, e, erase_scale).to(values.dtype), torch.prod(1 - a, dim=-2)


def write_by_scores(op: Op, name: str, tensors, scale: float | Tensor | None, backend: str | None):
    """Call ``name``, a write by gates made from scores; in place where the name ends with an underscore.

    tensors: values, keys, query, write, erase (or a number), slot_mask, token_mask.
    Returns the new values and retained.
    """
    values, keys, query, write, erase, slot_mask, token_mask = tensors
    vector, amount = erase_options(name, erase, values, write)
    given = [values, keys, query, write, vector, stretch(slot_mask, keys), token_mask]
    given, factor = scaled(op, given, scale, name)
    if not name.endswith("_"):
        return call(op, given, (factor, amount), backend)
    check_in_place(name, given, values, (("keys", keys, 2), ("slot_mask", slot_mask, 1)))
    return values, call(op, given, (factor, amount), backend, inplace=True)


ERASE = "a number or a tensor [..., T, V]"


def erase_options(op: str, erase: float | Tensor, values: Tensor, write: Tensor) -> tuple[Tensor | None, float]:
    """``erase`` as a vector or None, and as the number that holds where there is no vector.

    A tensor without dimensions whose number must not be read (:func:`stays_tensor`) is expanded to a vector.
    """
    if isinstance(erase, Tensor) and (erase.is_nested or erase.dim()):
        return erase, 1.0
    if not stays_tensor(erase):
        return None, fraction(op, "erase", erase, ERASE)
    if shaped(values, write) and write.dim() > 1:
        erase = single(op, "erase", erase, values, values.dtype, ERASE).expand(write.shape[-2:])
    return erase, 1.0  # if nothing could be expanded, the check of the call raises


def check_in_place(op: str, tensors, values: Tensor, others: tuple[tuple[str, Tensor | None, int], ...] = ()) -> None:
    """Refuse to write ``values`` in place where a gradient is required or they lack leading dimensions.

    others: (name, tensor, number of trailing axes) of the other tensors of the memory.
    """
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: no argument may require a gradient, got one; use {op[:-1]}, or torch.no_grad()")
    for name, other, tail in others:
        if other is not None and shaped(other, values):
            lead, own = other.shape[: max(other.dim() - tail, 0)], values.shape[: max(values.dim() - 2, 0)]
            if len(lead) > len(own) or any(a not in (1, b) for a, b in zip(reversed(lead), reversed(own))):
                raise ValueError(
                    f"{op}: values must have the leading dimensions of {name}, {list(lead)}, got {list(own)}"
                )
