"""selected_scores and selected_read on the SIMT runtime in tests/simt: a token's slots in parts, rows of every width.

The contract grid covers masks and dimensions. These cases are the sizes at the edges of parts, packs and groups of
lanes, and what only a merge of parts shows.
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
# T, N, K, V and k: parts of 32 slots and more; rows of one, some and all lanes, whole packs or not.
SIZES = [(3, 40, 24, 16, 33), (1, 70, 8, 40, 200), (5, 9, 17, 3, 64)]
EDGES = [(2, 50, 300, 260, 70), (1, 1, 1, 1, 65), (40, 33, 64, 64, 31), (1, 40, 0, 5, 40), (3, 40, 5, 0, 40)]
SITUATIONS = {
    "float mask": {"give": {"slot_mask": "mask_float"}},
    "empty slots": {"give": {"slot_mask": "mask_empty"}},
    "no slot open": {"give": {"slot_mask": "mask_all_empty"}},
    "nothing named": {"give": {"indices": "index_none"}},
    "one slot named by all": {"give": {"indices": "index_same"}},
    "NaN in a token": {"give": {"query": "nan_token"}},
    "one row for all": {"layout": "expanded"},
    "inside NaN": {"layout": "sliced"},
}
MANY = (3, 40, 24, 16, 100)  # several parts
CASES = [{"sizes": s} for s in SIZES] + [{"sizes": MANY, **SITUATIONS[name]} for name in ("float mask", "empty slots")]
MORE = [{"sizes": s, "params": {"scale": 0.3}} for s in EDGES] + [{"sizes": MANY, **s} for s in SITUATIONS.values()]


@pytest.mark.parametrize("op", ["selected_scores", "selected_read"])
def test_parts_equal_the_float64_reference(op):
    cases = CASES + MORE if WHOLE else CASES
    assert not wrong(library(), op, [c for c in cases if op == "selected_read" or "slot_mask" not in c.get("give", {})])


@whole
def test_no_address_is_wrong():
    assert not wrong(library("address"), "selected_read", CASES + MORE, **asan_environment())


BITS = """
import hashlib
import torch
from support import bits, operator, randn

run, found = operator("cuda", "selected_read"), []
for dtype in (torch.float32, torch.bfloat16):
    def read(offset):
        tensors = [randn(*s, dtype=torch.float32).to(dtype) for s in ((3, 24), (50, 24), (50, 16))]
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in tensors]
        named = torch.arange(300).view(3, 100) * 7 % 51 - 1
        return b"".join(bits(x) for x in run(*moved, named, None, 0.2))

    assert read(0) == read(1), dtype
    found.append(hashlib.sha256(read(0)).hexdigest())
print(*found)
"""


def test_same_bits_in_every_order_and_wherever_the_memory_lies():
    """100 named slots are several parts, which are merged."""
    done = [on_host(library(), BITS, MEMKERNELS_SIMT_SEED=seed) for seed in ("1", "2", "3")]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-4000:]
    assert len({d.stdout for d in done}) == 1


# file, text, text with the fault, source that is compiled with it
FAULTS = {
    "-1 is a slot": (
        "selected_read.cu",
        "kept[j] = scored(slot, c.N, inside ?",
        "kept[j] = scored(slot < 0 ? 0 : slot, c.N, inside ?",
        "selected_read.cu",
    ),
    "rows of empty slots are read": (
        "selected_read.cu",
        "[&](int j) { return addressable(index[j], c.N, p.mask, mask); },",
        "[&](int j) { return index[j]; },",
        "selected_read.cu",
    ),
    "a part begins one slot late": (
        "selected_read.cu",
        "begin = token.part * r.parts.span,",
        "begin = token.part * r.parts.span + (token.part > 0),",
        "selected_read.cu",
    ),
    "parts merged without their maxima": (
        "selected_read.cu",
        "own == top ? 1.f : exponential(own - top)",
        "1.f",
        "selected_read.cu",
    ),
    "no gradient of the lse": (
        "topk_read.cu",
        "(b.d_lse ? load(row(b.d_lse), b.d_lse.dtype, 0) : 0.f)",
        "0.f",
        "topk_read.cu",
    ),
}


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    built = broken(tmp_path, *FAULTS[fault])
    assert any(is_noticed(run_cases(built, "selected_read", CASES, MEMKERNELS_SIMT_SEED=s)) for s in ("1", "2", "3"))
