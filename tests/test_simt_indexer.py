"""indexer_search on the SIMT runtime in tests/simt: in tiles on the tensor cores, by rows, and its gradients.

The contract grid covers both ways too, with few heads. These cases are the numbers of heads and tokens that change how
a block is shared out among its warps, and the sizes at the edges of tiles, queues and lists.
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
OP = "indexer_search"
# T, N, K, (V,) k and H: tokens of 1 to 16 and more rows of a product, one to four groups of tokens, tiles of 32 to 256
# slots, several ranges of them.
SIZES = [
    (5, 100, 24, 1, 9, 17),
    (70, 70, 8, 1, 5, 1),
    (9, 300, 16, 1, 40, 4),
    (1, 700, 40, 1, 33, 16),
    (8, 600, 9, 1, 500, 5),
]
EDGES = [
    (33, 65, 7, 1, 4, 2),
    (3, 257, 64, 1, 3, 8),
    (2, 130, 130, 1, 64, 33),
    (18, 31, 1, 1, 12, 64),
    (2, 1500, 12, 1, 1000, 3),
    (7, 0, 8, 1, 4, 3),
    (3, 33, 0, 1, 8, 3),
    (1, 1, 1, 1, 1, 1),
]
# Rows or lists that do not fit the shared memory of a block of tiles.
BY_ROWS = [(3, 200, 720, 1, 9, 10), (2, 70, 1100, 1, 70, 17)]
USUAL = (11, 300, 24, 1, 9, 6)
WHOLE_NUMBERS = {"give": dict.fromkeys(("query", "keys", "head_weights"), "integers"), "params": {"scale": 1.0}}
ASCENDING = {"give": {"query": "ones", "keys": "ascending", "head_weights": "ones"}, "params": {"scale": 1.0}}
SITUATIONS = {
    "empty slots": {"give": {"slot_mask": "mask_empty"}},
    "no slot open": {"give": {"slot_mask": "mask_all_empty"}},
    "fewer open slots than k": {"give": {"slot_mask": "mask_two_open"}},
    "infinite scores": {"give": {"slot_mask": "mask_infinite"}},
    "float mask, NaN in a token": {"give": {"slot_mask": "mask_float", "query": "nan_token"}},
    "ranges": {"give": {"slot_range": "ranges", "slot_mask": "mask_float"}},
    "NaN out of range": {"give": {"slot_range": "ranges_middle", "keys": "nan_slots"}},
    "shared memory": {"tokens": [2, 3], "memory": [3]},
    "one row for all": {"layout": "expanded"},
    "rows side by side": {"layout": "interleaved", "tokens": [2, 3], "memory": [2, 3]},
    "inside NaN": {"layout": "sliced"},
    "negative scale": {"params": {"scale": -0.3}},
}
CASES = [{"sizes": s} for s in SIZES + BY_ROWS[:1]]
CASES += [{"sizes": USUAL, **SITUATIONS[name]} for name in ("empty slots", "ranges")]
CASES += [{"sizes": (1, 300, 16, 1, 9, 5), **SITUATIONS["empty slots"]}]
CASES += [{"sizes": (20, 600, 4, 1, 40, 3), "exact": True, **WHOLE_NUMBERS}]
CASES += [{"sizes": (3, 700, 1, 1, 12, 2), "exact": True, "wants": ["keys"], **ASCENDING}]
MORE = [{"sizes": s, "params": {"scale": 0.3}} for s in EDGES + BY_ROWS[1:]]
MORE += [{"sizes": USUAL, **s} for s in SITUATIONS.values()]
MORE += [{"sizes": BY_ROWS[0], **SITUATIONS[name]} for name in ("empty slots", "ranges", "float mask, NaN in a token")]
MORE += [{"sizes": (5, 300, 24, 1, 9, 7), "give": {"keys": "zeros"}, "exact": True}]


def test_scores_of_heads_equal_the_float64_reference():
    assert not wrong(library(), OP, CASES + MORE if WHOLE else CASES)


@whole
def test_no_address_is_wrong():
    assert not wrong(library("address"), OP, CASES + MORE, **asan_environment())


BITS = """
import hashlib
import torch
from support import bits, operator, randn

run, back, found = operator("cuda", "indexer_search"), operator("cuda", "indexer_search_backward"), []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    def search(tokens, heads, slots, offset):
        tensors = [randn(*s, dtype=torch.float32) for s in ((tokens, heads, 24), (tokens, heads), (slots, 24))]
        tensors.append(randn(tokens, 12, dtype=torch.float32, seed=1))
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in tensors]
        scores, slots = run(*moved[:3], None, None, 12, 0.2)
        gradients = back(*moved[:3], None, None, slots, moved[3], 12, 0.2, [True] * 4)
        return b"".join(bits(x) for x in (scores, slots, *gradients[:3]))

    for sizes in ((2, 20, 1500), (20, 3, 400), (70, 1, 70)):
        first = search(*sizes, 0)
        assert first == search(*sizes, 1), (dtype, sizes)
        found.append(hashlib.sha256(first).hexdigest())
print(*found)
"""


def test_same_bits_in_every_order_and_wherever_the_memory_lies():
    """1500 slots are several ranges, whose lists are merged; 400 are shared out among the warps of a block."""
    done = [on_host(library(), BITS, MEMKERNELS_SIMT_SEED=seed) for seed in ("1", "2", "3")]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-4000:]
    assert len({d.stdout for d in done}) == 1


INDICES = """
import torch
from support import operator, randn

