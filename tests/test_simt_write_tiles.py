"""Writes with a number as erase, and their gradients, in tiles on the tensor cores, on the SIMT runtime in tests/simt.

The contract grid covers the tiles too. These cases are the sizes and situations at the edges of tiles.
"""

from __future__ import annotations

import json

import pytest
import torch
from cuda_support import WHOLE, asan_environment, broken, can_run, library, on_host, run_cases, seeded, whole, wrong

from memkernels.testing.compare import TOLERANCE

pytestmark = can_run
OPS = ("gated_write", "slot_write", "softmax_write")
# Tokens, slots, key width, value width: around tiles of 16, 32 and 64, parts of 128 columns, and ranges of both sides.
SIZES = [(65, 63, 40, 7), (17, 65, 7, 130), (200, 20, 64, 1)]
EDGES = [
    (31, 64, 1, 64),
    (33, 130, 130, 40),
    (64, 129, 136, 136),
    (20, 65, 264, 264),  # float32 rows exceed shared memory: resident rows are loaded with every tile
    (18, 66, 1000, 24),  # the same for 16-bit keys
    (600, 3, 8, 24),
    (20, 600, 8, 24),
    (0, 9, 8, 8),
    (17, 40, 8, 0),
    (19, 33, 0, 8),
]
USUAL = (70, 70, 24, 40)
SITUATIONS = {
    "empty slots": {"give": {"slot_mask": "mask_empty"}},
    "no slot open": {"give": {"slot_mask": "mask_all_empty"}},
    "infinite scores": {"give": {"slot_mask": "mask_infinite"}},
    "float mask, NaN in a token": {"give": {"slot_mask": "mask_float", "query": "nan_token"}},
    "tokens that do not write": {"give": {"token_mask": "token_mask"}, "params": {"erase_scale": 0.5}},
    "no token writes": {"give": {"token_mask": "token_mask_none"}},
    "gates of 0 and 1": {"give": {"weights": "bits"}},
    "sums": {"params": {"erase_scale": 0.0}},
    "shared memory": {"tokens": [2, 3], "memory": [3], "give": {"token_mask": "token_mask"}},
    "one row for all": {"layout": "expanded"},
    "rows side by side": {"layout": "interleaved", "tokens": [2, 3], "memory": [2, 3]},
    "inside NaN": {"layout": "sliced"},
}
CASES = [{"sizes": s} for s in SIZES] + [{"sizes": USUAL, **SITUATIONS["tokens that do not write"]}]
MORE = [{"sizes": s} for s in EDGES] + [{"sizes": USUAL, **s} for s in SITUATIONS.values()]


@pytest.mark.parametrize("op", OPS)
def test_tiles_equal_the_float64_reference(op):
    assert not wrong(library(), op, CASES + MORE if WHOLE else CASES)


@whole
@pytest.mark.parametrize("op", OPS)
def test_no_address_is_wrong(op):
    assert not wrong(library("address"), op, CASES + MORE, **asan_environment())


FORGOTTEN = """
import torch
import memkernels as mk
from support import randn

tokens, slots = 300, 130
sizes = ((slots, 24), (slots, 16), (tokens, 16), (tokens, 24))
inputs = [randn(*s, seed=i, dtype=torch.float32) for i, s in enumerate(sizes)]
mask = torch.full((slots,), 2.0)
mask[3], mask[40:47], mask[70], mask[100] = torch.inf, -8, -torch.inf, -8  # some warps forget all, others keep a slot
d_new, d_retained = randn(slots, 24, seed=5), randn(slots, seed=6)


def run(dtype, backend, erase):
    own = [x.to(dtype).requires_grad_() for x in (*inputs, mask)]
    results = mk.gated_write(*own[:4], slot_mask=own[4], erase=erase, return_retained=True, backend=backend)
    loss = (results[0] * d_new.to(dtype)).sum() + (results[1] * d_retained.to(dtype)).sum()
    return [*results, *torch.autograd.grad(loss, own)]


for erase in (1.0, 0.7):
    for got, want in zip(run(torch.float32, "cuda", erase), run(torch.float64, "reference", erase)):
        assert torch.isfinite(want).all()
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max(), (erase, got.shape)
print("DONE")
"""


def test_a_block_goes_on_while_one_of_its_slots_remembers():
    done = on_host(library(), FORGOTTEN)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


BITS = """
import hashlib
import torch
from support import bits, operator, randn

run, back, found = operator("cuda", "gated_write"), operator("cuda", "gated_write_backward"), []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    def write(tokens, slots, offset):
        sizes = ((slots, 40), (slots, 24), (tokens, 24), (tokens, 40), (slots, 40))
        tensors = [randn(*s, dtype=torch.float32).to(dtype) for s in sizes]
        *inputs, g = (torch.empty(x.numel() + offset, dtype=dtype)[offset:].view(x.shape).copy_(x) for x in tensors)
        new, retained = run(*inputs, None, None, None, 0.2, 1.0)
        gradients = back(*inputs, None, None, None, retained, g, retained, 0.2, 1.0, [True] * 4 + [False] * 2)
        return b"".join(bits(x) for x in (new, retained, *gradients[:4]))

    for tokens, slots in ((20, 600), (600, 40)):
        first = write(tokens, slots, 0)
        assert first == write(tokens, slots, 1), dtype
        found.append(hashlib.sha256(first).hexdigest())
print(*found)
"""


