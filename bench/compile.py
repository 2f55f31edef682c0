"""Compiles the Triton kernels that a call would launch, for an architecture, on a machine without a GPU.

The launchers run on meta tensors. A stand-in for Triton's driver names the target, and every launch becomes a
compilation with the very signature, constants and options that the launch would have.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .compilation import TARGETS, Build, Needs
from .launches import launcher, launches

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
NOTHING: Mapping[str, Needs] = types.MappingProxyType({})
# Rows of kernels with a matrix product, which 16-bit operands (and float32 ones as TF32) must do in the matrix unit.
PRODUCTS = (
    *("additive_read", "additive_gradient"),
    *("softmax_read", "query_gradient", "slot_gradient", "slot_usage", "address"),
    *("softmax_norm", "write", "write_gradient", "write_scan", "topk_search"),
    *("cell_scan", "cell_gates", "memory_scan"),
)


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched, and what its machine code needs."""

    key: str
    kernel: str
    arch: str
    dtype: str
    width: int
    constants: str
    row: tuple[str, str, int, int]  # of the table of configurations
    needs: Needs

    @property
    def multiplies(self) -> bool:
        """Whether this kernel has a matrix product: gates that are given need none where tokens are scanned."""
        scans = ROWS[self.kernel] == "write_scan" and "gate=given" in self.constants
        return ROWS[self.kernel] in PRODUCTS and self.kernel != "norm_merge_kernel" and not scans

    def faults(self) -> list[str]:
        """What must not be; empty when all is well."""
        found, needs = [], self.needs
        if needs.spills:
            found.append(f"{needs.spills} bytes spilled")
        limit = TARGETS[self.arch][1]
        if needs.shared > limit:
            found.append(f"{needs.shared} bytes of shared memory, above {limit}")
        if self.multiplies and not needs.matrix and self.dtype != "float32":
            found.append("no matrix instruction")
        return found

    def __str__(self) -> str:
        what = f"sm_{self.arch} {self.dtype} {self.width} {self.kernel} ({self.constants})"
        n = self.needs
        return f"{what}: {n.registers} registers, {n.shared} bytes shared, {n.matrix or 'no matrix instruction'}"


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
def recording(arch: str, found: list[tuple[str, dict, Build]]) -> Iterator[None]:
    """Inside, launches on any device are for ``arch`` and only noted: kernel, constants, what would be compiled."""
    launch = launcher("softmax_read").__globals__["launch"].__globals__
    architecture, run, build = launch["architecture"], JITFunction.run, JITFunction._do_compile

    def note(self, *args, grid, warmup, **constants):
        found.append((self.__name__, constants, run(self, *args, grid=grid, warmup=True, **constants)))

    def later(self, key, signature, device, constants, options, attributes, warmup):
        # Triton keeps what this returns for the next launch of the same key.
        kept, _, target, _, _ = self.device_caches[device]
        kept[key] = Build(self, signature, constants, attributes, options, target)
        return kept[key]

    triton.runtime.driver.set_active(_Driver(arch))
    launch["architecture"], JITFunction.run, JITFunction._do_compile = (lambda device: arch), note, later
    try:
        yield
    finally:
        launch["architecture"], JITFunction.run, JITFunction._do_compile = architecture, run, build
        triton.runtime.driver._active = None


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(
    arch: str, dtype: str, width: int, only: tuple[str, ...] = (), known: Mapping[str, Needs] = NOTHING
) -> Iterator[Compiled]:
    """Everything that ``launches`` (those named in ``only``, or all) launch for one class.

    dtype: also ``"tf32"``. known: key of a build -> what it needs; others are compiled.
    """
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
            for name, constants, build in found:
                if build.key not in seen:
                    seen.add(build.key)
                    row = compressed(name) if one.packed and name in DECODING else ROWS[name]
                    own = (row, arch, 8 * kind.itemsize, 64 if ROWS[name] in ONE_WIDTH else reach)
                    needs = known.get(build.key) or build.compile()
                    yield Compiled(build.key, name, arch, dtype, width, _words(constants), own, needs)


def compressed(kernel: str) -> str:
    """The row of the variant of a kernel of ``DECODING`` that reads compressed slots."""
    return f"{ROWS[kernel]}_compressed"


def _words(constants: dict) -> str:
    told = ("BLOCK", "num_", "maxnreg", "KIND", "GATE", "ERASE", "LIST", "PREC", "READ", "REVERSE", "MEASURE")
    return " ".join(f"{k.lower()}={v}" for k, v in constants.items() if k.startswith(told))
