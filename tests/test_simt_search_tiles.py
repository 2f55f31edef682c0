"""topk_search for many tokens, in tiles on the tensor cores, on the SIMT runtime in tests/simt.

The contract grid covers the tiles too, in its cases of 17 tokens and more. These cases are the sizes and situations at
the edges of tiles, queues and lists.
"""

from __future__ import annotations

import pytest
from cuda_support import (
    WHOLE,
    asan_environment,
    broken,
    can_run,
    is_noticed,
    library,
    on_host,
    run_cases,
    seeded,
    whole,
    wrong,
)

pytestmark = can_run
OP = "topk_search"
# T, N, K, (V,) and k: around tiles of 16, 32 and 64, parts of 64 and 128 columns, splits of the slots, and lists of 32,
# 64 and more.
SIZES = [(65, 31, 40, 1, 5), (17, 65, 7, 1, 32), (130, 1, 64, 1, 2), (20, 1000, 8, 1, 12), (66, 260, 8, 1, 2)]
EDGES = [
    (65, 200, 1, 1, 33),
    (33, 129, 130, 1, 64),
    (20, 65, 264, 1, 3),
    (18, 300, 24, 1, 65),  # lists of 128 and their queues exceed shared memory: streamed
    (64, 64, 64, 1, 32),
    (66, 130, 128, 1, 1),
    (18, 1500, 65, 1, 16),
    (17, 0, 8, 1, 4),
    (19, 33, 0, 1, 8),
]
USUAL = (70, 300, 24, 1, 9)
WHOLE_NUMBERS = {"give": {"query": "integers", "keys": "integers"}, "params": {"scale": 1.0}, "exact": True}
ASCENDING = {"give": {"query": "ones", "keys": "ascending"}, "params": {"scale": 1.0}, "exact": True, "wants": ["keys"]}
SITUATIONS = {
    "empty slots": {"give": {"slot_mask": "mask_empty"}},
    "no slot open": {"give": {"slot_mask": "mask_all_empty"}},
    "fewer open slots than k": {"give": {"slot_mask": "mask_two_open"}},
    "infinite scores": {"give": {"slot_mask": "mask_infinite"}},
    "float mask, NaN in a token": {"give": {"slot_mask": "mask_float", "query": "nan_token"}},
    "shared memory": {"tokens": [2, 3], "memory": [3]},
    "one row for all": {"layout": "expanded"},
    "rows side by side": {"layout": "interleaved", "tokens": [2, 3], "memory": [2, 3]},
    "inside NaN": {"layout": "sliced"},
    "negative scale": {"params": {"scale": -0.3}},
}
CASES = [{"sizes": s} for s in SIZES] + [{"sizes": USUAL, **SITUATIONS["empty slots"]}]
CASES += [{"sizes": (20, 600, 4, 1, 40), **WHOLE_NUMBERS}, {"sizes": (66, 700, 1, 1, 12), **ASCENDING}]
MORE = [{"sizes": s, "params": {"scale": 0.3}} for s in EDGES] + [{"sizes": USUAL, **s} for s in SITUATIONS.values()]
MORE += [{"sizes": (33, 300, 24, 1, 9), "give": {"keys": "zeros"}, "exact": True}]


def test_tiles_equal_the_float64_reference():
    assert not wrong(library(), OP, CASES + MORE if WHOLE else CASES)


def test_reads_of_what_tiles_found():
    assert not wrong(library(), "topk_read", [{"sizes": (65, 200, 40, 24, 12)}, {"sizes": (20, 600, 24, 40, 33)}])


@whole
def test_no_address_is_wrong():
    assert not wrong(library("address"), OP, CASES + MORE, **asan_environment())


BITS = """
import hashlib
import torch
from support import bits, operator, randn

run, found = operator("cuda", "topk_search"), []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    def search(tokens, slots, offset):
        tensors = [randn(*s, dtype=torch.float32).to(dtype) for s in ((tokens, 24), (slots, 24))]
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in tensors]
        return b"".join(bits(x) for x in run(*moved, None, None, 12, 0.2))

    for tokens, slots in ((20, 1500), (200, 70)):
        first = search(tokens, slots, 0)
        assert first == search(tokens, slots, 1), dtype
        found.append(hashlib.sha256(first).hexdigest())
print(*found)
"""