def test_same_bits_in_every_order_and_wherever_the_memory_lies():
    """600 slots are several ranges in the gradients of few tokens, and many tokens in those of few slots."""
    done = [on_host(library(), BITS, MEMKERNELS_SIMT_SEED=seed) for seed in ("1", "2")]
    assert all(d.returncode == 0 for d in done), done[0].stderr[-4000:]
    assert len({d.stdout for d in done}) == 1


EXTREMES = """
import torch
import memkernels as mk
from support import randn


def worst(sizes, factors, which, mask=0.0):
    inputs = [(x * randn(*s, seed=i)).half() for i, (x, s) in enumerate(zip(factors, sizes))]

    def results(dtype, backend):
        own = [x.to(dtype).requires_grad_() for x in inputs[:-1]]
        new = mk.gated_write(*own, slot_mask=torch.full(sizes[0][:1], mask, dtype=dtype), scale=1.0, backend=backend)
        return [new.detach(), *torch.autograd.grad(new, own, inputs[-1].to(dtype))][which]

    want = results(torch.float64, "reference")
    return float((results(torch.float16, "cuda").double() - want).abs().max() / want.abs().max())


# ds is about 1e-5, of which float16 has few digits; multiplied by queries of 1000 it is a gradient of usual size.
sizes = ((40, 40), (40, 24), (70, 24), (70, 40), (40, 40))
print(worst(sizes, (2**-8, 2**-13, 1000, 2**-8, 2**-10), 2))
# ds is about 1e6, which float16 does not have; keys of 0.001 make it a gradient that it has.
sizes = ((40, 8), (40, 24), (70, 24), (70, 8), (40, 8))
print(worst(sizes, (60, 2**-10, 100, 60, 20000), 3))
# Weights near 2^-20, of which float16 has four digits, of many tokens.
print(worst(((20, 24), (20, 24), (600, 24), (600, 24), (20, 24)), (0, 0.1, 1, 8000, 1), 0, -14.0))
"""


def test_numbers_that_float16_does_not_have():
    done = on_host(library(), EXTREMES)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(float(x) < TOLERANCE[torch.float16] for x in done.stdout.split()), done.stdout


PRECISIONS = """
import torch
from support import operator, randn

run, back = operator("cuda", "gated_write"), operator("cuda", "gated_write_backward")
inputs = [randn(*s, dtype=torch.float32) for s in ((90, 40), (90, 24), (70, 24), (70, 40))]
g = randn(90, 40, dtype=torch.float32)
exact = [x.double().requires_grad_() for x in inputs]
new = exact[0]
for t in range(70):
    a = (0.2 * exact[1] @ exact[2][t]).sigmoid().unsqueeze(-1)
    new = new * (1 - a) + a * exact[3][t]
wanted = [new.detach(), *torch.autograd.grad(new, exact, g.double())]


def errors():
    new, retained = run(*inputs, None, None, None, 0.2, 1.0)
    gradients = back(*inputs, None, None, None, retained, g, None, 0.2, 1.0, [True] * 4 + [False] * 2)
    pairs = zip((new, *gradients[1:4]), (wanted[0], *wanted[2:]))
    return [float((f.double() - w).abs().max() / w.abs().max()) for f, w in pairs]


for told, (low, high) in (("highest", (0, 2e-6)), ("high", (2e-5, 5e-3))):
    torch.set_float32_matmul_precision(told)
    for error in errors():
        assert low <= error < high, (told, error)
print("DONE")
"""


def test_float32_is_multiplied_as_torch_is_told_to():
    """One TF32 product instead of three where that is allowed, which the size of the errors shows."""
    done = on_host(library(), PRECISIONS)
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


