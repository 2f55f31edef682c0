"""What a launch compiles: signature, constants, and what the compiler may assume of the arguments.

Triton compiles a kernel anew for every divisibility of every integer. Here the compiler is told what makes loads wide,
and nothing else, so that a kernel serves all sizes of T and N, all parts and all batches:

- a row tensor (its last stride is not 1) begins at a multiple of 16 bytes and has strides that are multiples of 16
  elements: both, or neither is assumed, and neither of indices;
- widths of rows (``WIDTHS``), and the integers that a launch names because an axis of contiguous numbers ends there,
  are multiples of 16, or not;
- a last stride of 1 is a constant.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

WIDTHS = frozenset({"K", "V", "D", "W", "span", "wide"})
# Steps between parts of a result of rows. Those between parts of numbers are not told: T = 1 makes them odd.
WIDTHS |= {f"{name}_part" for name in ("read", "d_read", "q", "k", "v", "w", "out", "sum", "h")}
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
    """One compilation. signature, constants and attributes are as Triton's ``ASTSource`` has them."""

    function: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    target: GPUTarget

    @functools.cached_property
    def identity(self) -> tuple:
        """The same for launches that share machine code, in this process."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.function, self.target, *(repr(sorted(x.items())) for x in parts)

    def compile(self) -> CompiledKernel:
        """Compile it, or take it from Triton's cache on disk. Needs no GPU."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options)

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


_loaded: dict[tuple, CompiledKernel] = {}


def build(
    kernel: JITFunction, arguments: list, options: dict, arch: int, columns: tuple[str, ...], is_aligned
) -> Build:
    """What a launch of ``kernel`` with all its ``arguments``, constants included, compiles.

    columns: names of further integers that end an axis of contiguous numbers. is_aligned: whether a tensor begins at a
    multiple of 16 bytes.
    """
    signature, constants, attributes = {}, {}, {}

    def describe(x, path: tuple, divisible: bool):
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

    for i, (param, x) in enumerate(zip(kernel.params, arguments, strict=True)):
        if param.is_constexpr:
            signature[param.name], constants[(i,)] = "constexpr", x
        elif not isinstance(x, tuple):
            if isinstance(x, Tensor):
                divisible = is_aligned(x)
            else:
                divisible = isinstance(x, int) and (param.name in WIDTHS or param.name in columns) and x % 16 == 0
            signature[param.name] = describe(x, (i,), divisible)
        elif not isinstance(x[-1], int):  # several tensors
            signature[param.name] = tuple(
                describe(y, (i, j), isinstance(y, Tensor) and is_aligned(y)) for j, y in enumerate(x)
            )
        else:
            rows = x[-1] != 1
            wide = rows and x[0].dtype != torch.int64 and is_aligned(x[0]) and all(y % 16 == 0 for y in x[1:])
            kinds = [describe(y, (i, j), wide) for j, y in enumerate(x)]
            if not rows:
                kinds[-1], constants[(i, len(x) - 1)] = "constexpr", 1
            signature[param.name] = tuple(kinds)
    return Build(kernel, signature, constants, attributes, options, GPUTarget("cuda", arch, 32))
