"""Tensors for one case, generated in the dtype under test: the float64 reference sees exactly the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._formula import scores, softmax
from ..spec import COMPRESSED, Arg, Op, sizes, stats_dtype
from .cases import SIZES, Case

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass
class Inputs:
    """Arguments and options of one call, in the order of the declaration."""

    tensors: list[Tensor | None]
    params: tuple
    seed: int

    def wanting(self, op: Op, case: Case) -> list[int]:
        """Positions of the arguments whose gradient the case asks for."""
        return [
            i
            for i, (a, t) in enumerate(zip(op.args, self.tensors))
            if a.is_float and t is not None and t.is_floating_point() and (case.wants is None or a.name in case.wants)
        ]

    def doubled(self) -> list[Tensor | None]:
        """The same numbers in float64, in memory of their own."""
        return [t.double() if t is not None and t.is_floating_point() else t for t in self.tensors]


def takes(case: Case, dtype: torch.dtype) -> bool:
    return not case.mixed or dtype in SIXTEEN_BIT


def make(op: Op, case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The tensors and options of ``case``, the same on every device and in every run."""
    seed = zlib.crc32(f"{op.name}/{case.name}".encode())
    random = torch.Generator().manual_seed(seed)
    axes = {**SIZES, **case.sizes}
    tensors: list[Tensor | None] = []
    for arg in op.args:
        compressed = any(t is not None and t.dtype in COMPRESSED for t in _scaled(op, arg, tensors))
        if arg.optional and arg.name not in case.give and not compressed:
            tensors.append(None)
            continue
        lead = case.leads.get(arg.name, case.memory if arg.side == "memory" else case.tokens)
        shape = (*lead, *sizes(arg.axes, axes))
        kind = case.give.get(arg.name) or _usual(op, arg)
        tensors.append(FILL[kind](shape, _dtype(arg, dtype, case), random, axes))
    _poison(op, case, tensors)
    params = tuple(_param(name, case, axes) for name, _ in op.params)
    tensors = [t if t is None else LAYOUT[case.layout](t.to(device), a) for a, t in zip(op.args, tensors)]
    for i, arg in enumerate(op.args):
        if arg.name == "lse":  # must belong to the query and keys, or the weights exp(s - lse) would mean nothing
            tensors[i] = _lse(op, tensors, dict(zip((n for n, _ in op.params), params)))
    return Inputs(tensors, params, seed)


