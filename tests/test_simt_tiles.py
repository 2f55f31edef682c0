"""softmax_read for many tokens and its gradients, in tiles on the tensor cores, on the SIMT runtime in tests/simt.

The contract grid covers the tiles too, in its cases of 17 tokens and more. These cases are the sizes and situations at
the edges of tiles.
"""

from __future__ import annotations

import pytest
import torch
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

from memkernels.testing.compare import TOLERANCE

pytestmark = can_run
# Tokens, slots, key width, value width: around tiles of 16, 32 and 64, parts of 128 columns, and splits of the slots.
SIZES = [(65, 31, 40, 7), (17, 65, 7, 64), (130, 1, 64, 1), (20, 600, 8, 40)]
EDGES = [
    (65, 200, 1, 130),
    (33, 65, 130, 40),
    (20, 65, 264, 264),  # float32 rows of the gradients exceed shared memory: all pairs run
    (20, 65, 136, 264),
    (33, 70, 136, 136),
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
    "empty ranges": {"give": {"slot_range": "ranges_empty"}},
    "ranges, shared memory": {
        "give": {"slot_range": "ranges", "slot_mask": "mask_empty"},
        "tokens": [2, 3],
        "memory": [3],
    },
}
USUAL = (70, 70, 24, 40)
CASES = [{"sizes": s} for s in SIZES] + [{"sizes": USUAL, **SITUATIONS["empty slots"]}]
# Several ranges of tokens for one tile of slots, and a gradient of the mask.
CASES += [{"sizes": (300, 33, 24, 40), "give": {"slot_mask": "mask_float"}}]
# Ranges of tokens: of any kind; NaN out of range; a pass by slots that skips many tiles of tokens.
CASES += [{"sizes": (70, 200, 24, 40), "give": {"slot_range": "ranges"}}]
CASES += [{"sizes": USUAL, "give": {"slot_range": "ranges_middle", name: "nan_slots"}} for name in ("keys", "values")]
CASES += [{"sizes": USUAL, "give": {"slot_range": "ranges_middle", "query": "nan_token"}}]
CASES += [{"sizes": (1000, 80, 8, 8), "tokens": [4], "memory": [4], "give": {"slot_range": "ranges_window"}}]
MORE = [{"sizes": s, "params": {"scale": 0.3}} for s in EDGES] + [{"sizes": USUAL, **s} for s in SITUATIONS.values()]
OP = "softmax_read"


def test_tiles_equal_the_float64_reference():
    assert not wrong(library(), OP, CASES + MORE if WHOLE else CASES)


@whole
def test_no_address_is_wrong():
    assert not wrong(library("address"), OP, CASES + MORE, **asan_environment())


BITS = """
import hashlib
import torch
from support import bits, operator, randn

run, back, found = operator("cuda", "softmax_read"), operator("cuda", "softmax_read_backward"), []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    def read(tokens, slots, offset):
        sizes = ((tokens, 24), (slots, 24), (slots, 40), (tokens, 40))
        tensors = [randn(*s, dtype=torch.float32).to(dtype) for s in sizes]
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in tensors]
        *inputs, g = moved
        read, lse, rest = run(*inputs, None, None, 0.2)
        gradients = back(*inputs, None, None, read, lse, rest, g, None, 0.2, [True, True, True, False])
        return b"".join(bits(x) for x in (read, lse, rest, *gradients))

    for tokens, slots in ((20, 600), (300, 40)):
        first = read(tokens, slots, 0)
        assert first == read(tokens, slots, 1), dtype
        found.append(hashlib.sha256(first).hexdigest())
print(*found)
"""


def test_same_bits_in_every_order_and_wherever_the_memory_lies():
    """600 slots are several ranges, which are merged; so are 300 tokens in the gradients of few slots."""
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
            run(q, k, v, None, None, 0.2)
        except RuntimeError as error:
            assert "softmax_read: values must have the dtype of the keys, or float32" in str(error)
        else:
            raise AssertionError("no error")
    # A query of another dtype than its keys is streamed, however many tokens there are.
    q, k, v = randn(tokens, 24).float(), randn(33, 24).bfloat16(), randn(33, 40).bfloat16()
    wanted = (q.double() @ k.double().T * 0.2).softmax(-1) @ v.double()
    torch.testing.assert_close(run(q, k, v, None, None, 0.2)[0].double(), wanted, rtol=0, atol=1e-5)
