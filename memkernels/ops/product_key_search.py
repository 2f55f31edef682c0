"""product_key_search: the k best of n * n slots whose keys are all pairs of two short lists, exactly.

    s[t, i n + j] = scale * (<query_t[:h], subkeys[0, i]> + <query_t[h:], subkeys[1, j]>),     h = K / 2
    scores, indices = the k largest, best first, ties to the smaller slot number

Source: Lample et al. 2019, Large Memory Layers with Product Keys.
"""

from __future__ import annotations

from torch import Tensor

from ..registration import call, register
from ..spec import Arg, Op, Out
from ._formula import scores
from ._options import neighbours, scaled
from .topk_search import at, best


def product_scores(query: Tensor, subkeys: Tensor, scale: float) -> Tensor:
    """The scores of all slots, ``i * n + j`` from rows i and j. [..., T, 2h], [..., 2, n, h] -> [..., T, n * n]."""
    half = subkeys.shape[-1]
    first = scores(query[..., :half], subkeys[..., 0, :, :], None, scale)
    second = scores(query[..., half:], subkeys[..., 1, :, :], None, scale)
    return (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)


def ranking(query: Tensor, subkeys: Tensor, k: int, scale: float) -> Tensor:
    return product_scores(query, subkeys, scale)


def reference(query: Tensor, subkeys: Tensor, k: int, scale: float):
    chosen, indices = best(product_scores(query, subkeys, scale), k)
    return chosen.to(query.dtype), indices


def selected(query: Tensor, subkeys: Tensor, k: int, scale: float, indices: Tensor):
    return at(product_scores(query, subkeys, scale), indices).to(query.dtype), indices


OP = register(
    Op(
        name="product_key_search",
        args=(Arg("query", "T 2h", "tokens", "lead"), Arg("subkeys", "2 n h", "memory")),
        params=(("k", "int"), ("scale", "float")),
        outputs=(Out("scores", "T k"), Out("indices", "T k", dtype="index", grad=False, of="nn", judge=ranking)),
        saved=("indices",),
        reference=reference,
        flops=lambda s: 4 * s["T"] * s["n"] * s["h"],  # two lists of n
        backward_flops=lambda s: 8 * s["T"] * s["k"] * s["h"],  # d_query, d_subkeys, of the chosen
        selected=selected,
        autocast=("query", "subkeys"),
        equation="the k largest of scale (q_t[:h].c_i + q_t[h:].d_j) over slots i n + j, ties to the smaller slot",
    )
)


def product_key_search(
    query: Tensor, subkeys: Tensor, k: int, *, scale: float | Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of ``n * n`` slots whose keys are the pairs of two lists of ``n`` half keys. Exact.

    ``s[t, i * n + j] = scale * (<query_t[:K/2], subkeys[0, i]> + <query_t[K/2:], subkeys[1, j]>)``

    Args:
        query: ``[..., T, K]``, K even, float32, bfloat16, float16 or float64.
        subkeys: ``[..., 2, n, K/2]``, dtype of ``query``.
        k: how many; may exceed n * n. scale: as in :func:`softmax_read`. backend: as in :func:`softmax_read`.

    Returns:
        ``(scores [..., T, k] in the dtype of query, indices [..., T, k] int64)`` as of :func:`topk_search` over all
        n * n keys, which are never formed: best first, equal scores by smaller slot number, index -1 and score -inf
        beyond n * n. Scores are differentiable in query and subkeys; the gradient touches only the rows of the chosen
        slots. The indices name rows of a value table ``[..., n * n, V]`` for :func:`sparse_read`.

    Raises:
        ValueError: k < 1, or a shape or device does not fit. TypeError: a dtype does not fit.
            NotImplementedError: the named backend cannot run the call.

    Source: Lample et al. 2019, Large Memory Layers with Product Keys.
    """
    k = neighbours("product_key_search", k)
    tensors, factor = scaled(OP, [query, subkeys], scale, "product_key_search")
    return call(OP, tensors, (k, factor), backend)
