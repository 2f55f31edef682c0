"""What a launch compiles: signature, constants, and what the compiler may assume of the arguments.

Triton specialises a kernel on the divisibility by 16 of every integer, and on integers that are 1. Here it specialises
only on what makes loads wide, so that one compilation serves all batches, parts and loop lengths:

- a tensor begins at a multiple of 16 bytes and its strides are multiples of 16 elements: both, or neither is assumed;
- a last stride of 1 is a constant;
- the integers of ``SPECIALISED``, at which an axis of loads ends, are multiples of 16, or not.

An argument is a tensor, a number, None, a tuple (a tensor and its strides, or several tensors), or a named tuple of
arguments. Machine code knows no groups: it takes numbers and addresses one after the other, and so does a launch.

The ends of T and N cost 15% more compilations in the contract grid, and pay: without them the loads of lse in
slot_usage are scalar and not pipelined (94 registers instead of 72), softmax_read takes 195 registers instead of 165,
and without k the loads of weights in chosen_dots are scalar (98 instead of 76).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

# Tokens, slots, chosen slots, row widths, entries of a sorted list; the first, and how many, of a share of these.
SPECIALISED = frozenset({"T", "N", "k", "K", "V", "D", "W", "entries", "first", "own", "count", "wide", "span"})
# Steps between parts of a result of rows. Those between parts of numbers are left out: T = 1 makes them odd.
SPECIALISED |= {f"{name}_part" for name in ("read", "d_read", "q", "k", "v", "w", "out", "sum", "h")}
REGISTERS = 65536  # of an SM, for all threads of a block
DIVISIBLE = [["tt.divisibility", 16]]
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True, eq=False)
class Build:
    """One compilation. signature, constants and attributes are as Triton's ``ASTSource`` has them.

    odd: whether some tensor of rows is not aligned, or its width is odd: its loads are scalar.
    """

    function: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    target: GPUTarget
    odd: bool

    @functools.cached_property
    def identity(self) -> tuple:
        """The same for launches that share machine code, in this process."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.function, self.target, *(repr(sorted(x.items())) for x in parts)

    @property
    def types(self) -> tuple[str, ...]:
        """Of the numbers and addresses that the machine code takes."""
        return tuple(self.taken(self.signature.values()))

    def taken(self, arguments) -> list:
        """What the machine code takes of ``arguments``: no groups, and nothing that is a constant."""
        pairs = zip(arguments, self.signature.values(), strict=True)
        return [y for x, kind in pairs for y in _taken(x, kind)]

    def compile(self) -> CompiledKernel:
        """Compile it, or take it from Triton's cache on disk. Needs no GPU."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        kernel = triton.compile(source, target=self.target, options=self.options)
        # Triton makes of this the C function of launches. Without tuples to take apart, one costs a third less.
        kernel.src = SimpleNamespace(fn=self.function, signature=dict(enumerate(self.types)), constants={})
        return kernel

    def prepare(self) -> None:
        """Compile it and the C function that launches it, so that both lie on disk. Needs a GPU and its driver."""
        kernel = self.compile()
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)

    def load(self, device: int) -> CompiledKernel:
        """The kernel, ready to run on ``device``; compiled once per process."""
        key = (device, *self.identity)
        if key not in _loaded:
            _loaded[key] = self.compile()
        return _loaded[key]


def _taken(x, kind) -> Iterator:
    if isinstance(kind, tuple):
        for pair in zip(x, kind, strict=True):
            yield from _taken(*pair)
    elif kind != "constexpr":
        yield x


_loaded: dict[tuple, CompiledKernel] = {}


def build(
    kernel: JITFunction, arguments: list, options: dict, capability: int, is_aligned: Callable[[Tensor], bool]
) -> Build:
    """What a launch of ``kernel`` with all its ``arguments``, constants included, compiles.

    is_aligned: whether a tensor begins at a multiple of 16 bytes.
    """
    constants, attributes, odd = {}, {}, []

    def single(x, path: tuple, divisible: bool) -> str:
        if x is None:
            constants[path] = None
            return "constexpr"
        if divisible:
            attributes[path] = DIVISIBLE
        if isinstance(x, Tensor):
            return f"*{TYPES[x.dtype]}"
        if isinstance(x, float):
            return "fp32"
        return "i32" if -(2**31) <= x < 2**31 else "i64"

    def tensors(x: tuple, path: tuple) -> tuple:
        """A tensor and its strides, or several tensors."""
        if isinstance(x[-1], int):
            *strides, last = x[1:]
            wide = is_aligned(x[0]) and all(y % 16 == 0 for y in strides) and (last == 1 or last % 16 == 0)
            divisible, unit = [wide] * len(x), last == 1
        else:
            divisible, unit = [isinstance(y, Tensor) and is_aligned(y) for y in x], False
        described = x[:-1] if unit else x
        kinds = [single(y, (*path, i), d) for i, (y, d) in enumerate(zip(described, divisible))]
        if unit:
            constants[(*path, len(kinds))] = 1
            kinds.append("constexpr")
        odd.append(not any(divisible) and not unit and "i64" not in kinds[0])
        return tuple(kinds)

    def argument(x, path: tuple, name: str):
        if isinstance(x, Tensor):
            return single(x, path, is_aligned(x))
        if not isinstance(x, tuple):
            return single(x, path, name in SPECIALISED and isinstance(x, int) and x % 16 == 0)
        if not hasattr(x, "_fields"):
            return tensors(x, path)
        return type(x)(*(argument(y, (*path, i), field) for i, (field, y) in enumerate(zip(x._fields, x))))

    signature = {}
    for i, (param, x) in enumerate(zip(kernel.params, arguments, strict=True)):
        if param.is_constexpr:
            signature[param.name], constants[(i,)] = "constexpr", x
        else:
            signature[param.name] = argument(x, (i,), param.name)
    if any(odd):  # scalar loads take an address each, which ptxas would rather spill than lower the occupancy
        options = options | {"maxnreg": min(255, REGISTERS // (32 * options["num_warps"]))}
    target = GPUTarget("cuda", capability, 32)
    return Build(kernel, signature, constants, attributes, options, target, any(odd))
