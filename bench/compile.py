"""Compiles the Triton kernels that a call would launch, for an architecture, on a machine without a GPU.

The launchers run on meta tensors, as they do for every kind of call (``triton_kernels/replay.py``): what they note has
the very signature, constants and options that a launch on a GPU has.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from memkernels import _triton

from .compilation import TARGETS, Build, Needs
from .launches import Launch, launches

_PACKAGE = _triton.kernels().__name__
configs, launch, replay = (importlib.import_module(f"{_PACKAGE}.{name}") for name in ("configs", "launch", "replay"))

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
# Their rows where ds comes from [T, N] arguments (score_gradients.py).
SUMS = {"query_gradient_kernel": "query_sums", "slot_gradient_kernel": "slot_sums"}
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
        if needs.serialised:
            found.append("warp-group products are serialised")
        return found

    def __str__(self) -> str:
        what = f"sm_{self.arch} {self.dtype} {self.width} {self.kernel} ({self.constants})"
        n = self.needs
        return f"{what}: {n.registers} registers, {n.shared} bytes shared, {n.matrix or 'no matrix instruction'}"


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
        reach = configs.reach(launch.width(width, torch.empty(0, dtype=kind)))
        for one in launches(kind, width, "meta"):
            if only and one.name not in only:
                continue
            for name, _, constants, build in launched(one, arch):
                if build.key not in seen:
                    seen.add(build.key)
                    row = compressed(name) if one.packed and name in DECODING else row_of(name, constants)
                    own = (row, arch, 8 * kind.itemsize, 64 if ROWS[name] in ONE_WIDTH else reach)
                    needs = known.get(build.key) or build.compile()
                    yield Compiled(build.key, name, arch, dtype, width, _words(constants), own, needs)


def launched(one: Launch, arch: str) -> list[tuple[str, int, dict, Build]]:
    """What a call on meta tensors launches on ``arch``: kernel, programs, constants and options, what is compiled."""
    with replay.Recording(arch, int(arch), torch.device("cuda", 0)) as recording:
        one.run()
    return [(name, programs, constants, Build(build)) for name, programs, constants, build in recording.launches]


def row_of(kernel: str, constants: Mapping) -> str:
    """The row of the table of configurations that a launch has."""
    return SUMS.get(kernel, ROWS[kernel]) if constants.get("KIND") in ("softmax", "sigmoid", "given") else ROWS[kernel]


def compressed(kernel: str) -> str:
    """The row of the variant of a kernel of ``DECODING`` that reads compressed slots."""
    return f"{ROWS[kernel]}_compressed"


def _words(constants: dict) -> str:
    told = ("BLOCK", "num_", "maxnreg", "KIND", "GATE", "ERASE", "LIST", "PREC", "READ", "REVERSE", "MEASURE")
    return " ".join(f"{k.lower()}={v}" for k, v in constants.items() if k.startswith(told))
