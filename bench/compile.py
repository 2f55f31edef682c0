"""Compiles the Triton kernels that a call would launch, for an architecture, on a machine without a GPU.

The launchers run on meta tensors. A stand-in for Triton's driver names the target, and every launch becomes a
compilation with the very signature, constants and options that the launch would have. ``ptxas -v`` then tells what
Triton does not: registers and spills.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .launches import launcher, launches

# Architecture -> what ptxas calls it, and the shared memory that one block may have, in bytes.
TARGETS = {"80": ("sm_80", 163 << 10), "90": ("sm_90a", 227 << 10), "100": ("sm_100a", 227 << 10)}
# Kernel -> its row of the table of configurations.
ROWS = {
    "additive_read_kernel": "additive_read",
    "additive_query_kernel": "additive_gradient",
    "additive_slot_kernel": "additive_gradient",
    "cache_nll_kernel": "cache_nll",
    "cache_nll_backward_kernel": "cache_nll",
    "word_share_kernel": "word_shares",
    "cache_logprobs_kernel": "cache_logprobs",
    "cache_logprobs_backward_kernel": "cache_logprobs",
    "cell_scan_kernel": "cell_scan",
    "cell_scan_backward_kernel": "cell_scan",
    "cell_gates_kernel": "cell_gates",
    "gated_scan_kernel": "gated_scan",
    "memory_scan_kernel": "memory_scan",
    "memory_scan_backward_kernel": "memory_scan",
    "softmax_read_kernel": "softmax_read",
    "merge_kernel": "merge_reads",
    "merge_backward_kernel": "merge_reads",
    "delta_kernel": "row_dots",
    "query_gradient_kernel": "query_gradient",
    "slot_gradient_kernel": "slot_gradient",
    "slot_usage_kernel": "slot_usage",
    "address_kernel": "address",
    "softmax_norm_kernel": "softmax_norm",
    "norm_merge_kernel": "softmax_norm",
    "write_kernel": "write",
    "write_merge_kernel": "write_merge",
    "write_chunk_kernel": "write_gradient",
    "write_carry_kernel": "write_carry",
    "write_token_kernel": "write_gradient",
    "write_slot_kernel": "write_gradient",
    "write_scan_kernel": "write_scan",
    "write_scan_backward_kernel": "write_scan",
    "topk_search_kernel": "topk_search",
    "rank_kernel": "topk_search",
    "topk_merge_kernel": "topk_merge",
    "pair_kernel": "product_pairs",
    "pair_rank_kernel": "product_pairs",
    "sparse_read_kernel": "sparse_read",
    "sparse_write_kernel": "sparse_write",
    "sparse_write_backward_kernel": "sparse_write",
    "chosen_dots_kernel": "chosen_dots",
    "segment_kernel": "segments",
    "border_kernel": "segments",
}
# Rows of the table that serve every width: lists, and rows of words, are not as wide as those of keys.
ONE_WIDTH = ("topk_merge", "product_pairs", "cache_nll", "word_shares", "cache_logprobs")
# Kernels whose variants for compressed slots have rows of their own.
DECODING = ("softmax_read_kernel", "query_gradient_kernel", "topk_search_kernel")
# Rows of kernels with a matrix product, which 16-bit operands (and float32 ones as TF32) must do in the matrix unit.
PRODUCTS = (
    *("additive_read", "additive_gradient"),
    *("softmax_read", "query_gradient", "slot_gradient", "slot_usage", "address"),
    *("softmax_norm", "write", "write_gradient", "write_scan", "topk_search"),
    *("cell_scan", "cell_gates", "memory_scan"),
)
INSTRUCTIONS = {"80": ("mma.sync",), "90": ("wgmma.mma_async", "mma.sync"), "100": ("tcgen05.mma", "mma.sync")}


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched, and what its machine code needs."""

    kernel: str
    arch: str
    dtype: str
    width: int
    constants: str
    registers: int
    spills: int
    shared: int
    matrix: str
    row: tuple[str, str, int, int]  # of the table of configurations

    @property
    def multiplies(self) -> bool:
        """Whether this kernel has a matrix product: gates that are given need none where tokens are scanned."""
        scans = ROWS[self.kernel] == "write_scan" and "gate=given" in self.constants
        return ROWS[self.kernel] in PRODUCTS and self.kernel != "norm_merge_kernel" and not scans

    def faults(self) -> list[str]:
        """What must not be; empty when all is well."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        limit = TARGETS[self.arch][1]
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, above {limit}")
        if self.multiplies and not self.matrix and self.dtype != "float32":
            found.append("no matrix instruction")
        return found

    def __str__(self) -> str:
        what = f"sm_{self.arch} {self.dtype} {self.width} {self.kernel} ({self.constants})"
        needs = f"{self.registers} registers, {self.shared} bytes shared, {self.matrix or 'no matrix instruction'}"
        return f"{what}: {needs}"


class _Driver:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = int(arch)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: str, found: list) -> Iterator[None]:
    """Inside, launches on any device compile for ``arch`` instead, into ``found``: (kernel, constants, compiled)."""
    launch = launcher("softmax_read").__globals__["launch"].__globals__
    architecture, run = launch["architecture"], JITFunction.run

    def compile_only(self, *args, grid, warmup, **constants):
        found.append((self.__name__, constants, run(self, *args, grid=grid, warmup=True, **constants)))

    triton.runtime.driver.set_active(_Driver(arch))
    launch["architecture"], JITFunction.run = (lambda device: arch), compile_only
    try:
        yield
    finally:
        launch["architecture"], JITFunction.run = architecture, run
        triton.runtime.driver._active = None


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(arch: str, dtype: str, width: int, only: tuple[str, ...] = ()) -> Iterator[Compiled]:
    """Everything that ``launches`` (those named in ``only``, or all) run for one class. dtype: also ``"tf32"``."""
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    seen = set()
    with _precision("high" if dtype == "tf32" else "highest"):
        scope = launcher("softmax_read").__globals__["launch"].__globals__
        reach = scope["configs"].reach(scope["width"](width, torch.empty(0, dtype=kind)))
        for one in launches(kind, width, "meta"):
            if only and one.name not in only:
                continue
            found: list = []
            with recording(arch, found):
                one.run()
            for name, constants, kernel in found:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    packed = name in DECODING and one.name.startswith("reads of ")
                    row = f"{ROWS[name]}_compressed" if packed else ROWS[name]
                    own = (row, arch, 8 * kind.itemsize, 64 if ROWS[name] in ONE_WIDTH else reach)
                    yield _read(arch, dtype, width, name, constants, kernel, own)


@functools.lru_cache(maxsize=4096)
def _report(arch: str, ptx: str) -> tuple[int, int]:
    """Registers and bytes spilled."""
    tool = triton.knobs.nvidia.ptxas_blackwell if int(arch) >= 100 else triton.knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", f"-arch={TARGETS[arch][0]}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", text)), spills


def _read(arch: str, dtype: str, width: int, name: str, constants: dict, kernel, row: tuple) -> Compiled:
    ptx = kernel.asm["ptx"]
    registers, spills = _report(arch, ptx)
    matrix = next((word for word in INSTRUCTIONS[arch] if word in ptx), "")
    told = ("BLOCK", "num_", "KIND", "GATE", "ERASE", "LIST", "PREC", "READ", "REVERSE", "MEASURE")
    kept = {k: v for k, v in constants.items() if k.startswith(told)}
    words = " ".join(f"{k.lower()}={v}" for k, v in kept.items())
    return Compiled(name, arch, dtype, width, words, registers, spills, kernel.metadata.shared, matrix, row)
