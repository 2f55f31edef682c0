"""The Triton backend without a GPU: the contract grid in Triton's interpreter.

Triton reads the interpreter's variable at import, so the interpreter runs in processes of its own. It runs float32: it
multiplies bfloat16 as raw bits, so 16-bit kernels are tested by compiling them (``test_compiled.py``), and on a GPU by
``make gpu-check``.

Repetitions are left out: cases that repeat others on larger memories, and, for all ops but one, cases of leading
dimensions and layouts, which the code that all launchers share handles.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import quick
import torch
from support import ROOT, run_python

from memkernels import _triton, backends
from memkernels.registration import OPS
from memkernels.testing import cases

pytest.importorskip("triton")
CLAIMED = tuple(name for name in OPS if name in _triton.kernels().operators())
INTERPRETER = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
# Cases that only repeat others on larger memories.
LONG = (
    "1000 tokens",
    "8 tokens",
    "a range of many slots",
    "causal ranges, more slots than tokens",
    "empty ranges, many tokens",
    "every size 63",
    "erase tensor, token mask",
    "many gates",
    "many parts",
    "many rows",
    "many tokens, few channels",
    "one token, many slots",
    "poisoned empty slots, bool",
    "ranges, several blocks",
    "scores ascend",
    "several chunks of tokens, token mask",
    "several panels of tokens",
    "slots just above many blocks",
    "windows",
)
# Loops over tokens are cut into parts only when they are long: once where sums over parts are added, once where
# parts of a write are joined, once where parts of a scan follow one another.
CUT = {"gated_scan": "many tokens, few channels", "slot_usage": "1000 tokens", "slot_write": "1000 tokens"}
# Layouts, and ranges of all kinds, which code that all kernels share handles: one op is enough.
VIEWS = (
    "expanded with stride 0",
    "grouped heads",
    "heads inside tokens",
    "keys shared, values per stream",
    "mask broadcasts",
    "memory shared across the batch",
    "memory shared by all",
    "memory shared, size 1",
    "no leading dimensions",
    "ranges shared by streams",
    "ranges, NaN in keys and values of some slots",
    "ranges, NaN in values of some slots",
    "ranges, NaN in values of some slots, many tokens",
    "ranges, expanded with stride 0",
    "ranges, float mask",
    "ranges, last dimension strided",
    "ranges, memory shared by few tokens",
    "ranges, no slots",
    "ranges, no tokens",
    "ranges, odd widths",
    "ranges, shared memory",
    "ranges, sliced out of NaN",
    "tokens shared by memories",
    "wide windows",
)
VIEWED = "softmax_read"
# Also in float16, which the interpreter multiplies correctly.
HALF = (
    "every size 3",
    "float mask",
    "content in float32",
    "float8 rows in blocks of 32, powers of two",
)

GRID = """
import json, sys
import torch
from memkernels.registration import OPS
from memkernels.testing import Subject, cases

result = {}
for name, names in json.loads(sys.argv[1]).items():
    op = OPS[name]
    found = result[name] = {}
    for case in cases(op):
        for dtype in names.get(case.name, ()):
            rows = Subject(op, case, getattr(torch, dtype), "cpu").rows("triton")
            found[f"{case.name}, {dtype}"] = [str(row) for row in rows if not row.passed]
print("RESULT" + json.dumps(result))
"""


def result_of(code: str, *args: str) -> object:
    done = run_python(code, *args, timeout=1800, **INTERPRETER)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])


def wanted(op: str, config: pytest.Config) -> dict[str, list[str]]:
    """Case -> dtypes of the grid of one op."""
    given = OPS[op].dtypes
    dtype = "float32" if torch.float32 in given else "int64"
    if config.getoption("quick"):
        return {quick.TRITON_CASE: [dtype]}
    result = {}
    for case in cases(OPS[op]):
        repeats = case.name in LONG and case.name != CUT.get(op) or case.name in VIEWS and op != VIEWED
        if not case.mixed and not repeats:
            result[case.name] = [dtype]
        if case.name in HALF and torch.float16 in given:
            result[case.name] = [*result.get(case.name, ()), "float16"]
    return result


@pytest.fixture(scope="module")
def grids(pytestconfig):
    """op -> the running grid that covers it: one process per processor, each with a share of the ops."""
    processes = os.cpu_count() or 1
    shares = [{op: wanted(op, pytestconfig) for op in CLAIMED[i::processes]} for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        running = [pool.submit(result_of, GRID, json.dumps(share)) for share in shares]
        yield {op: one for share, one in zip(shares, running) for op in share}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("op", CLAIMED)
def test_the_contract_grid_in_the_interpreter(op, grids, pytestconfig):
    failures = grids[op].result()[op]
    assert len(failures) == sum(map(len, wanted(op, pytestconfig).values()))
    assert not any(failures.values()), "\n".join(row for rows in failures.values() for row in rows)


PROPERTIES = """
import json, sys
import torch
import memkernels as mk
from memkernels import _triton, backends
from memkernels.registration import OPS
from memkernels.spec import several
from memkernels.testing import CASES, Subject