def test_same_bits_in_every_order_and_wherever_the_memory_lies():
    """1500 slots are several ranges, whose lists are merged."""
    done = [on_host(library(), BITS, MEMKERNELS_SIMT_SEED=seed) for seed in ("1", "2", "3")]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-4000:]
    assert len({d.stdout for d in done}) == 1


PRECISIONS = """
import torch
from support import operator, randn

run = operator("cuda", "topk_search")
query, keys = (randn(*s, dtype=torch.float32) for s in ((70, 24), (300, 24)))
exact = query.double() @ keys.double().T * 0.2
for precision in ("highest", "high"):
    torch.set_float32_matmul_precision(precision)
    scores, indices = run(query, keys, None, None, 12, 0.2)
    assert all(len(set(row)) == 12 for row in indices.tolist())
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    missed = (exact.topk(12).values - exact.gather(-1, indices)).abs().max() / exact.abs().max()
    error = (exact.gather(-1, indices) - scores.double()).abs().max() / exact.abs().max()
    low, high = (0, 1e-6) if precision == "highest" else (2e-5, 2e-3)
    assert low < error < high and missed < high, (precision, error, missed)
print("DONE")
"""


def test_float32_is_multiplied_as_torch_is_told_to():
    """One TF32 product instead of three where that is allowed, which the size of the errors shows."""
    done = on_host(library(), PRECISIONS)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


# What Buffers::arrived returns, without its wait and its barrier.
FILLED = "buffers.rows + (buffers.turn ^ 1) * buffers.bytes"
KERNEL = "topk_search_tiles.cu"
# text, text with the fault; before them the file, if it is another than the kernel's
FAULTS = {
    "removed barrier": ("here = buffers.arrived();", f"here = {FILLED};\n    wait_copies<0>();"),
    "no wait for copies": ("here = buffers.arrived();", f"here = {FILLED};\n    __syncthreads();"),
    "one slot too many": ("search_tiles.h", "block.begin + r.split_rows);", "block.begin + r.split_rows + 1);"),
    "unmasked tail": ("search_tiles.h", "i < block.end ? mask_at(", "!r.p.mask || i < block.end ? mask_at("),
    "the mask of another tile": (
        "extra = block.added[first / S % 2][column];",
        "extra = block.added[0][column];",
    ),
    "queue one place off": ("place[row] = queued[row] +", "place[row] = queued[row] + 1 +"),
    "a full queue is noticed late": ("total[row] > queue)", "total[row] > queue + 1)"),
    "places of two lanes in one": ("(lane & 2 ? others : 0)", "0"),
    "another token's list": ("merge(bit / 4 + bit % 4 * 8);", "merge(bit / 4);"),
    "the least is too high": ("[k - 1];", "[k - 2 < 0 ? 0 : k - 2];"),
    "ties to the larger index": (
        "waiting[place[row]++] = key_of(s[i / 2][2 * row + i % 2], slot);",
        "waiting[place[row]++] = key_of(s[i / 2][2 * row + i % 2], slot ^ 1);",
    ),
    "what waits at the end is forgotten": (" > 0) best.merge(row);", " > 32) best.merge(row);"),
}


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    *file, old, new = FAULTS[fault]
    built = broken(tmp_path, *(file or [KERNEL]), old, new, KERNEL)

    def noticed(seed: str) -> bool:
        return is_noticed(run_cases(built, OP, CASES, ("float32", "float16"), ("forward",), MEMKERNELS_SIMT_SEED=seed))

    assert any(noticed(seed) for seed in ("1", "2", "3", "4")), fault


@whole
def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(tmp_path):
    old, new = (f"kTokens * (list + r.queue{less}) * int64_t(sizeof(Key))" for less in ("", " - 16"))
    built = broken(tmp_path, "topk_search_tiles.cu", old, new, "topk_search_tiles.cu", "address")
    done = run_cases(built, OP, CASES, ("float32",), ("forward",), **asan_environment())
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
