"""The CUDA kernels on the CPU (tests/simt): hostile arguments, and the same bits in every order of the threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cuda_support import WHOLE, asan_environment, can_run, library, on_host, ops, whole

from memkernels.registration import OPS

pytestmark = can_run
# Every op in the CUDA build (make cuda), else one of each kind: tiles of all pairs, segments, a search.
SOME = ops() if WHOLE else ["softmax_write", "sparse_write", "topk_read"]
HOSTILE = """
import json, sys
code, calls = sys.argv[1], json.loads(sys.argv[2])
for op, direction in calls:
    print("CALL", op, direction, flush=True)
    sys.argv = ["", op, "cuda", direction]
    exec(compile(code, "hostile.py", "exec"), {"__name__": "__main__"})
"""
CALLS = [(op, d) for op in ops() for d in ("forward", "backward", *(["in place"] if OPS[op].inplace else []))]


def refuse_and_survive(done, calls) -> None:
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died at {lines[-2:]}: {done.stderr[-4000:]}"
    assert lines.count("DONE") == len(calls) and len(lines) > 30 * len(calls)
    assert not [line for line in lines if line.startswith("ACCEPTED")]


@pytest.mark.parametrize("op", SOME)
def test_hostile_arguments_raise_and_never_crash(op):
    calls = [c for c in CALLS if c[0] == op]
    code = (Path(__file__).parent / "hostile.py").read_text()
    refuse_and_survive(on_host(library(), HOSTILE, code, json.dumps(calls)), calls)


@whole
def test_hostile_arguments_reach_no_wrong_address():
    code = (Path(__file__).parent / "hostile.py").read_text()
    refuse_and_survive(on_host(library("address"), HOSTILE, code, json.dumps(CALLS), **asan_environment()), CALLS)


INDICES = """
import torch
from support import operator, randn

WILD = (5, -2, 2**31, 2**40, 2**63 - 1, -(2**63))
values, weights, write, du = (randn(*s, dtype=torch.float32) for s in ((5, 40), (7, 3), (7, 40), (5, 40)))
indices = torch.arange(21).remainder(5).view(7, 3)
for wild in WILD:
    bad, gone = indices.clone(), indices.clone()
    bad[2, 1], gone[2, 1] = wild, -1

    def both(name, *rest):
        run = operator("cuda", name)
        return (run(values, i, weights, *rest) for i in (bad, gone))

    read, wanted = both("sparse_read")
    assert read[2].isnan().all() and not read[[0, 1, 3, 4, 5, 6]].isnan().any(), wild
    assert torch.equal(read[[0, 1, 3, 4, 5, 6]], wanted[[0, 1, 3, 4, 5, 6]]), wild
    for found, wanted in zip(*both("sparse_read_backward", write, [True] * 2)):
        assert torch.equal(found, wanted), wild
    found, wanted = both("sparse_write", write, None, None, 1.0)
    assert torch.equal(found, wanted), wild
    for found, wanted in zip(*both("sparse_write_backward", write, write.sigmoid(), None, du, 1.0, [True] * 4)):
        assert torch.equal(found, wanted), wild
print("DONE")
"""


@pytest.mark.parametrize("sanitize", ["", pytest.param("address", marks=whole)])
def test_an_index_that_names_no_slot_does_no_harm(sanitize):
    """Its read is NaN, it writes nothing and has no gradient; all other results keep their bits."""
    done = on_host(library(sanitize), INDICES, **(asan_environment() if sanitize else {}))
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]


DIGESTS = """
import hashlib, json, sys
import torch
from support import CASE
from test_determinism import ERASE, LARGE, evaluate
from memkernels.registration import OPS

cases = ("usual", "65 tokens, just above a block", "every index the same")
if sys.argv[2] == "whole":
    cases += ("float mask", "memory shared across the batch", "one token, many slots", "erase tensor, both masks")
cases = [CASE[name] for name in cases] + ([LARGE[1], ERASE] if sys.argv[2] == "whole" else [])
op, found = sys.argv[1], {}
for case in (c for c in cases if c.fits(OPS[op])):
    for dtype in (torch.float32, torch.bfloat16):
        once = evaluate(op, case, dtype, "cuda")
        first = once()
        assert once() == first, f"{op}, {case.name}, {dtype}: other bits in a second run"
        found[f"{case.name}, {dtype}"] = [hashlib.sha256(x).hexdigest() for x in first]
wanted = evaluate(op, CASE["usual"], torch.float32, "cuda")()
for offset in (1, 3):
    assert evaluate(op, CASE["usual"], torch.float32, "cuda", offset)() == wanted, f"{op}: {offset} numbers further"
print(json.dumps(found))
"""


@pytest.mark.parametrize("op", SOME)
def test_same_bits_in_every_run_and_order_and_wherever_the_memory_lies(op):
    """A seed stands for an order of the threads and of the blocks."""
    found = []
    for seed in ("1", "2", "3") if WHOLE else ("1", "2"):
        done = on_host(library(), DIGESTS, op, "whole" if WHOLE else "quick", MEMKERNELS_SIMT_SEED=seed)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] and all(other == found[0] for other in found[1:])


FORGETTING = """
import test_write_laws
for erase in (1.0, 0.6):
    for with_retained in (False, True):
        test_write_laws.test_gradients_of_slots_that_forget_all_but_the_last_tokens("cuda", erase, with_retained)
print("DONE")
"""


@pytest.mark.parametrize("sanitize", ["", pytest.param("address", marks=whole)])
def test_gradients_of_slots_that_forget_all_but_the_last_tokens(sanitize):
    done = on_host(library(sanitize), FORGETTING, **(asan_environment() if sanitize else {}))
    assert done.returncode == 0 and done.stdout.split() == ["DONE"], done.stdout + done.stderr[-4000:]
