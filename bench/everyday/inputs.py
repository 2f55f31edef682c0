"""Tensors and options of a row, drawn from the declaration of its op, and the input sets that calls rotate through."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memkernels import _native, causal_range
from memkernels.spec import Arg, Axis, sizes, stats_dtype
from memkernels.testing.inputs import FILL

from ..cases import ngram_slots
from .row import Row

MOST_SETS = 8
MOST_BYTES = 256 << 20  # of all memories of a row together, beyond the first
MOST_CACHE = 64 << 20  # of a last-level cache that many machines share, no more is ours


def options(row: Row) -> dict[str, Any]:
    """The arguments of the public function that are no tensors."""
    found: dict[str, Any] = {"k": row.sizes["k"]} if row.option("k") else {}
    if "sigmoid" in row.words:
        found["gate"] = "sigmoid"
    if row.words.get("erase"):
        found["erase"] = float(row.words["erase"])
    if "float8" in row.words:
        found["dtype"] = getattr(torch, row.dtype)
    if row.op == "memory_gate":
        found |= {"eps": 1e-6, "signed_sqrt": True}
    if row.op == "ngram_slots":
        found |= dict(zip(("orders", "heads"), ngram_slots.LENGTHS[row.sizes["M"]]))
    return found


def given(row: Row) -> dict[str, Callable[..., Tensor]]:
    """Optional arguments that the words of a row give, and how each is filled."""
    floats = float(row.words.get("bias") or 0)
    fills: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "mask": ("slot_mask", _open),
        "bias": ("slot_mask", lambda shape, dtype, random, places: floats + torch.randn(shape, generator=random)),
        "causal": ("slot_range", lambda *how: _causal(row)),
        "tokens": ("token_mask", _open),
        "initial": ("initial", FILL["normal"]),
        "erase": ("erase", lambda *how: torch.sigmoid(FILL["normal"](*how).float()).to(how[1])),
        "float8": ("value_scale", lambda shape, dtype, random, places: 0.5 + torch.rand(shape, generator=random)),
    }
    return dict(fills[word] for word in row.words if word in fills and not (word == "erase" and row.words[word]))


def _causal(row: Row) -> Tensor:
    T, N = row.sizes["T"], row.sizes["N"]
    return causal_range(T, N, window=int(row.words["causal"] or N), offset=N - T)


def _open(shape, dtype, random, places):
    return torch.rand(shape, generator=random) > 0.1


def _distribution(shape, dtype, random, places):
    return torch.softmax(torch.randn(shape, generator=random), -1).to(dtype)


def _distinct(shape, dtype, random, places):
    """Slots of a token lie each in a part of the memory of its own."""
    step = places // shape[-1]
    return torch.randint(step, shape, generator=random) + step * torch.arange(shape[-1])


def _table(shape, dtype, random, places):
    return torch.randn(shape, generator=random).to(torch.float8_e4m3fn)


# Where people's numbers are not those of the declaration: weights that sum to 1, as a softmax gives them.
FILLED = {
    ("slot_write", "weights"): _distribution,
    ("sparse_read", "weights"): _distribution,
    ("sparse_write", "indices"): _distinct,
    ("paged_topk_search", "pages"): lambda shape, dtype, random, places: torch.randperm(*shape, generator=random),
}


def _draw(row: Row, arg: Arg, random: torch.Generator) -> Tensor:
    axes, dtype = row.axes(), getattr(torch, row.dtype)
    places = Axis.parse(arg.of).size(axes) if arg.dtype == "index" and arg.of else 0
    shape = (*row.lead(arg), *sizes(arg.axes, axes))
    fill = given(row).get(arg.name) or FILLED.get((row.op, arg.name))
    if fill is None and arg.dtype == "index":
        return torch.randint(places, shape, generator=random) if places else torch.full(shape, -1)
    if fill is None and arg.dtype == "table" and "float8" in row.words:
        fill = _table
    kind = arg.fill if isinstance(arg.fill, str) and arg.fill else "stats" if arg.dtype == "stats" else "normal"
    kept = stats_dtype(dtype) if arg.dtype in ("stats", "mask") else dtype
    tensor = (fill or FILL[kind])(shape, kept, random, places)
    if row.op == "gather_rows" and arg.name == "value_scale":
        tensor = tensor.squeeze(-1)
    return tensor.movedim(len(row.leads()), 0).contiguous() if row.op == "merge_reads" else tensor  # [S, ..., T, V]


def make(row: Row, seed: int, beside: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Argument -> tensor. ``beside``: the memory side is that of these tensors."""
    if row.op == "ngram_slots":
        return ngram_slots.make(row.sizes, torch.int64, "cpu", seed)
    op, extra = row.declared, given(row)
    drawn: dict[str, Tensor] = {}
    kept = (
        {} if beside is None else {a.name: beside[a.name] for a in op.args if a.side == "memory" and a.name in beside}
    )
    for arg in op.args:
        if arg.name in kept:
            drawn[arg.name] = kept[arg.name]
        elif not arg.optional or arg.name in extra:
            name = f"{row.op} {row.title} {arg.name} {seed}"
            drawn[arg.name] = _draw(row, arg, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    params = [options(row).get(name, op.usual_option(name, row.axes(), torch.float32)) for name, _ in op.params]
    for arg in op.args:
        if callable(arg.fill) and arg.name in drawn and arg.name not in kept and (row.op, arg.name) not in FILLED:
            drawn[arg.name] = arg.fill(*(drawn.get(other.name) for other in op.args), *params)
    return drawn


def input_sets(row: Row, cache: int | None = None) -> list[dict[str, Tensor]]:
    """Sets of tensors for consecutive calls. Tokens change from call to call, and so does the memory, through twice a
    last-level cache of ``cache`` bytes, unless the row says that it is ``cached``."""
    cache = min(max(_native.host().caches().values()), MOST_CACHE) if cache is None else cache
    sets = [make(row, 0)]
    side = {arg.name: arg.side for arg in row.declared.args}
    size = dict.fromkeys(("memory", "tokens"), 1)
    for name, tensor in sets[0].items():
        size[side[name]] += tensor.nbytes
    memories = 1 if "cached" in row.words else min(math.ceil(2 * cache / size["memory"]), _fitting(size["memory"]))
    for i in range(1, max(memories, _fitting(size["tokens"]))):
        sets.append(make(row, i, None if i < memories else sets[i % memories]))
    return sets


def _fitting(size: int) -> int:
    """How many sets of ``size`` bytes are few and small enough."""
    return max(1, min(MOST_SETS, MOST_BYTES // size))


def wanted(row: Row, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The arguments whose gradient a step computes. A mask, bool or bias, is not learned."""
    args = row.declared.args
    return tuple(a.name for a in args if a.name in tensors and a.is_float and a.dtype != "mask")