row = next(b for b in backends.BACKENDS if b.name == "triton")
case = next(c for c in CASES if c.name == "no leading dimensions")
found = {"gaps": [], "bits": []}
for op in (OPS[name] for name in _triton.kernels().operators() if name in OPS):
    for dtype in (dtype for dtype in op.dtypes if row.takes(dtype)):
        found["gaps"] += [g for d in op.directions if (g := row.gap(op.name, "cpu", dtype, d))]
    if op.inplace and (gap := row.gap(op.name + "_", "cpu")):
        found["gaps"].append(gap)
    subject = Subject(op, case, torch.float32, "cpu")
    runs = []
    for _ in range(2):
        tensors = [t if t is None else t.detach() for t in subject.inputs.tensors]
        leaves = [tensors[i].requires_grad_() for i in subject.wanting]
        results = several(getattr(torch.ops.memkernels_triton, op.name)(*tensors, *subject.inputs.params))
        pairs = [(results[i], d) for i, d in subject.cotangents(results).items()]
        gradients = torch.autograd.grad([r for r, _ in pairs], leaves, [d for _, d in pairs]) if leaves else ()
        runs.append([*results, *gradients])
    if not all(torch.equal(a, b) for a, b in zip(*runs)):
        found["bits"].append(op.name)
torch.manual_seed(0)
q, k, v, w = torch.randn(3, 5, 16), torch.randn(3, 40, 16), torch.randn(3, 40, 8), torch.randn(3, 5, 8)

def using(q, k, v, w):
    with mk.use_backend("triton"):
        scores, named = mk.product_key_search(q, k[:, :8].reshape(3, 2, 8, 8), 3)
        w = w + mk.product_key_read(q, k[:, :8].reshape(3, 2, 8, 8), k.flatten(1)[:, :512].unflatten(1, (64, 8)), 3)
        w = w * mk.cache_nll(q, named[..., 0] % 16, scores, named % 16, 0.3).unsqueeze(-1)
        w = w + mk.cache_logprobs(q, scores, named % 16, 0.3)[..., :8]
        w = w + mk.additive_read(q, k, v, q[:, 0])
        scores, slots = mk.topk_search(q, k, 3)
        v = mk.softmax_write(v, k, q, w, erase=0.5)
        v = mk.slot_write(v, mk.address(q, k), w)
        v = mk.sparse_write(v, slots, scores.sigmoid(), w)
        reads, v = mk.memory_scan(v, k, q, q, w)
        state = mk.gated_scan(reads.sigmoid(), w)[..., -1, :]
        w = mk.cell_scan(torch.cat([w] * 3, -1), v[0, :24], state)
        v = mk.gated_write(v, k, q, w)
        return mk.softmax_read(q, k, v).sum() + mk.topk_read(q, k, v, 3).sum()

compiled = torch.compile(using, fullgraph=True, backend="aot_eager")
found["compiled"] = bool(torch.allclose(compiled(q, k, v, w), using(q, k, v, w)))
# More neighbours than a list on the chip holds go through a workspace; integers make scores exact, and many equal.
whole, rows = torch.randint(-3, 4, (5, 16)), torch.randint(-3, 4, (300, 16))
wanted = mk.topk_search(whole.double(), rows.double(), 260, scale=1.0, backend="reference")
got = mk.topk_search(whole.float(), rows.float(), 260, scale=1.0, backend="triton")
found["many"] = torch.equal(got[1], wanted[1]) and torch.equal(got[0].double(), wanted[0])
# Of 16 bits the longest list is 256, beside which keys come in narrower blocks, the last of them short.
whole, rows = torch.randint(-3, 4, (5, 80)), torch.randint(-3, 4, (300, 80))
wanted = mk.topk_search(whole.double(), rows.double(), 200, scale=1.0, backend="reference")
got = mk.topk_search(whole.half(), rows.half(), 200, scale=1.0, backend="triton")
found["narrow"] = torch.equal(got[1], wanted[1]) and torch.equal(got[0].double(), wanted[0])
whole, halves = whole[:, :16], torch.randint(-3, 4, (2, 20, 8))
wanted = mk.product_key_search(whole.double(), halves.double(), 260, scale=1.0, backend="reference")
got = mk.product_key_search(whole.float(), halves.float(), 260, scale=1.0, backend="triton")
found["pairs"] = torch.equal(got[1], wanted[1]) and torch.equal(got[0].double(), wanted[0])
table = torch.randn(400, 8)
wanted = mk.product_key_read(whole.double(), halves.double(), table.double(), 260, scale=0.125, backend="reference")
got = mk.product_key_read(whole.float(), halves.float(), table, 260, scale=0.125, backend="triton")
found["read"] = torch.allclose(got.double(), wanted, rtol=0, atol=1e-5)
# What a slot keeps under a weight near 1 is the sum of the other weights, with all its digits.
mask = torch.zeros(40)
mask[7] = 30.0
kept = mk.softmax_write(v[0], k[0], q[0, :1], w[0, :1], slot_mask=mask, return_retained=True, backend="triton")[1][7]
s = 0.25 * (q[0, 0].double() @ k[0].double().T) + mask
share = s[torch.arange(40) != 7].exp().sum() / s.exp().sum()
found["kept"] = bool(0 < share < 1e-9 and abs(kept.double() / share - 1) < 1e-5)
# A scan of a memory takes slots in groups that bound its workspace: with no room at all, a group for every block.
leaves = [torch.randn(s).requires_grad_() for s in ((300, 8), (300, 16), (4, 16))]

