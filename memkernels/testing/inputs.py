"""Tensors for one case, generated in the dtype under test: the float64 reference sees exactly the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._axes import Axis, letters, sizes
from ..spec import COMPRESSED, FLOATS, INTEGERS, Arg, Op, stats_dtype
from .cases import SIZES, UNMET, Case

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
            if a.is_float and t is not None and t.dtype in FLOATS and (case.wants is None or a.name in case.wants)
        ]

    def doubled(self) -> list[Tensor | None]:
        """The same numbers in float64, in memory of their own."""
        return [t.double() if t is not None and t.dtype in FLOATS else t for t in self.tensors]

    def doubled_params(self, op: Op) -> tuple:
        """The options of that call: one that is the dtype is float64."""
        return tuple(torch.float64 if i == op.typed else p for i, p in enumerate(self.params))


def takes(case: Case, dtype: torch.dtype) -> bool:
    return not case.mixed or dtype in SIXTEEN_BIT


def make(op: Op, case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The tensors and options of ``case``, the same on every device and in every run."""
    seed = zlib.crc32(f"{op.name}/{case.name}".encode())
    random = torch.Generator().manual_seed(seed)
    axes = {**_unmet(op), **SIZES, **case.sizes}
    tensors: list[Tensor | None] = []
    for arg in op.args:
        compressed = any(t is not None and t.dtype in COMPRESSED for t in _scaled(op, arg, tensors))
        if arg.optional and arg.name not in case.give and not compressed:
            tensors.append(None)
            continue
        lead = case.leads.get(arg.name, case.memory if arg.side == "memory" else case.tokens)
        lead = () if arg.flat else lead
        shape = (*lead, *sizes(arg.axes, axes))
        places = Axis.parse(arg.of).size(axes) if arg.dtype in INTEGERS else 0
        tensors.append(FILL[_kind(arg, case)](shape, _dtype(arg, dtype, case), random, places))
    _poison(op, case, tensors)
    params = tuple(case.params.get(name, op.usual_option(name, axes, dtype)) for name, _ in op.params)
    tensors = [t if t is None else LAYOUT[case.layout](t.to(device), a) for a, t in zip(op.args, tensors)]
    for i, arg in enumerate(op.args):
        if callable(arg.fill) and tensors[i] is not None and not case.give.get(arg.name):
            tensors[i] = arg.fill(*tensors, *params)
    return Inputs(tensors, params, seed)


def _unmet(op: Op) -> dict[str, int]:
    """Sizes of the axes and int options of ``op`` that ``SIZES`` does not have."""
    declared: list[Any] = [*op.args, *op.outputs]
    axes = set().union(*(letters(x.axes) for x in declared))
    return dict.fromkeys(axes | {name for name, kind in op.params if kind == "int"}, UNMET)