print("DONE")
"""


def test_dtypes_that_the_public_function_refuses_raise_or_are_right():
    done = on_host(library(), DTYPES_THAT_DIFFER)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


EXTREMES = """
import torch
from support import operator, randn

run, back = operator("cuda", "softmax_read"), operator("cuda", "softmax_read_backward")


def worst(sizes, inputs, g):
    q, k, v = (x * randn(*s).half() for x, s in zip(inputs, sizes))
    g = g * randn(sizes[0][0], sizes[2][1]).half()
    read, lse, rest = run(q, k, v, None, None, 1.0)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(((exact[0] @ exact[1].T).softmax(-1) @ exact[2]), exact, g.double())
    found = back(q, k, v, None, None, read, lse, rest, g, None, 1.0, [True, True, True, False])
    return [float((f.double() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted)]


# ds is about 1e-7, of which float16 has one digit; multiplied by queries of 1000 it is a gradient of usual size.
print(worst(((70, 24), (600, 24), (600, 40)), (1000, 2**-13, 1), 2**-16)[1])
# ds is about 1e6, which float16 does not have; keys of 0.001 make it one.
print(worst(((70, 24), (40, 24), (40, 8)), (100, 2**-10, 60), 20000)[0])
"""


def test_gradients_of_scores_that_float16_does_not_have():
    done = on_host(library(), EXTREMES)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(float(x) < TOLERANCE[torch.float16] for x in done.stdout.split()), done.stdout


PRECISIONS = """
import torch
from support import operator, randn

run, back = operator("cuda", "softmax_read"), operator("cuda", "softmax_read_backward")
inputs = [randn(*s, dtype=torch.float32) for s in ((70, 24), (90, 24), (90, 40))]
g = randn(70, 40, dtype=torch.float32)
exact = [x.double().requires_grad_() for x in inputs]
s = exact[0] @ exact[1].T * 0.2
wanted = [s.softmax(-1) @ exact[2], s.logsumexp(-1)]
wanted += torch.autograd.grad(wanted[0], exact, g.double())


def errors():
    read, lse, rest = run(*inputs, None, None, 0.2)
    found = [read, lse, *back(*inputs, None, None, read, lse, rest, g, None, 0.2, [True, True, True, False])[:3]]
    return [float((f.double() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted)]


def allow(how):
    torch.backends.cuda.matmul.allow_tf32 = how


def of_cuda(how):
    torch.backends.cuda.matmul.fp32_precision = how


for allowed, told, how in (
    (False, torch.set_float32_matmul_precision, "highest"),
    (True, torch.set_float32_matmul_precision, "high"),
    (False, allow, False),
    (True, allow, True),
    (False, of_cuda, "ieee"),
    (True, of_cuda, "tf32"),
):
    told(how)
    for error in errors():
        assert 2e-5 < error < 3e-3 if allowed else error < 2e-6, (told, how, error)
print("DONE")
"""


def test_float32_is_multiplied_as_torch_is_told_to():
    """One TF32 product instead of three where that is allowed, which the size of the errors shows."""
    done = on_host(library(), PRECISIONS)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


REMOVED_BARRIER = ("buffers.h", "wait_copies<0>();\n    __syncthreads();", "wait_copies<0>();")
NO_WAIT = ("buffers.h", "wait_copies<0>();", "wait_copies<1>();")
# file, text, text with the fault
FAULTS = {
    "removed barrier": REMOVED_BARRIER,
    "no wait for copies": NO_WAIT,
    "one slot too many": (
        "softmax_read_tiles.cu",
        "block.begin + r.ranges.split_rows);",
        "block.begin + r.ranges.split_rows + 1);",
    ),
    "unmasked tail": (
        "softmax_read_tiles.cu",
        "block.added[tid] = first + tid < end ?",
        "block.added[tid] = !p.mask || first + tid < end ?",
    ),
    "values of empty slots": ("softmax_read_tiles.cu", "mask_at(p.mask, mask, first + i) != -kInfinity", "true"),
    "buffers do not alternate": ("buffers.h", "rows + (turn ^ 1) * bytes", "rows + turn * bytes"),
    "one token off": ("softmax_read_tiles.cu", "warp * 16 + row * 8 + lane / 4", "warp * 16 + row * 8 + lane % 4"),
    "fragments in another order": (
        "fragments.h",
        "pair(p[2], p[3]), pair(n[0], n[1])",
        "pair(n[0], n[1]), pair(p[2], p[3])",
    ),
    "no low digits": ("fragments.h", "mma_tf32(d.low, a.low, high0, high1);", ""),
    "gradients: removed barrier": REMOVED_BARRIER,
    "gradients: no wait for copies": NO_WAIT,
    "gradients: ranges overlap": (
        "gradient_sides.h",
        "div_up(least(g.others - block.begin, g.split_rows), S)",
        "div_up(least(g.others - block.begin, g.split_rows + S), S)",
    ),
    "gradients: no term": (
        "gradient_tiles.h",
        "x[j][i] + (by_slots ? tile.b[column] : own_rows.b[row])",
        "x[j][i]",
    ),
    "gradients: a tile of the wrong half": (
        "gradient_tiles.h",
        "const Rows<S>& tile() const { return block.tile[turn]; }",
        "const Rows<S>& tile() const { return block.tile[0]; }",
    ),
    "gradients: keys of empty slots": (
        "gradient_sides.h",
        "if (rows.a[r] == -kInfinity) return;",
        "if (at >= p.N) return;",
    ),
    "gradients: another part is summed": (
        "gradient_tiles.h",
        "const int part = k + 1 + block.block;",
        "const int part = k + block.block;",
    ),
    "gradients: a range is left out": (
        "gradient_tiles.h",
        "for (int64_t i = 0; i < g.splits; ++i) x +=",
        "for (int64_t i = 1; i < g.splits; ++i) x +=",
    ),
    "gradients: a tile of tokens too few": ("slot_ranges.h", "begin < stop; }", "begin + 64 < stop; }"),
    "gradients: a tile of slots too few": (
        "gradient_sides.h",
        "int64_t(S), span.stop)",
        "int64_t(S), span.stop / S * S)",
    ),
    "gradients: a slot out of range": (
        "slot_ranges.h",
        "first <= slot && slot < stop",
        "first <= slot && slot <= stop",
    ),
    "gradients: ranges of another tile": ("gradient_tiles.h", "ranges.of_tile(loader.turn)", "ranges.of_tile(0)"),
    "gradients: NaN out of range": (
        "gradient_tiles.h",
        "if (loader.ranges().given()) sum_inside",
        "if (false) sum_inside",
    ),
    "gradients: ranges of other steps": ("gradient_tiles.h", "inside(row, step0 * kDepth + j)", "inside(row, j)"),
    "gradients: tiles beyond the first 32": (
        "gradient_tiles.h",
        "n < block.tiles; n += 32)",
        "n < block.tiles; n += 64)",
    ),
}
GRADIENT_CASES = [CASES[0], *CASES[-7:], {"sizes": (33, 70, 136, 136)}]


def run_for(fault: str) -> tuple[str, list[dict], tuple[str]]:
    """The source that has the fault, and the cases and the direction to run."""
    if fault.startswith("gradients"):
        return "softmax_read_tiles_backward.cu", GRADIENT_CASES, ("backward",)
    return "softmax_read_tiles.cu", CASES, ("forward",)


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    kernel, *what = run_for(fault)
    built = broken(tmp_path, *FAULTS[fault], kernel)

    def noticed(seed: str) -> bool:
        return is_noticed(run_cases(built, OP, what[0], ("float32", "float16"), what[1], MEMKERNELS_SIMT_SEED=seed))

    assert any(noticed(seed) for seed in ("1", "2", "3", "4")), fault


@whole
def test_the_lift_of_float16_is_needed(tmp_path):
    file, kernel = "fragments.h", "softmax_read_tiles_backward_f16.cu"
    done = on_host(broken(tmp_path, file, "lift = lift_of(top)", "lift = 1", kernel), EXTREMES)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not any(float(x) < TOLERANCE[torch.float16] for x in done.stdout.split()), done.stdout


@whole
@pytest.mark.parametrize(
    "direction, file, kernel, size",
    [
        ("forward", "softmax_read_tiles.cu", "softmax_read_tiles.cu", "Shared<kSlots<W>>"),
        ("backward", "softmax_read_tiles_backward.h", "softmax_read_tiles_backward.cu", "Shared<S>"),
    ],
)
def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(direction, file, kernel, size, tmp_path):
    old, new = f"int64_t(sizeof({size})) +", f"int64_t(sizeof({size})) - 64 +"
    built = broken(tmp_path, file, old, new, kernel, "address")
    done = run_cases(built, OP, CASES, ("float32",), (direction,), **asan_environment())
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
