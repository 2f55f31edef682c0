"""softmax_read: attention over the slots of a memory.

    s[t, i] = scale * <query_t, key_i> + slot_mask_i
    r_t     = sum_i softmax_i(s[t, i]) value_i,      lse_t = log sum_i exp(s[t, i])

over the slots first_t <= i < stop_t where the tokens have ranges.

Sources: Vaswani et al. 2017, Attention Is All You Need (scaled dot-product); Sukhbaatar et al. 2015, End-To-End Memory
Networks (reading a memory by softmax); Dao 2023, FlashAttention-2 (blocked evaluation with a running maximum).
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..registration import call, register
from ..spec import LSE_REST, Arg, Op, Out
from ._compressed import choose, compressed
from ._formula import inert, scores, softmax, stretch, weighted_sum
from ._options import scaled
from ._sink import with_sink


def reference(
    query: Tensor, keys: Tensor, values: Tensor, slot_mask: Tensor | None, slot_range: Tensor | None, scale: float
):
    weights, lse, rest = softmax(scores(query, keys, slot_mask, scale, slot_range))
    read = weighted_sum(weights, inert(values, slot_mask).to(weights.dtype), slot_range)
    return read.to(query.dtype), lse.expand(read.shape[:-1]), rest.expand(read.shape[:-1])


OP = register(
    Op(
        name="softmax_read",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("values", "N V", "memory", "content"),
            Arg("slot_mask", "N", "memory", "mask", optional=True, stretch=True),
            Arg("slot_range", "T 2", "tokens", "range", optional=True, fill="ranges"),
        ),
        params=(("scale", "float"),),
        outputs=(Out("read", "T V"), Out("lse", "T", dtype="stats"), LSE_REST),
        saved=("read", "lse", "lse_rest"),
        reference=reference,
        flops=lambda s: 2 * s["T"] * s["N"] * (s["K"] + s["V"]),
        # scores and d_weights again, d_query, d_keys, d_values
        backward_flops=lambda s: 2 * s["T"] * s["N"] * (3 * s["K"] + 2 * s["V"]),
        autocast=("query", "keys", "values"),
        over_slots="lse",
        equation="r_t = sum_i softmax_i(scale q_t.k_i + mask_i) v_i",
    )
)
COMPRESSED = register(compressed(OP, keys="key_scale", values="value_scale"))


@overload
def softmax_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def softmax_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def softmax_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def softmax_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | Tensor | None = None,
    slot_mask: Tensor | None = None,
    slot_range: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sink: float | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a memory: a softmax-weighted sum of its values for every query.

    ``r_t = sum_i softmax_i(scale * <query_t, key_i> + slot_mask_i) value_i``

    Args:
        query: ``[..., T, K]``, float32, bfloat16, float16 or float64.
        keys: ``[..., N, K]``, dtype of ``query``, or int8 or float8_e4m3fn with ``key_scale``.
        values: ``[..., N, V]``, dtype of ``query``, or float32 beside a 16-bit query, or int8 or float8_e4m3fn with
            ``value_scale``.
        scale: multiplies the dot products; default ``K ** -0.5``. A number, or a tensor that broadcasts to ``[..., T]``
            (a learned temperature, ``[H, 1]`` for one per head, ``[..., T]`` for one per token), in the dtype of
            ``query`` or float32 beside a 16-bit query; differentiable. A tensor is multiplied into the query; in
            16 bits, where one product would be rounded, that takes two products and twice the work on scores.
        slot_mask: ``[..., N]``; bool (True: the slot may be addressed) or float, added to the scores and
            differentiable. A slot at ``-inf`` is empty: its key and value are not looked at.
        slot_range: ``[..., T, 2]``, int64 or int32: token t may address the slots ``first <= i < stop``, clipped to
            0..N, and what other slots hold, NaN too, does not reach it. Empty where ``first >= stop``. Causal, window
            and packed ranges are made by :func:`causal_range` and :func:`packed_range`.
        key_scale, value_scale: ``[..., N]``, float32 (float64 beside float64), what multiplies each row of compressed
            keys or values. Compressed slots, and float keys or values beside them, have no gradient.
        sink: a logit that takes weight and gives nothing, as one slot more with value 0 would: a number, or a tensor as
            for ``scale``; differentiable. The read is multiplied by ``exp(lse - lse')`` with
            ``lse' = log(exp(lse) + exp(sink))``, and ``lse'`` is the lse that is returned.
        return_lse: also return ``lse``, the log-sum-exp of the scores (natural logarithm), by which reads of disjoint
            memories merge exactly (:func:`merge_reads`).
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ...; default: what :func:`use_backend` says.

    Returns:
        ``read`` ``[..., T, V]`` in the dtype of ``query``; with ``return_lse`` also ``lse`` ``[..., T]`` in float32
        (float64 for float64). With no addressable slot the read is 0 and lse is -inf, or the ``sink``.

    Leading dimensions broadcast. Differentiable in every float argument, to any order.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit. RuntimeError: keys or values beside compressed
            ones require a gradient. NotImplementedError: the named backend cannot run the call.

    Source: Vaswani et al. 2017, Attention Is All You Need; Sukhbaatar et al. 2015, End-To-End Memory Networks; Xiao et
    al. 2024, Efficient Streaming Language Models with Attention Sinks.
    """
    tensors = [query, keys, values, stretch(slot_mask, keys), slot_range]
    op, tensors = choose(OP, COMPRESSED, tensors, key_scale, value_scale)
    tensors, factor = scaled(op, tensors, scale, "softmax_read")
    read, lse, _ = call(op, tensors, (factor,), backend)
    if sink is not None:
        read, lse = with_sink("softmax_read", sink, read, lse)
    return (read, lse) if return_lse else read