def _scaled(op: Op, arg: Arg, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The slots whose rows ``arg`` multiplies, if it is a scale."""
    return [tensors[op.index(arg.of)]] if arg.dtype in ("scale", "block_scale") else []


def _kind(arg: Arg, case: Case) -> str:
    """How an argument is filled: as the case says, as its declaration says, or as its dtype asks for."""
    if case.give.get(arg.name):
        return case.give[arg.name]
    if arg.fill and not callable(arg.fill):
        return arg.fill
    kinds = {"bool": "token_mask", "slots": "int8", "scale": "row_scale", "block_scale": "row_scale"}
    return kinds.get(arg.dtype, arg.dtype if arg.dtype in ("index", "stats") else "normal")


def _dtype(arg: Arg, dtype: torch.dtype, case: Case) -> torch.dtype:
    kind = arg.dtype
    if kind in ("slots", "table"):
        given = case.give.get(arg.name, "int8" if kind == "slots" else "normal")
        dtype = stats_dtype(dtype) if case.mixed else dtype
        return {"int8": torch.int8, "float8": torch.float8_e4m3fn}.get(given, dtype)
    if kind == "block_scale":
        return torch.uint8 if case.give.get(arg.name) == "power_of_two" else torch.float32
    if kind in ("stats", "scale") or (kind == "content" and case.mixed):
        return stats_dtype(dtype)
    if kind == "mask":
        return dtype if case.give.get(arg.name) == "mask_lead" else stats_dtype(dtype)
    return dtype


def _poison(op: Op, case: Case, tensors: list[Tensor | None]) -> None:
    """Put NaN where no op may read: rows of empty slots, tokens that write nothing, parts with lse -inf."""
    for arg, hiding in zip(op.args, tensors):
        if hiding is None or not arg.hides or _kind(arg, case) not in EMPTYING:
            continue
        own = arg.axes.split()
        hidden = ~hiding if hiding.dtype == torch.bool else torch.isneginf(hiding)
        for other, tensor in zip(op.args, tensors):
            if tensor is None or not tensor.is_floating_point() or tensor.dtype in COMPRESSED:
                continue
            axes = other.axes.split()
            apart = other is arg or other.side != arg.side or other.name == op.inplace  # an empty slot keeps its value
            if not apart and axes[: len(own)] == own:
                tensor[hidden.expand(tensor.shape[: tensor.dim() - len(axes) + len(own)])] = torch.nan


# --- how a tensor is filled: (shape, dtype, generator, places that an index has) -> tensor ---


def _normal(shape, dtype, random, places):
    return torch.randn(shape, generator=random, dtype=stats_dtype(dtype)).to(dtype)


def _recurrent(shape, dtype, random, places):
    """A weight that keeps states small, so that they do not amplify rounding errors."""
    return (0.3 * shape[-1] ** -0.5 * torch.randn(shape, generator=random, dtype=stats_dtype(dtype))).to(dtype)


def _rounded(factor: float, steps: float) -> Callable:
    """Multiples of 1 / steps: sums of their products have no rounding error in float32."""

    def fill(shape, dtype, random, places):
        return (torch.randn(shape, generator=random) * factor * steps).round().div(steps).to(dtype)

    return fill


def _nan_token(shape, dtype, random, places):
    x = _normal(shape, dtype, random, places)
    stream = x[0] if x.dim() > 2 else x  # one token of one stream: the reads and writes of the others must stay finite
    stream[..., 1, x.shape[-1] // 2] = torch.nan
    return x


def _nan_slots(shape, dtype, random, places):
    x = _normal(shape, dtype, random, places)
    stream = x[0] if x.dim() > 2 else x
    stream[..., sorted({0, shape[-2] // 2, shape[-2] - 1}), x.shape[-1] // 2] = torch.nan
    return x


def _ranges(first, stop) -> Tensor:
    return torch.stack([first, stop], -1)


def _any_ranges(shape, dtype, random, places):
    """Ranges of all lengths, some reversed, some beyond either end, two by far."""
    first = torch.randint(-3, places + 3, shape[:-1], generator=random)
    ranges = _ranges(first, first + torch.randint(0, places + 4, shape[:-1], generator=random))
    ranges[..., 3::4, :] = ranges[..., 3::4, :].flip(-1)
    ranges[..., 1::5, 0], ranges[..., 2::5, 1] = 7 - 2**63, 2**63 - 7
    return ranges


def _steps(shape, places: int) -> Tensor:
    """How far each token is in a memory that grows with the tokens, ``[..., T]``."""
    return ((torch.arange(shape[-2]) + 1) * places // max(shape[-2], 1)).expand(shape[:-1])


def _window(share: float) -> Callable:
    """Windows of a share of the slots that move on with the tokens."""

    def fill(shape, dtype, random, places):
        stop = _steps(shape, places)
        return _ranges(stop - max(1, int(share * places)), stop)

    return fill


def _middle_ranges(shape, dtype, random, places):
    """Ranges that never hold the first slot or the last, and of which some hold the middle one."""
    ends = torch.randint(1, max(places, 2), shape, generator=random).sort(-1).values
    ends[..., ::3, :] = ends[..., ::3, :].clamp(max=places // 2)
    return ends


def _mask(floats: bool = True, keep: str = "some") -> Callable:
    """A mask with empty slots; ``keep``: which slots stay open."""

    def fill(shape, dtype, random, places):
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


def _mask_infinite(shape, dtype, random, places):
    mask = _mask()(shape, dtype, random, places)
    mask[..., ::5] = torch.inf
    return mask


def _mask_offset(shape, dtype, random, places):
    return torch.randint(100, 104, shape, generator=random).to(dtype)


def _lses(share: float) -> Callable:
    def fill(shape, dtype, random, places):
        x = 3 * _normal(shape, dtype, random, places)
        return x.masked_fill(torch.rand(shape, generator=random) < share, -torch.inf)

    return fill


def _ascending(shape, dtype, random, places):
    return torch.linspace(-4, 4, shape[-2]).unsqueeze(-1).expand(shape).clone().to(dtype)


FILL: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "recurrent": _recurrent,
    "uniform": lambda shape, dtype, random, places: torch.rand(shape, generator=random).to(dtype),
    "int8": lambda shape, dtype, random, places: torch.randint(-127, 128, shape, generator=random).to(torch.int8),
    "float8": lambda shape, dtype, random, places: (100 * torch.randn(shape, generator=random)).to(dtype),
    "row_scale": lambda shape, dtype, random, places: torch.rand(shape, generator=random).to(dtype) / 64,
    # bits of float8_e8m0fnu: exponents, 127 more
    "power_of_two": lambda shape, dtype, random, places: torch.randint(115, 130, shape, generator=random).to(dtype),
    "zeros": lambda shape, dtype, random, places: torch.zeros(shape, dtype=dtype),
    "ones": lambda shape, dtype, random, places: torch.ones(shape, dtype=dtype),
    "bits": lambda shape, dtype, random, places: torch.randint(0, 2, shape, generator=random).to(dtype),
    "signs": lambda shape, dtype, random, places: (torch.randint(0, 2, shape, generator=random) * 2 - 1).to(dtype),
    "integers": _rounded(1.0, 1.0),
    "grid": _rounded(1.0, 4.0),
    "ascending": _ascending,
    "nan_token": _nan_token,
    "stats": lambda shape, dtype, random, places: 3 * _normal(shape, dtype, random, places),
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
    "token_mask": lambda shape, dtype, random, places: torch.rand(shape, generator=random) > 0.3,
    "token_mask_none": lambda shape, dtype, random, places: torch.zeros(shape, dtype=torch.bool),
    "index": lambda shape, dtype, random, places: (
        torch.randint(-1, places, shape, generator=random) if places else torch.full(shape, -1)
    ),
    "slots_beyond": lambda shape, dtype, random, places: (  # distinct, no page of the usual sizes has them; the last -1
        (12000 - torch.arange(shape[-1]) * 2)
        .masked_fill(torch.arange(shape[-1]) == shape[-1] - 1, -1)
        .repeat(*shape[:-1], 1)
    ),
    "ranges": _any_ranges,
    "ranges_causal": lambda shape, dtype, random, places: _ranges(
        torch.zeros(shape[:-1]).long(), _steps(shape, places)
    ),
    "ranges_window": _window(1 / 8),
    "ranges_wide": _window(3 / 4),
    "ranges_empty": lambda shape, dtype, random, places: torch.full(shape, places // 2),
    "ranges_middle": _middle_ranges,
    "nan_slots": _nan_slots,
    "index_none": lambda shape, dtype, random, places: torch.full(shape, -1),
    "index_same": lambda shape, dtype, random, places: torch.full(shape, places // 2),
}
# Fills of a mask or lse that hide at least some rows of other arguments.
EMPTYING = frozenset(
    ("mask_empty", "mask_bool_empty", "mask_all_empty", "mask_first_empty", "token_mask", "token_mask_none")
    + ("lse_empty", "lse_all_empty")
)


# --- how it lies in memory: (tensor, argument) -> the same numbers in other strides ---


def _blank(x: Tensor, shape) -> Tensor:
    """Memory around a view, filled with NaN, True or an index out of range, so that a read outside the view is seen."""
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