# What Buffers::arrived returns, without its wait and its barrier.
FILLED = "buffers.rows + (buffers.turn ^ 1) * buffers.bytes"
# file, text, text with the fault
FAULTS = {
    "removed barrier": (
        "gated_write_tiles.cu",
        "here = buffers.arrived();",
        f"here = {FILLED};\n    wait_copies<0>();",
    ),
    "no wait for copies": (
        "gated_write_tiles.cu",
        "here = buffers.arrived();",
        f"here = {FILLED};\n    __syncthreads();",
    ),
    "removed barrier, rows of write": (
        "gated_write_tiles.cu",
        "rows = loader.buffers.arrived();",
        f"rows = {FILLED.replace('buffers', 'loader.buffers')};\n    wait_copies<0>();",
    ),
    "a token beyond the last one writes": ("gate_fragments.h", "!tokens.writes[token(j, i)]", "false"),
    "nothing is carried from tile to tile": ("gate_fragments.h", "left *= half * other", "left = half * other"),
    "another order of tokens": ("gate_fragments.h", "if (lane % 4 < 2)", "if (lane % 4 > 1)"),
    "keys of the wrong slots": ("gated_write_tiles.cu", "held_keys + warp * 16 * r.key_pitch", "held_keys"),
    "gradients: removed barrier": ("buffers.h", "wait_copies<0>();\n    __syncthreads();", "wait_copies<0>();"),
    "gradients: no wait for copies": ("buffers.h", "wait_copies<0>();", "wait_copies<1>();"),
    "gradients: another part is summed": (
        "write_gradient_loader.h",
        "? 1 + block.block : 0);",
        "? block.block : 0);",
    ),
    "gradients: numbers of another tile": (
        "write_gradient_tiles.h",
        "block.left[n][at.row(2 * row)]",
        "block.left[0][at.row(2 * row)]",
    ),
    "gradients: one map for two": ("write_gradient_tiles.h", "other / kBorder + j / 2, run", "other / kBorder, run"),
    "gradients: R behind the first tokens": (
        "write_gradient_rows.h",
        "by_slots ? border + S / kBorder - 1 : border",
        "border",
    ),
    "gradients: a range is left out": (
        "write_gradient_passes.h",
        "for (int64_t i = 0; i < r.splits; ++i) x +=",
        "for (int64_t i = 0; i + 1 < r.splits; ++i) x +=",
    ),
}
# Several ranges; several parts of keys.
GRADIENT_CASES = [CASES[0], CASES[-1], {"sizes": (33, 70, 136, 136)}, {"sizes": (300, 33, 24, 40)}]


@whole
@pytest.mark.parametrize("fault", seeded(FAULTS))
def test_a_seeded_fault_is_noticed(fault, tmp_path):
    backward = fault.startswith("gradients")
    built = broken(tmp_path, *FAULTS[fault], "write_gradients_by_slots.cu" if backward else "gated_write_tiles.cu")

    def noticed(seed: str) -> bool:
        cases, direction = (GRADIENT_CASES, "backward") if backward else (CASES, "forward")
        dtypes = ("float32", "float16")
        done = run_cases(built, "gated_write", cases, dtypes, (direction,), MEMKERNELS_SIMT_SEED=seed)
        if done.returncode != 0:  # killed by a signal: rows that are looked up too late give wild addresses
            assert done.returncode < 0, done.stderr[-4000:]
            return True
        return bool(json.loads(done.stdout.splitlines()[-1]))

    assert any(noticed(seed) for seed in ("1", "2", "3", "4")), fault


# Faults that the cases above miss: file, text, text with the fault, source that has it, script that notices it.
MORE_FAULTS = {
    "leaves while a slot remembers": (
        "gated_write_tiles.cu",
        "block.alive[0] || block.alive[1] || ",
        "block.alive[1] || ",
        "gated_write_tiles.cu",
        FORGOTTEN,
    ),
    "what was there before is forgotten": (
        "gated_write_backward.cu",
        "share = keep[n] * share + add[n];",
        "share = add[n];",
        "gated_write_backward.cu",
        FORGOTTEN,
    ),
    "skips a tile too many": (
        "write_gradient_loader.h",
        "firsts[i] < (block.row0 + kRows) / kBorder",
        "firsts[i] < block.row0 / kBorder",
        "write_gradients_by_tokens.cu",
        FORGOTTEN,
    ),
}


@whole
@pytest.mark.parametrize("fault", seeded(MORE_FAULTS))
def test_a_fault_where_slots_forget_is_noticed(fault, tmp_path):
    *change, kernel, script = MORE_FAULTS[fault]
    done = on_host(broken(tmp_path, *change, kernel), script)
    assert done.returncode != 0 and "AssertionError" in done.stderr, done.stdout + done.stderr[-2000:]


@whole
@pytest.mark.parametrize(
    "kernel, line",
    [("write_gradients_by_slots.cu", 0), ("write_gradients_by_tokens.cu", 1), ("gated_write_tiles.cu", 2)],
)
def test_the_lift_of_float16_is_needed(kernel, line, tmp_path):
    done = on_host(broken(tmp_path, "fragments.h", "lift = lift_of(top)", "lift = 1", kernel), EXTREMES)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not float(done.stdout.split()[line]) < TOLERANCE[torch.float16], done.stdout


@whole
@pytest.mark.parametrize(
    "direction, file, kernel, size",
    [
        ("forward", "gated_write_tiles.cu", "gated_write_tiles.cu", "Shared"),
        ("backward", "write_gradient_passes.h", "write_gradients_by_slots.cu", "Shared<S, by_slots>"),
    ],
)
def test_a_seeded_overrun_is_noticed_by_the_address_sanitizer(direction, file, kernel, size, tmp_path):
    old, new = f"int64_t(sizeof({size})) +", f"int64_t(sizeof({size})) - 64 +"
    built = broken(tmp_path, file, old, new, kernel, "address")
    cases = [{"sizes": (65, 70, 136, 136)}]
    done = run_cases(built, "gated_write", cases, ("float32",), (direction,), **asan_environment())
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