def _scaled(op: Op, arg: Arg, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The slots that ``arg`` multiplies, if it is a scale: ``keys`` for ``key_scale``."""
    return [tensors[op.index(arg.name.replace("_scale", "s"))]] if arg.dtype == "scale" else []


def _usual(op: Op, arg: Arg) -> str:
    """How an argument is filled where the case does not say."""
    if arg.name == "mix" or (arg.name == "weights" and op.inplace):  # those of a write are shares
        return "uniform"
    own = {"forget": "uniform", "weight": "recurrent", "cache_tokens": "word", "targets": "word"}
    kinds = {"bool": "token_mask", "index": "index", "stats": "stats", "slots": "int8", "scale": "row_scale"}
    return own.get(arg.name) or kinds.get(arg.dtype, "normal")


def _dtype(arg: Arg, dtype: torch.dtype, case: Case) -> torch.dtype:
    kind = arg.dtype
    if kind == "slots":
        given = case.give.get(arg.name, "int8")
        return {"int8": torch.int8, "float8": torch.float8_e4m3fn}.get(given, dtype)
    if kind in ("stats", "scale") or (kind == "content" and case.mixed):
        return stats_dtype(dtype)
    if kind == "mask":
        return dtype if case.give.get(arg.name) == "mask_lead" else stats_dtype(dtype)
    return dtype


def _param(name: str, case: Case, axes: dict[str, int]):
    if name in case.params:
        return case.params[name]
    if name == "k":
        return axes["k"]
    defaults = {"scale": max(axes["K"], 1) ** -0.5, "sigmoid": False, "erase_scale": 1.0, "read_first": False}
    return defaults[name]


def _lse(op: Op, tensors: list[Tensor | None], params: dict) -> Tensor:
    named: dict[str, Any] = {a.name: t for a, t in zip(op.args, tensors)}
    mask = named.get("slot_mask")
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    _, lse, _ = softmax(scores(named["query"].double(), named["keys"].double(), mask, params["scale"]))
    return lse.to(stats_dtype(named["query"].dtype))


def _poison(op: Op, case: Case, tensors: list[Tensor | None]) -> None:
    """What must never be looked at is NaN: rows of empty slots, tokens that write nothing, parts with lse -inf."""
    named: dict[str, Any] = {a.name: t for a, t in zip(op.args, tensors)}
    mask, tokens, lses = named.get("slot_mask"), named.get("token_mask"), named.get("lses")
    if mask is not None and mask.shape[-1] and "empty" in case.give.get("slot_mask", ""):
        empty = ~mask if mask.dtype == torch.bool else torch.isneginf(mask)
        for arg, tensor in zip(op.args, tensors):
            if tensor is None or arg.side != "memory" or op.inplace == arg.name:
                continue
            rows = len(arg.axes.split()) == 2 and tensor.dtype not in COMPRESSED
            if rows or arg.dtype == "scale":
                tensor[empty.expand(tensor.shape[: tensor.dim() - rows])] = torch.nan
    if tokens is not None:
        for arg, tensor in zip(op.args, tensors):
            if arg.side == "tokens" and tensor is not None and tensor.is_floating_point():
                tensor[~tokens.expand(tensor.shape[:-1])] = torch.nan
    if lses is not None:
        named["reads"][torch.isneginf(lses)] = torch.nan


# --- how a tensor is filled: (shape, dtype, generator, sizes) -> tensor ---


def _normal(shape, dtype, random, axes):
    return torch.randn(shape, generator=random, dtype=stats_dtype(dtype)).to(dtype)


def _recurrent(shape, dtype, random, axes):
    """A weight that keeps states small: they do not amplify what rounding leaves."""
    return (0.3 * shape[-1] ** -0.5 * torch.randn(shape, generator=random, dtype=stats_dtype(dtype))).to(dtype)


def _rounded(factor: float, steps: float) -> Callable:
    """Multiples of 1 / steps: sums of their products have no rounding error in float32."""

    def fill(shape, dtype, random, axes):
        return (torch.randn(shape, generator=random) * factor * steps).round().div(steps).to(dtype)

    return fill


def _nan_token(shape, dtype, random, axes):
    x = _normal(shape, dtype, random, axes)
    stream = x[0] if x.dim() > 2 else x  # one token of one stream: what others read or write must stay clean
    stream[..., 1, x.shape[-1] // 2] = torch.nan
    return x


def _mask(floats: bool = True, keep: str = "some") -> Callable:
    """A mask with empty slots; ``keep``: which slots stay open."""

    def fill(shape, dtype, random, axes):
        keeps = torch.rand(shape, generator=random) > 0.3
        if keep == "none":
            keeps = torch.zeros_like(keeps)
        elif keep == "two":
            keeps = torch.zeros_like(keeps)
            keeps[..., 1::17] = True
            keeps[..., 20:] = False
        elif keep == "all but first stream" and keeps.dim() > 1:
            keeps[0] = False
        if not floats:
            return keeps
        return torch.randn(shape, generator=random, dtype=stats_dtype(dtype)).to(dtype).masked_fill(~keeps, -torch.inf)

    return fill


def _mask_infinite(shape, dtype, random, axes):
    mask = _mask()(shape, dtype, random, axes)
    mask[..., ::5] = torch.inf
    return mask


def _mask_offset(shape, dtype, random, axes):
    return torch.randint(100, 104, shape, generator=random).to(dtype)


def _lses(share: float) -> Callable:
    def fill(shape, dtype, random, axes):
        x = 3 * _normal(shape, dtype, random, axes)
        return x.masked_fill(torch.rand(shape, generator=random) < share, -torch.inf)

    return fill


def _ascending(shape, dtype, random, axes):
    return torch.linspace(-4, 4, shape[-2]).unsqueeze(-1).expand(shape).clone().to(dtype)


FILL: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "recurrent": _recurrent,
    "uniform": lambda shape, dtype, random, axes: torch.rand(shape, generator=random).to(dtype),
    "int8": lambda shape, dtype, random, axes: torch.randint(-127, 128, shape, generator=random).to(torch.int8),
    "float8": lambda shape, dtype, random, axes: (100 * torch.randn(shape, generator=random)).to(dtype),
    "row_scale": lambda shape, dtype, random, axes: torch.rand(shape, generator=random).to(dtype) / 64,
    "zeros": lambda shape, dtype, random, axes: torch.zeros(shape, dtype=dtype),
    "ones": lambda shape, dtype, random, axes: torch.ones(shape, dtype=dtype),
    "bits": lambda shape, dtype, random, axes: torch.randint(0, 2, shape, generator=random).to(dtype),
    "signs": lambda shape, dtype, random, axes: (torch.randint(0, 2, shape, generator=random) * 2 - 1).to(dtype),
    "integers": _rounded(1.0, 1.0),
    "grid": _rounded(1.0, 4.0),
    "ascending": _ascending,
    "nan_token": _nan_token,
    "stats": lambda shape, dtype, random, axes: 3 * _normal(shape, dtype, random, axes),
    "lse_empty": _lses(0.4),
    "lse_all_empty": _lses(2.0),
    "mask_bool": _mask(floats=False),
    "mask_bool_empty": _mask(floats=False),
    "mask_float": _normal,
    "mask_lead": _normal,
    "mask_stretched": lambda shape, *rest: _normal((*shape[:-1], 1), *rest).expand(shape),
    "mask_empty": _mask(),
    "mask_all_empty": _mask(keep="none"),
    "mask_first_empty": _mask(keep="all but first stream"),
    "mask_two_open": _mask(keep="two"),
    "mask_offset": _mask_offset,
    "mask_infinite": _mask_infinite,
    "token_mask": lambda shape, dtype, random, axes: torch.rand(shape, generator=random) > 0.3,
    "token_mask_none": lambda shape, dtype, random, axes: torch.zeros(shape, dtype=torch.bool),
    "index": lambda shape, dtype, random, axes: (
        torch.randint(-1, max(axes["N"], 0), shape, generator=random) if axes["N"] else torch.full(shape, -1)
    ),
    "word": lambda shape, dtype, random, axes: torch.randint(-1, axes["W"], shape, generator=random),
    "word_same": lambda shape, dtype, random, axes: torch.full(shape, axes["W"] // 2),
    "index_none": lambda shape, dtype, random, axes: torch.full(shape, -1),
    "index_same": lambda shape, dtype, random, axes: torch.full(shape, axes["N"] // 2),
}


# --- how it lies in memory: (tensor, argument) -> the same numbers in other strides ---


def _blank(x: Tensor, shape) -> Tensor:
    """Memory around a view: NaN, True or a wild index, so that a read outside the view shows."""
    fills = {torch.bool: True, torch.int64: 2**40, torch.int8: 127}
    fill = fills.get(x.dtype, torch.nan)
    return torch.full(tuple(shape), fill, dtype=x.dtype, device=x.device)


def _transposed(x: Tensor, arg: Arg) -> Tensor:
    return x.mT.contiguous().mT if x.dim() >= 2 else x


def _sliced(x: Tensor, arg: Arg) -> Tensor:
    base = _blank(
        x, (*x.shape[:-1], x.shape[-1] + 5) if x.dim() < 2 else (*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5)
    )
    view = base[..., 3:-2] if x.dim() < 2 else base[..., 1:-2, 3:-2]
    return view.copy_(x)


def _strided(x: Tensor, arg: Arg) -> Tensor:
    return _blank(x, (*x.shape[:-1], 2 * x.shape[-1]))[..., ::2].copy_(x)


def _expanded(x: Tensor, arg: Arg) -> Tensor:
    """Stride 0 in the leading dimensions, and in the rows of the token side."""
    if x.dim() == len(arg.axes.split()):
        return x
    return x[:1].expand(x.shape) if arg.side == "memory" or x.dim() < 3 else x[:1, :1].expand(x.shape)


def _interleaved(x: Tensor, arg: Arg) -> Tensor:
    split = x.dim() - len(arg.axes.split())
    return x.transpose(split - 1, split).contiguous().transpose(split - 1, split) if split else x


LAYOUT: dict[str, Callable[[Tensor, Arg], Tensor]] = {
    "contiguous": lambda x, arg: x,
    "transposed": _transposed,
    "sliced": _sliced,
    "strided": _strided,
    "expanded": _expanded,
    "interleaved": _interleaved,
}
