"""decay_read: a read of slots that fade, without a softmax. A throw-away op: test_new_op.py adds it to a copy.

    r_t = gain * sum_i decay_i <query_t, key_i> v_i

Source: Katharopoulos et al. 2020, Transformers are RNNs (reads without a softmax).
"""

from __future__ import annotations

from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out, stats_dtype


def reference(query: Tensor, keys: Tensor, values: Tensor, decay: Tensor, gain: float):
    exact = stats_dtype(query.dtype)
    weights = gain * (query.to(exact) @ keys.to(exact).mT) * decay.to(exact).unsqueeze(-2)
    return ((weights @ values.to(exact)).to(query.dtype),)


OP = register(
    Op(
        name="decay_read",
        args=(
            Arg("query", "T K", "tokens", "lead"),
            Arg("keys", "N K", "memory"),
            Arg("values", "N V", "memory", "content"),
            Arg("decay", "N", "memory", fill="uniform"),
        ),
        params=(("gain", "float"),),
        usual={"gain": 0.5},
        outputs=(Out("read", "T V"),),
        reference=reference,
        autocast=("query", "keys", "values", "decay"),
        equation="r_t = gain sum_i decay_i q_t.k_i v_i",
    )
)


def decay_read(
    query: Tensor, keys: Tensor, values: Tensor, decay: Tensor, *, gain: float = 1.0, backend: str | None = None
) -> Tensor:
    """Read T tokens from slots that fade.

    ``r_t = gain * sum_i decay_i * <query_t, key_i> * values_i``

    Args:
        query: ``[..., T, K]``. keys: ``[..., N, K]``, same dtype. values: ``[..., N, V]``. decay: ``[..., N]``.
        gain: a number.
        backend: as in :func:`softmax_read`.

    Returns:
        ``[..., T, V]`` in the dtype of ``query``.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.

    Source: Katharopoulos et al. 2020, Transformers are RNNs.
    """
    return call(OP, [query, keys, values, decay], (float(gain),), backend)
