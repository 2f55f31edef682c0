"""One small call of every public operation, by the names of its arguments, for tests that change one of them."""

from __future__ import annotations

import torch
from support import randn

import memkernels as mk
from memkernels.spec import several

B, T, N, K, V, k, W = 2, 5, 9, 8, 6, 3, 11


def _whole(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _share(*shape: int, dtype) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def arguments(op: str, dtype: torch.dtype = torch.float32, masks: bool = False) -> dict:
    """Arguments of ``op`` by name, all with the leading dimensions ``[B]``; with ``masks`` those that it takes too."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def floats(*shape: int, seed: int = 0) -> torch.Tensor:
        return randn(B, *shape, seed=seed).to(dtype)

    query, keys, values = floats(T, K), floats(N, K), floats(N, V)
    write, weights = floats(T, V, seed=1), _share(B, T, N, dtype=dtype)
    few, indices = _share(B, T, k, dtype=dtype), _whole(N, B, T, k)
    cache = {"cache_scores": floats(T, N), "cache_tokens": _whole(W, B, T, N), "mix": 0.25}
    read = {"query": query, "keys": keys, "values": values}
    memory = {"values": values, "keys": keys}
    pairs = {"query": query, "subkeys": floats(2, N, K // 2)}
    tables = {
        "additive_read": {**read, "score_vector": floats(K)},
        "address": {"query": query, "keys": keys},
        "cache_logprobs": {"logits": floats(T, W), **cache},
        "cache_nll": {"logits": floats(T, W), "targets": _whole(W, B, T), **cache},
        "cell_scan": {"inputs": floats(T, 3 * V), "weight": floats(3 * V, V) / 4, "initial": floats(V)},
        "gated_scan": {"forget": _share(B, T, V, dtype=dtype), "update": write, "initial": floats(V)},
        "gated_write": {**memory, "query": query, "write": write},
        "memory_scan": {**memory, "read_query": query, "write_query": floats(T, K, seed=1), "write": write},
        "merge_reads": {
            "reads": torch.stack([write, floats(T, V, seed=2)]),
            "lses": torch.stack([randn(B, T), randn(B, T, seed=1)]).to(exact),
        },
        "product_key_read": {**pairs, "values": floats(N * N, V), "k": k},
        "product_key_search": {**pairs, "k": k},
        "slot_usage": {"query": query, "keys": keys, "lse": (10 + randn(B, T)).to(exact)},
        "slot_write": {"values": values, "weights": weights, "write": write},
        "softmax_read": read,
        "softmax_write": {**memory, "query": query, "write": write},
        "sparse_read": {"values": values, "indices": indices, "weights": few},
        "sparse_write": {"values": values, "indices": indices, "weights": few, "write": write},
        "topk_read": {**read, "k": k},
        "topk_search": {"query": query, "keys": keys, "k": k},
    }
    result = dict(tables[op.removesuffix("_")])
    if op.endswith("_"):
        result["values"] = result["values"].clone()
    if masks and op in SLOT_MASKED:
        result["slot_mask"] = _whole(4, B, N) > 0
    if masks and op in TOKEN_MASKED:
        result["token_mask"] = _whole(4, B, T) > 0
    return result


SCALED = (
    "address", "gated_write", "gated_write_", "memory_scan", "product_key_read", "product_key_search", "slot_usage",
    "softmax_read", "softmax_write", "softmax_write_", "topk_read", "topk_search",
)  # fmt: skip
ERASING = ("gated_write", "gated_write_", "slot_write", "slot_write_", "softmax_write", "softmax_write_",
           "sparse_write", "sparse_write_")  # fmt: skip
MIXING = ("cache_logprobs", "cache_nll")
CHOOSING = ("product_key_read", "product_key_search", "topk_read", "topk_search")
SLOT_MASKED = (*(op for op in SCALED if not op.startswith("product")), "additive_read")
TOKEN_MASKED = ("gated_write", "gated_write_", "memory_scan", "slot_write", "slot_write_", "softmax_write",
                "softmax_write_")  # fmt: skip
OPERATIONS = tuple(name for name in mk.ops.__all__)


def run(op: str, backend: str | None = None, **given) -> list[torch.Tensor]:
    """The results of the operation, floats and indices alike."""
    return list(several(getattr(mk, op)(**given, backend=backend)))
