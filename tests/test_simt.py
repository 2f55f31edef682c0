"""The CUDA kernels without a GPU and without nvcc: their source runs on the CPU, on the SIMT runtime in tests/simt."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_support import WHOLE, asan_environment, broken, can_run, failures, grid, library, ops, seeded, whole

pytestmark = can_run
DTYPES = "float32,bfloat16,float16"
ALL = ",".join(ops())
SEEDS = ("2", "3", "4")
EXTENT = "full" if WHOLE else "quick"


@pytest.fixture(scope="module")
def runs():
    """The running grids of every op, and of all ops under every seed: a process each, as many as processors."""
    built = library()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = {op: pool.submit(grid, built, op, DTYPES, EXTENT) for op in ops()}
        seeded = {seed: pool.submit(grid, built, ALL, MEMKERNELS_SIMT_SEED=seed) for seed in SEEDS}
        yield whole | seeded
        pool.shutdown(cancel_futures=True)


def test_matrix_instructions_equal_plain_products():
    done = subprocess.run([library(target="fragments")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr


@pytest.mark.parametrize("op", ops())
def test_kernels_equal_the_float64_reference(op, runs):
    assert not failures(runs[op].result())


@pytest.mark.parametrize("seed", SEEDS)
def test_no_order_of_threads_changes_the_result(seed, runs):
    """Each seed is another order of the threads, so that a missing barrier changes a result."""
    assert not failures(runs[seed].result())


def under_address_sanitizer(built, op, dtypes="float32"):
    return grid(built, op, dtypes, **asan_environment())


@whole
def test_no_address_is_wrong():
    assert not failures(under_address_sanitizer(library("address"), ALL, DTYPES))


# file, text, text with the fault, source that is compiled with it
FAULTS = {
    "removed barrier, read": (
        "softmax_read.cu",
        "      __syncthreads();\n      soften<Q>",
        "      soften<Q>",
        "softmax_read.cu",
    ),
    "removed barrier, search": (
        "topk_search.cu",
        "    __syncthreads();\n#pragma unroll\n    for (int n",
        "#pragma unroll\n    for (int n",
        "topk_search.cu",
    ),
    "removed barrier, all pairs": (
        "pair_tiles.h",
        "    }\n    __syncthreads();\n#pragma unroll 8",
        "    }\n#pragma unroll 8",
        "pair_sums.cu",
    ),
    "wait for too few copies": (
        "softmax_read.cu",
        "wait_copies<kStages - 2>();\n    __syncthreads();",
        "wait_copies<kStages>();\n    __syncthreads();",
        "softmax_read.cu",
    ),
    "one slot too many": (
        "softmax_read.cu",
        "least(p.N, begin + plan.split_rows)",
        "least(p.N, begin + plan.split_rows + 1)",
        "softmax_read.cu",
    ),
    "unmasked tail": (
        "stream.h",
        "first + slot < end ? mask_at(mask, mask_base, first + slot) : -kInfinity",
        "mask_base == nullptr || first + slot < end ? mask_at(mask, mask_base, first + slot) : -kInfinity",
        "softmax_read.cu",
    ),
    "a token beyond the last one writes": (
        "gates.h",
        "if (writes && tile.open[slot]) {",
        "if (tile.open[slot]) {",
        "gated_write.cu",
    ),
    "the first slot is the largest, softmax": (
        "softmax_write.cu",
        "if (higher) top = other.top, slot = other.slot;",
        "if (higher) top = other.top, slot = slot < 0 ? other.slot : slot;",
        "softmax_write.cu",
    ),
    "no delta, gradient of a softmax": (
        "gates.h",
        "(keep > 0 ? quotient(faded, keep) : 0.f) - delta)",
        "(keep > 0 ? quotient(faded, keep) : 0.f))",
        "write_gradients_by_tokens.cu",
    ),
    "entries in another order": (
        "sparse_write.cu",
        "const Entry e(own, j);\n      float x[kEach], erase[kEach];",
        "const Entry e(own, n - 1 - j);\n      float x[kEach], erase[kEach];",
        "sparse_write.cu",
    ),
    "the last entries of a slot are forgotten": (
        "sparse_write.cu",
        "if (n < 32) return i + n;",
        "return i + n;",
        "sparse_write.cu",
    ),
    "queue one place off": (
        "best.h",
        "waiting()[queued + __popc",
        "waiting()[queued + 1 + __popc",
        "topk_search.cu",
    ),
    "a range ends one slot late": (
        "slot_ranges.h",
        "first <= slot && slot < stop",
        "first <= slot && slot <= stop",
        "softmax_read.cu",
    ),
    "a tile of slots too few": (
        "query_tiles.h",
        "least(block.end, span.stop)",
        "least(block.end, span.stop / S * S)",
        "topk_search_tiles.cu",
    ),
    "NaN out of range is summed": (
        "fragments.h",
        "if (!inside(row, j)) continue;",
        "if (!inside(row, j) && weight != 0) continue;",
        "softmax_read_tiles.cu",
    ),
    "NaN out of range is summed, all pairs": (
        "pair_tiles.h",
        "if (finite || inside(j, r + 2))",
        "if (finite || inside(j, r))",
        "pair_sums.cu",
    ),
    "a tile of tokens too few": (
        "pair_sums.cu",
        "span.stop <= part.first)",
        "span.stop <= part.first + kTile)",
        "pair_sums.cu",
    ),
}
# The op whose grid notices the fault: an op of the source, or the one that the fault names.
OP = {
    "no delta, gradient of a softmax": "softmax_write",
    "gated_write.cu": "gated_write",
    "pair_sums.cu": "slot_usage",
    "softmax_read.cu": "softmax_read",
    "softmax_read_tiles.cu": "softmax_read",
    "softmax_write.cu": "softmax_write",
    "sparse_write.cu": "sparse_write",
    "topk_search.cu": "topk_search",
    "topk_search_tiles.cu": "topk_search",
}


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    """Under at least one order of the threads: a missing barrier need not change the result in each."""
    *change, kernel = FAULTS[fault]
    built = broken(tmp_path, *change, kernel)
    op = OP.get(fault) or OP[kernel]
    # Reads of exact float32 with ranges are streamed.
    dtype = "float16" if kernel == "softmax_read_tiles.cu" else "float32"
    assert any(failures(grid(built, op, dtype, MEMKERNELS_SIMT_SEED=seed)) for seed in ("1", *SEEDS)), fault


@whole
def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(tmp_path):
    old, new = (f"(Q * r.plan.padded + Q * r.plan.slots + {n} * Q) * 4" for n in (3, 2))
    built = broken(tmp_path, "softmax_read.cu", old, new, "softmax_read.cu", "address")
    done = under_address_sanitizer(built, "softmax_read")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
