"""Options that are numbers: one rule for what counts as a number, one error for what does not.

Python numbers, numpy numbers and tensors without dimensions count. Strings, bools, NaN and complex numbers do not. A
tensor that requires a gradient stays a tensor and gets its gradient.
"""

from __future__ import annotations

import operator
from typing import Any, SupportsFloat, TypeGuard

import torch
from torch import Tensor

from .. import _torch
from ..registration import autocast
from ..spec import FLOATS, Op, check, stats_dtype

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
LARGEST = 2**63 - 1  # largest int that an operator of torch takes


def number(op: str, name: str, value: object, wanted: str) -> float:
    """``value`` as a float; otherwise an error which says that ``name`` must be ``wanted``."""
    result = _float(op, name, value, wanted)
    if result != result:
        raise ValueError(f"{op}: {name} must be {wanted}, got nan")
    return result


def fraction(op: str, name: str, value: object, wanted: str) -> float:
    """``value`` as a float in [0, 1]."""
    result = _float(op, name, value, wanted)
    if not 0.0 <= result <= 1.0:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {result}")
    return result


def _float(op: str, name: str, value: object, wanted: str) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or _counts_as_number(value)):
        raise TypeError(f"{op}: {name} must be {wanted}, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be {wanted}, got an int beyond the range of float64") from None


def neighbours(op: str, k: int) -> int:
    """``k``, an integer of at least 1."""
    return integer(op, "k", k, 1)


def integer(op: str, name: str, value: Any, least: int | None) -> int:
    """``value`` as an int of at least ``least`` (None: any), which an operator of torch takes if there is one."""
    result = value
    if isinstance(value, bool) or not isinstance(value, int):
        try:
            result = _index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} must be an int, got {_kind(value)}") from None
    if least is None:
        return result
    if result < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {result}")
    if result > LARGEST:
        raise ValueError(f"{op}: {name} must be at most {LARGEST}, got an int beyond it")
    return result


def _index(k: Any) -> int:
    if isinstance(k, bool):
        raise TypeError
    if not isinstance(k, Tensor):
        return operator.index(k)
    if k.dim() or k.dtype.is_floating_point or k.dtype.is_complex or k.dtype == torch.bool:
        raise TypeError
    return k.item()  # type: ignore[return-value]


def _counts_as_number(value: object) -> TypeGuard[SupportsFloat]:
    if isinstance(value, Tensor):
        return _is_single(value)
    dtype = getattr(value, "dtype", None)
    if dtype is not None:  # numpy: its strings and complex numbers have __float__ too
        return getattr(dtype, "kind", "") in ("i", "u", "f") and getattr(value, "ndim", 1) == 0
    return hasattr(type(value), "__float__")


def _is_single(x: Tensor) -> bool:
    """Is it a real number without dimensions?"""
    return x.dim() == 0 and not x.dtype.is_complex and x.dtype != torch.bool


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def stays_tensor(x: object) -> TypeGuard[Tensor]:
    """Is ``x`` a tensor whose number must not be read here? Reading it would wait for a device, or lose a gradient, a
    tangent, or what a trace or a transform of torch.func records."""
    if not isinstance(x, Tensor):
        return False
    if x.dim() or x.requires_grad or x.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return type(x) not in _PLAIN or _torch.transforms_active()


_PLAIN = (Tensor, torch.nn.Parameter)


def single(op: str, name: str, x: Tensor, like: Tensor, dtype: torch.dtype, wanted: str) -> Tensor:
    """``x``, a tensor without dimensions, in ``dtype`` on the device of ``like``."""
    if not _is_single(x) or (x.is_meta and not like.is_meta):
        raise TypeError(f"{op}: {name} must be {wanted}, got {_kind(x)}{' on meta' if x.is_meta else ''}")
    return x.to(like.device, dtype)


def scaled(op: Op, tensors: list, scale: float | Tensor | None, name: str) -> tuple[list, float]:
    """The tensors of a call, and its scale as a number: the one given, or by default ``K ** -0.5``.

    A scale that is a tensor, ``[..., T]`` or broadcast to it, is multiplied into the queries, and the number is 1.
    Kernels then do not depend on it, and the host reads no number. 16-bit queries would lose digits to that product.
    They become the rounded product and its rounding error, concatenated, beside keys concatenated with themselves.
    """
    if type(scale) is float and scale == scale:  # a shortcut: small calls are bound by Python
        return tensors, scale
    queries = op.queries
    if scale is None:
        try:
            width = tensors[queries[0]].shape[-1]
        except (AttributeError, IndexError, RuntimeError):  # not a tensor with sizes: the check of the call raises
            width = 1
        return tensors, width**-0.5 if width else 1.0
    if not stays_tensor(scale):
        return tensors, number(name, "scale", scale, SCALE)
    cast: list[Any] = autocast(op, tensors)
    layout = check(op, cast)
    tokens = [*layout.lead, layout.axes["T"]]
    factor = token_numbers(name, "scale", scale, cast[queries[0]], tokens, SCALE)
    for _ in op.args[queries[0]].parsed[1:]:  # K, or heads and K
        factor = factor.unsqueeze(-1)
    if all(tensors[i].dtype not in SIXTEEN_BITS for i in queries):  # autocast rounds the product, not its factors
        return [t * factor if i in queries else t for i, t in enumerate(tensors)], 1.0
    halves = (2, -1) if op.args[queries[0]].axes == "T 2h" else (1, -1)
    tensors = list(cast)
    for i in queries:
        product = (tensors[i].float() * factor).unflatten(-1, halves)
        rounded = product.detach().to(tensors[i].dtype)  # detached: the rounding error carries the gradient
        tensors[i] = torch.cat([rounded, (product - rounded).to(tensors[i].dtype)], -1).flatten(-2)
    keys = next(i for i, a in enumerate(op.args) if a.name.endswith("keys"))
    tensors[keys] = torch.cat([tensors[keys], tensors[keys]], -1)
    return tensors, 1.0


SCALE = "a number or a tensor that broadcasts to [..., T]"


def token_numbers(op: str, name: str, x: Tensor, query: Tensor, tokens: list[int], wanted: str) -> Tensor:
    """``x``, one number per token, in the accumulation dtype of ``query``: a tensor that broadcasts to ``[..., T]``.

    tokens: the leading dimensions of the call, then T. wanted: what errors say that ``name`` must be.
    """
    exact = stats_dtype(query.dtype)
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be {wanted}, got a {'nested' if x.is_nested else x.layout} tensor")
    if not x.dim():
        return single(op, name, x, query, exact, wanted)
    dtypes = (*FLOATS[:3], exact) if torch.is_autocast_enabled(query.device.type) else (query.dtype, exact)
    if x.dtype not in dtypes:
        names = " or ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))
        raise TypeError(f"{op}: {name} must be {names}, got {str(x.dtype).removeprefix('torch.')}")
    if x.device != query.device:
        raise ValueError(f"{op}: {name} must be on {query.device}, got {x.device}")
    own = list(x.shape)
    inside = len(own) <= len(tokens) and all(
        size == whole or size == 1 for size, whole in zip(own, tokens[len(tokens) - len(own) :])
    )
    if not inside:
        raise ValueError(f"{op}: {name} must broadcast to {tokens}, [..., T], got {own}")
    return x.to(exact)
