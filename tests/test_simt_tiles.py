"""softmax_read for many tokens, which is tiles on the tensor cores: its cases over the machine in tests/simt.

The contract grid reaches the tiles too (its cases of 17 tokens and more, also where a shared memory folds them); these
are the sizes and situations in which tiles have edges.
"""

from __future__ import annotations

import json

import pytest
from cuda_support import WHOLE, asan_environment, broken, can_run, library, on_host, whole

pytestmark = can_run
DTYPES = ("float32", "bfloat16", "float16")
# Tokens, slots, key width, value width: around tiles of 16, 32 and 64, parts of 128 columns, and splits of the slots.
SIZES = [(65, 31, 40, 7), (17, 65, 7, 64), (130, 1, 64, 1), (20, 600, 8, 40)]
EDGES = [
    (65, 200, 1, 130),
    (33, 65, 130, 40),
    (20, 65, 264, 264),
    (64, 64, 64, 64),
    (66, 130, 128, 128),
    (18, 1500, 16, 72),
    (17, 0, 8, 8),
    (17, 40, 8, 0),
    (19, 33, 0, 8),
]
SITUATIONS = {
    "empty slots": {"give": {"slot_mask": "mask_empty"}},
    "no slot open": {"give": {"slot_mask": "mask_all_empty"}},
    "infinite scores": {"give": {"slot_mask": "mask_infinite"}},
    "float mask, NaN in a token": {"give": {"slot_mask": "mask_float", "query": "nan_token"}},
    "shared memory": {"tokens": [2, 3], "memory": [3]},
    "one row for all": {"layout": "expanded"},
    "rows side by side": {"layout": "interleaved", "tokens": [2, 3], "memory": [2, 3]},
    "inside NaN": {"layout": "sliced"},
}
USUAL = (70, 70, 24, 40)
CASES = [{"sizes": s} for s in SIZES] + [{"sizes": USUAL, **SITUATIONS["empty slots"]}]
MORE = [{"sizes": s, "params": {"scale": 0.3}} for s in EDGES] + [{"sizes": USUAL, **s} for s in SITUATIONS.values()]
CHECK = """
import json, sys
import torch
from memkernels.registration import OPS
from memkernels.testing.cases import Case
from memkernels.testing.grid import Subject

rows = []
for case in json.loads(sys.argv[1]):
    sizes = dict(zip("TNKV", case.pop("sizes")))
    lead = {"tokens": tuple(case.pop("tokens", (2,))), "memory": tuple(case.pop("memory", (2,)))}
    for dtype in sys.argv[2].split(","):
        for mixed in (False, True) if dtype != "float32" else (False,):
            this = Case(f"{sizes} {case}", sizes=sizes, mixed=mixed, **lead, **case)
            subject = Subject(OPS["softmax_read"], this, getattr(torch, dtype), "cpu")
            rows += subject.rows("cuda", sys.argv[3:])
print(json.dumps([str(r) for r in rows if not r.passed]))
"""


def wrong(built, cases, dtypes=DTYPES, directions=("forward",), **environment: str) -> list[str]:
    done = on_host(built, CHECK, json.dumps(cases), ",".join(dtypes), *directions, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tiles_equal_the_float64_reference():
    assert not wrong(library(), CASES + MORE if WHOLE else CASES)


@whole
def test_gradients_from_what_the_tiles_found():
    assert not wrong(library(), CASES, directions=("forward", "backward"))


@whole
def test_no_address_is_wrong():
    assert not wrong(library("address"), CASES + MORE, **asan_environment())


BITS = """
import hashlib
import torch
from support import bits, operator, randn

run, found = operator("cuda", "softmax_read"), []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tensors = [randn(*s, dtype=torch.float32).to(dtype) for s in ((20, 24), (600, 24), (600, 40))]

    def read(offset):
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in tensors]
        return b"".join(bits(x) for x in run(*moved, None, 0.2))

    first = read(0)
    assert first == read(1), dtype
    found.append(hashlib.sha256(first).hexdigest())
print(*found)
"""


def test_same_bits_in_every_order_and_wherever_the_memory_lies():
    """600 slots are several ranges, which are merged."""
    done = [on_host(library(), BITS, MEMKERNELS_SIMT_SEED=seed) for seed in ("1", "2")]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-4000:]
    assert len({d.stdout for d in done}) == 1