back = operator("cuda", "indexer_search_backward")
given = [randn(*s, dtype=torch.float32) for s in ((7, 3, 8), (7, 3), (5, 8))]
ds = randn(7, 3, dtype=torch.float32)
indices = torch.arange(21).remainder(5).view(7, 3)
for wild in (5, -2, 2**31, 2**40, 2**63 - 1, -(2**63)):
    bad, gone = indices.clone(), indices.clone()
    bad[2, 1], gone[2, 1] = wild, -1
    found, wanted = (back(*given, None, None, i, ds, 3, 0.5, [True] * 4) for i in (bad, gone))
    others = [0, 1, 3, 4, 5, 6]
    for f, w in zip(found[:2], wanted[:2]):
        assert f[2].isnan().all() and torch.equal(f[others], w[others]), wild
    assert torch.equal(found[2], wanted[2]), wild
print("DONE")
"""


@pytest.mark.parametrize("sanitize", ["", pytest.param("address", marks=whole)])
def test_an_index_that_names_no_slot_does_no_harm(sanitize):
    """The gradients of its token are NaN, that of the keys is without it."""
    done = on_host(library(sanitize), INDICES, **(asan_environment() if sanitize else {}))
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


TILES, ROWS, BACK = "indexer_search_tiles.cu", "indexer_search.cu", "indexer_search_tiles_backward.cu"
FILLED = "(buffers.rows + (buffers.turn ^ 1) * buffers.bytes)"  # what arrived() returns, without wait and barrier
# file, text, text with the fault, source that is compiled with it
FAULTS = {
    "removed barrier": (TILES, "keys = buffers.arrived() +", f"keys = (wait_copies<0>(), {FILLED}) +", TILES),
    "no wait for copies": (TILES, "keys = buffers.arrived() +", f"keys = (__syncthreads(), {FILLED}) +", TILES),
    "one slot too many": ("search_tiles.h", "block.begin + r.split_rows);", "block.begin + r.split_rows + 1);", TILES),
    "unmasked tail": ("search_tiles.h", "i < block.end ? mask_at(", "!r.p.mask || i < block.end ? mask_at(", TILES),
    "the mask of another tile": (TILES, "block.added[turn][part.which", "block.added[0][part.which", TILES),
    "the mask of another warp": (TILES, "block.added[turn][part.which * S + i]", "block.added[turn][i]", TILES),
    "rows past the heads": (TILES, "total[i][n] += there ? x : 0.f;", "total[i][n] += there ? x : x + 1;", TILES),
    "half of a product": (TILES, "total[0][i] += total[1][i];", "total[0][i] += 0 * total[1][i];", TILES),
    "the wrong half": (TILES, "kept = upper ? x[i + n / 2] : x[i]", "kept = upper ? x[i] : x[i + n / 2]", TILES),
    "a relu that is none": ("head_signs.h", "x <= 0 ? 0.f : x", "x <= 0 ? 0.01f * x : x", TILES),
    "a token's list in another range": (
        TILES,
        "block.split * r.sharing + part.which",
        "block.split * r.sharing",
        TILES,
    ),
    "what waits is another token's": (TILES, "if (lane == j) queued = waiting;", "queued = waiting;", TILES),
    "a queue one place off": ("best.h", "waiting()[queued + __popc", "waiting()[queued + 1 + __popc", TILES),
    "a short queue is merged at the wrong end": ("best.h", "list[n - 1 - i] < y", "list[count - 1 - i] < y", TILES),
    "by rows, a range too short": (ROWS, "(split + 1) * r.split_rows)", "(split + 1) * r.split_rows - 64)", ROWS),
    "by rows, weights of the first head": (
        ROWS,
        "heads.weights.dtype, h) * relu",
        "heads.weights.dtype, 0) * relu",
        ROWS,
    ),
    "a sign of another head": ("chosen_rows.h", ">> head % kBits & 1", ">> head % (kBits / 2) & 1", ROWS),
    "no scale": (ROWS, "y *= float(s.scale);", "y *= 1;", ROWS),
    "no head weight, keys": ("segments.cu", "sum += load(weights, w.dtype, h) *", "sum +=", "segments.cu"),
    "gradients, removed barrier": (BACK, "keys = buffers.arrived() +", f"keys = (wait_copies<0>(), {FILLED}) +", BACK),
    "gradients of scores of another tile": (BACK, "shared.ds[turn] + which * J", "shared.ds[0] + which * J", BACK),
    "gradients of scores of another warp": (BACK, "shared.ds[turn] + which * J", "shared.ds[turn]", BACK),
    "signs of another warp's slots": (BACK, "first + which * J + lane", "first + lane", BACK),
    "signs one head off": (BACK, "every_fourth(high >> shift) << 8", "every_fourth(high >> shift) << 7", BACK),
    "only one of the warps that share heads": (BACK, "+= sums[at(w, i)]", "+= 0 * sums[at(w, i)]", BACK),
    "a gradient of a closed relu": (BACK, "g[n][e] = first ? ds", "g[n][e] = true ? ds", BACK),
    "heads side by side, keys": ("segments.cu", "row += s.heads.stride)", "row += s.width * 2)", "segments.cu"),
}


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    built = broken(tmp_path, *FAULTS[fault])

    def noticed(seed: str) -> bool:
        return is_noticed(run_cases(built, OP, CASES, ("float32", "float16"), MEMKERNELS_SIMT_SEED=seed))

    assert any(noticed(seed) for seed in ("1", "2", "3", "4")), fault


@whole
def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(tmp_path):
    old, new = "kBuffers * int64_t(r.buffer_bytes));", "kBuffers * int64_t(r.buffer_bytes) / 2);"
    built = broken(tmp_path, TILES, old, new, TILES, "address")
    done = run_cases(built, OP, CASES, ("float32",), ("forward",), **asan_environment())
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
