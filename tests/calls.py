"""One small call of every public operation, with arguments by name, for tests that change one of them."""

from __future__ import annotations

import inspect

import torch
from promised import SIGNATURES
from support import randn

import memkernels as mk
from memkernels.registration import OPS
from memkernels.spec import several, sizes
from memkernels.testing import Case
from memkernels.testing.inputs import make

B, T, N, K, V, k, W = 2, 5, 9, 8, 6, 3, 11


def _whole(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _share(*shape: int, dtype) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _declared(op: str, dtype: torch.dtype) -> dict:
    """Arguments of an op that has no entry in the table below, filled as its declaration says."""
    declared = OPS[op]
    axes = {"T": T, "N": N, "K": K, "V": V, "k": k, "W": W}
    inputs = make(declared, Case("small", sizes=axes, tokens=(B,), memory=(B,)), dtype)
    names = [*(a.name for a in declared.args), *(name for name, _ in declared.params)]
    taken = inspect.signature(getattr(mk, op)).parameters
    given = zip(names, (*inputs.tensors, *inputs.params))
    return {name: x for name, x in given if name in taken and x is not None}


def arguments(op: str, dtype: torch.dtype = torch.float32, masks: bool = False) -> dict:
    """Arguments of ``op`` by name, with leading dimensions ``[B]``; ``masks``: include the masks that it takes."""
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
        "gather_rows": {"values": floats(N, V)[0], "indices": indices[:, 0]},
        "memory_gate": {
            "hidden": floats(2, K),
            "key": floats(2, K, seed=1),
            "value": floats(K),
            "hidden_weight": floats(2, K)[0],
            "key_weight": floats(2, K, seed=2)[0],
            "eps": 1e-3,
        },
        "ngram_slots": {
            "tokens": _whole(W, B, T),
            "sizes": torch.tensor([7, 11, 13, 17]),
            "multipliers": torch.tensor([5, -3, 9]),
            "orders": (2, 3),
            "heads": 2,
        },
        "gated_scan": {"forget": _share(B, T, V, dtype=dtype), "update": write, "initial": floats(V)},
        "gated_write": {**memory, "query": query, "write": write},
        "memory_scan": {**memory, "read_query": query, "write_query": floats(T, K, seed=1), "write": write},
        "merge_reads": {
            "reads": torch.stack([write, floats(T, V, seed=2)]),
            "lses": torch.stack([randn(B, T), randn(B, T, seed=1)]).to(exact),
        },
        "product_key_read": {**pairs, "values": floats(N * N, V), "k": k},
        "product_key_search": {**pairs, "k": k},
        "paged_topk_search": {"query": query, "keys": floats(2, N, K), "pages": torch.tensor([[1, 0], [0, 1]]), "k": k},
        "indexer_search": {
            "query": randn(B, T, 2, K).to(dtype),
            "head_weights": floats(T, 2),
            "keys": keys,
            "k": k,
        },
        "selected_read": {**read, "indices": indices},
        "selected_scores": {"query": query, "keys": keys, "indices": indices},
        "slot_usage": {"query": query, "keys": keys, "lse": (10 + randn(B, T)).to(exact)},
        "slot_write": {"values": values, "weights": weights, "write": write},
        "softmax_read": read,
        "softmax_write": {**memory, "query": query, "write": write},
        "sparse_read": {"values": values, "indices": indices, "weights": few},
        "sparse_write": {"values": values, "indices": indices, "weights": few, "write": write},
        "topk_read": {**read, "k": k},
        "topk_search": {"query": query, "keys": keys, "k": k},
    }
    plain = op.removesuffix("_")
    result = dict(tables[plain] if plain in tables else _declared(plain, dtype))
    if op.endswith("_"):
        result["values"] = result["values"].clone()
    if masks and op in SLOT_MASKED:
        result["slot_mask"] = _whole(4, B, *mask_shape(op, "slot_mask")) > 0
    if masks and op in TOKEN_MASKED:
        result["token_mask"] = _whole(4, B, T) > 0
    return result


def mask_shape(op: str, name: str) -> tuple[int, ...]:
    """The axes of a mask of ``op``, without leading dimensions."""
    axes = next(a.axes for a in OPS[op.removesuffix("_")].args if a.name == name)
    return sizes(axes, {"T": T, "N": N, "F": 2, "S": N})


def _taking(argument: str) -> tuple[str, ...]:
    """The promised operations that take ``argument``."""
    return tuple(op for op in OPERATIONS if argument in inspect.signature(getattr(mk, op)).parameters)


OPERATIONS = tuple(op for op in mk.ops.__all__ if op in SIGNATURES)
SCALED, ERASING, MIXING, CHOOSING = map(_taking, ("scale", "erase", "mix", "k"))
SLOT_MASKED, TOKEN_MASKED = map(_taking, ("slot_mask", "token_mask"))


def run(op: str, backend: str | None = None, **given) -> list[torch.Tensor]:
    """All results of the operation, indices included."""
    return list(several(getattr(mk, op)(**given, backend=backend)))
