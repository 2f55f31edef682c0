"""memory_scan: every token writes into the memory and reads what it then holds, the layer of a streaming model.

    a[t, i] = sigmoid(scale * <write_query_t, key_i> + slot_mask_i)
    p[t, i] = softmax_i(scale * <read_query_t, key_i> + slot_mask_i)
    v_i    <- v_i * (1 - a[t, i]) + a[t, i] * w_t,   then   r_t = sum_i p[t, i] v_i        for t = 1 .. T

Sources: Graves et al. 2014, Neural Turing Machines (a memory written and read at every step); Zhang et al. 2024, Gated
Slot Attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registration import call, register
from ..spec import LSE_REST, Arg, Op, Out, stats_dtype
from ._folds import unfold_tokens
from ._formula import inert, scores, softmax, stretch
from ._options import scaled
from ._write import fold, write_tokens


def reference(
    values: Tensor,
    keys: Tensor,
    read_query: Tensor,
    write_query: Tensor,
    write: Tensor,
    slot_mask: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    read_first: bool,
):
    exact = stats_dtype(read_query.dtype)
    mask_lead = () if slot_mask is None else slot_mask.shape[:-1]
    memory = torch.broadcast_shapes(values.shape[:-2], keys.shape[:-2], mask_lead)
    tensors = [x.to(exact) for x in (read_query, write_query, write)]
    reader, writer, w, silent = fold(memory, token_mask, *tensors)
    a = torch.sigmoid(scores(writer, keys, slot_mask, scale))
    p, lse, rest = softmax(scores(reader, keys, slot_mask, scale))
    if silent is not None:
        a, p, mute = a.masked_fill(silent, 0), p.masked_fill(silent, 0), silent.squeeze(-1)
        lse, rest = lse.masked_fill(mute, -torch.inf), rest.masked_fill(mute, 0)
    v = values.to(exact).expand(*memory, *values.shape[-2:])
    reads = []
    for t in range(a.shape[-2]):
        before, at = v, slice(t, t + 1)
        v = write_tokens(v, a[..., at, :], w[..., at, :], None, 1.0)
        reads.append(p[..., at, :] @ inert(before if read_first else v, slot_mask))
    new = v.to(values.dtype)
    r = torch.cat(reads, -2) if reads else v[..., :0, :]
    mask = () if token_mask is None else (token_mask.shape[:-1],)
    lead = torch.broadcast_shapes(memory, *(x.shape[:-2] for x in tensors), *mask)
    r = unfold_tokens(r, memory, lead, write.shape[-2]).to(read_query.dtype)
    both = torch.stack((lse, rest), -1).expand(*memory, lse.shape[-1], 2)
    lse, rest = unfold_tokens(both, memory, lead, write.shape[-2]).unbind(-1)
    return r.clone(), new.clone(), lse.clone(), rest.clone()


OP = register(
    Op(
        name="memory_scan",
        args=(
            Arg("values", "N V", "memory", "content"),
            Arg("keys", "N K", "memory"),
            Arg("read_query", "T K", "tokens", "lead"),
            Arg("write_query", "T K", "tokens"),
            Arg("write", "T V", "tokens", "content"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("token_mask", "T", "tokens", "bool", optional=True, hides=True),
        ),
        params=(("scale", "float"), ("read_first", "bool")),
        outputs=(
            Out("reads", "T V"),
            Out("values", "N V", lead="memory", dtype="values"),
            Out("lse", "T", dtype="stats", grad=False),  # of the read scores, for the backward pass
            LSE_REST,
        ),
        saved=("reads", "lse", "lse_rest"),
        reference=reference,
        # two scores, a write of two multiply-adds, a read of one
        flops=lambda s: 2 * s["T"] * s["N"] * (2 * s["K"] + 3 * s["V"]),
        # forward again, three for each gradient of a score, d_values, d_gates, d_write
        backward_flops=lambda s: 2 * s["T"] * s["N"] * (6 * s["K"] + 8 * s["V"]),
        autocast=("keys", "read_query", "write_query"),
        over_slots="whole",
        equation="v_i <- v_i (1 - a[t, i]) + a[t, i] w_t, r_t = sum_i p[t, i] v_i, t = 1..T in order",
    )
)


def memory_scan(
    values: Tensor,
    keys: Tensor,
    read_query: Tensor,
    write_query: Tensor,
    write: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    read_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """T tokens write into a memory and read it, each seeing what those before it wrote, and nothing of those after it.

    ``a[t, i] = sigmoid(scale * <write_query_t, key_i> + slot_mask_i)``; ``p[t, i]`` the softmax over i of
    ``scale * <read_query_t, key_i> + slot_mask_i``; for t = 1 .. T:
    ``v_i <- v_i * (1 - a[t, i]) + a[t, i] * w_t``, then ``r_t = sum_i p[t, i] v_i``. It is a :func:`gated_write` of one
    token and a :func:`softmax_read` of one, T times.

    Args:
        values: ``[..., N, V]``, the memory: dtype of the queries, or float32 beside 16-bit queries. It is not modified.
        keys: ``[..., N, K]``. read_query, write_query: ``[..., T, K]``, same dtype: float32, bfloat16, float16
            or float64.
        write: ``w``, ``[..., T, V]``, dtype of ``values``.
        scale: as in :func:`softmax_read`, of both queries.
        slot_mask: ``[..., N]``, bool or float; an empty slot (-inf) is neither written nor read.
        token_mask: bool ``[..., T]``; a token at False writes nothing and reads 0.
        read_first: a token reads before it writes.
        backend: as in :func:`softmax_read`.

    Returns:
        ``reads`` ``[..., T, V]`` in the dtype of the queries, and the new values ``[..., N, V]`` in the dtype of
        ``values``, with the leading dimensions of the memory (values, keys, slot_mask); tokens of a leading dimension
        that the memory does not have write and read in row-major order. Differentiable in every float argument, to any
        order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. NotImplementedError: the named backend cannot
            run the call.

    Source: Graves et al. 2014, Neural Turing Machines; Zhang et al. 2024, Gated Slot Attention.
    """
    if not isinstance(read_first, bool):
        raise TypeError(f"memory_scan: read_first must be a bool, got {type(read_first).__name__}")
    tensors = [values, keys, read_query, write_query, write, stretch(slot_mask, keys), token_mask]
    tensors, factor = scaled(OP, tensors, scale, "memory_scan")
    reads, new, *_ = call(OP, tensors, (factor, read_first), backend)
    return reads, new