DTYPES_THAT_DIFFER = """
import torch
from support import operator, randn

run = operator("cuda", "softmax_read")
for tokens in (1, 70):
    for keys, values in ((torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)):
        sizes = ((tokens, 24), (33, 24), (33, 40))
        q, k, v = (randn(*s, dtype=torch.float32).to(d) for s, d in zip(sizes, (keys, keys, values)))
        try:
            run(q, k, v, None, 0.2)
        except RuntimeError as error:
            assert "softmax_read: values must have the dtype of the keys, or float32" in str(error)
        else:
            raise AssertionError("no error")
    # A query of another dtype than its keys is streamed, however many tokens there are.
    q, k, v = randn(tokens, 24).float(), randn(33, 24).bfloat16(), randn(33, 40).bfloat16()
    wanted = (q.double() @ k.double().T * 0.2).softmax(-1) @ v.double()
    torch.testing.assert_close(run(q, k, v, None, 0.2)[0].double(), wanted, rtol=0, atol=1e-5)
print("DONE")
"""


def test_dtypes_that_the_public_function_refuses_raise_or_are_right():
    done = on_host(library(), DTYPES_THAT_DIFFER)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


# file, text, text with the fault
FAULTS = {
    "removed barrier": (
        "softmax_read_tiles.cu",
        "wait_copies<0>();\n    __syncthreads();\n    return",
        "wait_copies<0>();\n    return",
    ),
    "no wait for copies": (
        "softmax_read_tiles.cu",
        "wait_copies<0>();\n    __syncthreads();\n    return",
        "wait_copies<1>();\n    __syncthreads();\n    return",
    ),
    "one slot too many": (
        "softmax_read_tiles.cu",
        "(block.split + 1) * r.ranges.split_rows);",
        "(block.split + 1) * r.ranges.split_rows + 1);",
    ),
    "unmasked tail": (
        "softmax_read_tiles.cu",
        "block.added[tid] = first + tid < end ?",
        "block.added[tid] = !p.mask || first + tid < end ?",
    ),
    "values of empty slots": ("softmax_read_tiles.cu", "mask_at(p.mask, mask, first + i) != -kInfinity", "true"),
    "buffers not taken in turn": ("softmax_read_tiles.cu", "buffers + (turn ^ 1) * r", "buffers + turn * r"),
    "one token off": ("softmax_read_tiles.cu", "warp * 16 + row * 8 + lane / 4", "warp * 16 + row * 8 + lane % 4"),
    "fragments in another order": (
        "fragments.h",
        "pair(p[2], p[3]), pair(n[0], n[1])",
        "pair(n[0], n[1]), pair(p[2], p[3])",
    ),
    "no low digits": ("fragments.h", "mma_tf32(d.low, a.low, high0, high1);", ""),
}


@whole
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    built = broken(tmp_path, *FAULTS[fault], "softmax_read_tiles.cu")
    seeds = ("1", "2", "3", "4")
    assert any(wrong(built, CASES, ("float32", "float16"), MEMKERNELS_SIMT_SEED=seed) for seed in seeds), fault


@whole
def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(tmp_path):
    old, new = "int64_t(sizeof(Shared<kSlots<W>>)) +", "int64_t(sizeof(Shared<kSlots<W>>)) - 64 +"
    built = broken(tmp_path, "softmax_read_tiles.cu", old, new, "softmax_read_tiles.cu", "address")
    done = on_host(built, CHECK, json.dumps(CASES), "float32", "forward", **asan_environment())
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