def scanned(backend, leaves):
    v, k, q = leaves
    reads, new = mk.memory_scan(v, k, q, q.flip(0), v[:4], backend=backend)
    return [reads, new, *torch.autograd.grad(reads.square().sum() + new.square().sum(), leaves)]

def exact(function, leaves):
    wanted = function("reference", [leaf.detach().double().requires_grad_() for leaf in leaves])
    return all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5) for a, b in zip(function("triton", leaves), wanted))

sys.modules[f"{_triton.kernels().__name__}.memory_scan"].WORKSPACE = 1
found["groups"] = exact(scanned, leaves)
# A write with an erase tensor takes slots in groups too, the last of them shorter; given weights lie along the slots.
held = [torch.rand(s).requires_grad_() for s in ((300, 8), (4, 300), (4, 8), (4, 8))]

def written(backend, held):
    new = mk.slot_write(*held[:3], erase=held[3], backend=backend)
    return [new, *torch.autograd.grad(new.square().sum(), held)]

sys.modules[f"{_triton.kernels().__name__}.write_scan"].WORKSPACE = 1
found["written"] = exact(written, held)
# Products are as exact as torch is told to make them, in whichever of its words.
matmul, layout = torch.backends.cuda.matmul, sys.modules[f"{_triton.kernels().__name__}.layout"]
told = []
for digits, tell in (
    (True, lambda: torch.set_float32_matmul_precision("highest")),
    (False, lambda: torch.set_float32_matmul_precision("high")),
    (True, lambda: setattr(matmul, "allow_tf32", False)),
    (False, lambda: setattr(matmul, "allow_tf32", True)),
    (True, lambda: setattr(matmul, "fp32_precision", "ieee")),
    (False, lambda: setattr(matmul, "fp32_precision", "tf32")),
):
    tell()
    mk.softmax_read(q[0], k[0], v[0], backend="triton")
    told.append(layout.precision(q) == ("ieee" if digits else "tf32"))
found["told"] = all(told)
try:
    mk.sparse_read(v, torch.full((3, 5, 2), 40), torch.ones(3, 5, 2), backend="triton")
except RuntimeError as error:
    found["index"] = str(error)
print("RESULT" + json.dumps(found))
"""


def test_no_gaps_same_bits_one_graph_all_digits_and_guarded_indices():
    found = result_of(PROPERTIES)
    assert not found["gaps"] and not found["bits"]
    assert all(found[name] for name in ("compiled", "many", "narrow", "pairs", "read", "kept", "told"))
    assert found["groups"] and found["written"]
    assert "outside [-1, 40)" in found["index"]


def test_one_sentence_says_why_it_is_missing():
    row = next(b for b in backends.BACKENDS if b.name == "triton")
    if row.missing() is None:
        pytest.skip("there is a GPU here")
    assert row.missing() == "there is no CUDA device here"
    with pytest.raises(NotImplementedError, match="softmax_read: backend 'triton' is not available"):
        backends.select("softmax_read", "cuda", row.dtypes[0], "triton")


def test_everything_else_works_without_triton():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
import torch, memkernels as mk
from memkernels import backends
read = mk.softmax_read(torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 2))
print(read.sum().item(), next(b for b in backends.BACKENDS if b.name == "triton").missing())
"""
    done = run_python(code)
    assert done.stdout.strip() == "4.0 triton is not installed (pip install triton)", done.stdout + done.stderr


def test_a_row_stands_once_and_says_how_it_was_chosen():
    table = json.loads((ROOT / "triton_kernels" / "configs.json").read_text())
    assert len({(r["kernel"], r["arch"], r["bits"], r["width"]) for r in table}) == len(table)
    assert {r["source"] for r in table} <= {"measured", "arithmetic"}


def test_what_is_measured_for_a_row_is_a_call_that_takes_it():
    code = """
from bench import tune
rows = {(b, w) for k, a, b, w in tune.configs.table() if a != "interpreter"}
assert sorted(rows) == sorted((b, w) for b in (16, 32) for p, w in tune.served(b)), rows
"""
    done = run_python(code)
    assert done.returncode == 0, done.stdout + done.stderr
