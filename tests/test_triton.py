"""The Triton backend without a GPU: the contract grid in Triton's interpreter, and compilation ahead of time.

The interpreter decides when Triton is imported, so it has processes of its own. It runs float32: it multiplies bfloat16
as raw bits, so 16-bit kernels are proved by what the compiler makes of them, and on a GPU by ``make gpu-check``.
``python -m bench.compile_check`` compiles all that is only sampled here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import ROOT, run_python

from memkernels import _triton, backends
from memkernels.registration import OPS
from memkernels.testing import cases

pytest.importorskip("triton")
CLAIMED = tuple(_triton.kernels().OPERATORS)
INTERPRETER = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
# Cases that only repeat others on larger memories: one of them per op is enough at the interpreter's speed.
LONG = (
    "1000 tokens",
    "several panels of tokens",
    "slots just above many blocks",
    "scores ascend",
    "every size 63",
    "many parts",
)
ONE_LONG = "one token, many slots"
# Once more in float16, whose numbers the interpreter does multiply.
HALF = ("every size 3", "float mask", "content in float32")

GRID = """
import json, sys
import torch
from memkernels.registration import OPS
from memkernels.testing import Subject, cases

op, names = OPS[sys.argv[1]], json.loads(sys.argv[2])
result = {}
for case in cases(op):
    for dtype in names.get(case.name, ()):
        rows = Subject(op, case, getattr(torch, dtype), "cpu").rows("triton")
        result[f"{case.name}, {dtype}"] = [str(row) for row in rows if not row.passed]
print("RESULT" + json.dumps(result))
"""


def result_of(code: str, *args: str) -> object:
    done = run_python(code, *args, timeout=900, **INTERPRETER)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])


@pytest.fixture(scope="module")
def grids():
    """op -> its grid, as it runs: one process per op, as many at once as there are processors, the longest first."""
    longest = ("gated_write", "topk_read", "topk_search")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {op: pool.submit(grid, op) for op in sorted(CLAIMED, key=lambda op: op not in longest)}
        pool.shutdown(cancel_futures=True)


def grid(op):
    wanted = {}
    for case in cases(OPS[op]):
        if not case.mixed and case.name not in LONG:
            wanted[case.name] = ["float32"]
        if case.name in HALF:
            wanted[case.name] = [*wanted.get(case.name, ()), "float16"]
    assert ONE_LONG in wanted or not {"T", "N"} <= {x for a in OPS[op].args for x in a.axes.split()}
    failures = result_of(GRID, op, json.dumps(wanted))
    assert len(failures) == sum(map(len, wanted.values()))
    return failures


@pytest.mark.parametrize("op", CLAIMED)
def test_the_contract_grid_in_the_interpreter(op, grids):
    failures = grids[op].result()
    assert not any(failures.values()), "\n".join(row for rows in failures.values() for row in rows)


PROPERTIES = """
import json
import torch
import memkernels as mk
from memkernels import _triton, backends
from memkernels.registration import OPS
from memkernels.testing import CASES, Subject

row = next(b for b in backends.BACKENDS if b.name == "triton")
case = next(c for c in CASES if c.name == "usual")
found = {"gaps": [], "bits": []}
for op in (OPS[name] for name in _triton.kernels().OPERATORS):
    for dtype in row.dtypes:
        found["gaps"] += [g for d in backends.DIRECTIONS if (g := row.gap(op.name, "cpu", dtype, d))]
    if op.inplace and (gap := row.gap(op.name + "_", "cpu")):
        found["gaps"].append(gap)
    subject = Subject(op, case, torch.float32, "cpu")
    runs = []
    for _ in range(2):
        tensors = [t if t is None else t.detach() for t in subject.inputs.tensors]
        leaves = [tensors[i].requires_grad_() for i in subject.wanting]
        results = getattr(torch.ops.memkernels_triton, op.name)(*tensors, *subject.inputs.params)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        pairs = [(results[i], d) for i, d in subject.cotangents(results).items()]
        runs.append([*results, *torch.autograd.grad([r for r, _ in pairs], leaves, [d for _, d in pairs])])
    if not all(torch.equal(a, b) for a, b in zip(*runs)):
        found["bits"].append(op.name)
q, k, v = torch.randn(3, 5, 16), torch.randn(3, 40, 16), torch.randn(3, 40, 8)

def reading(q, k, v):
    with mk.use_backend("triton"):
        return mk.softmax_read(q, k, v).sum() + mk.topk_read(q, k, v, 3).sum()

compiled = torch.compile(reading, fullgraph=True, backend="aot_eager")
found["compiled"] = bool(torch.allclose(compiled(q, k, v), reading(q, k, v)))
try:
    mk.sparse_read(v, torch.full((3, 5, 2), 40), torch.ones(3, 5, 2), backend="triton")
except RuntimeError as error:
    found["index"] = str(error)
print("RESULT" + json.dumps(found))
"""


def test_no_gaps_same_bits_one_graph_and_guarded_indices():
    found = result_of(PROPERTIES)
    assert not found["gaps"] and not found["bits"] and found["compiled"]
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
print(read.sum().item(), backends.BACKENDS[1].missing())
"""
    done = run_python(code)
    assert done.stdout.strip() == "4.0 triton is not installed (pip install triton)", done.stdout + done.stderr


# One class per architecture; the calls that between them launch every kernel but variants of a mask or a form of erase.
SAMPLE = [("80", "bfloat16", 64), ("90", "bfloat16", 64), ("100", "bfloat16", 64)]


@pytest.mark.parametrize(("arch", "dtype", "width"), SAMPLE)
def test_kernels_compile_without_spills_within_shared_memory_on_the_matrix_unit(arch, dtype, width):
    code = """
import sys
from bench.compile import PRODUCTS, ROWS, compiled
from bench.launches import launches
arch, dtype, width = sys.argv[1:]
names = tuple(one.name for one in launches(__import__("torch").float32, 64, "meta") if one.main)
found = list(compiled(arch, dtype, int(width), names))
faults = [f"{one}: {', '.join(one.faults())}" for one in found if one.faults()]
assert not faults, "\\n".join(faults)
rest = set(ROWS) - {one.kernel for one in found}
assert rest <= {"write_merge_kernel", "rank_kernel", "merge_kernel"}, rest
if arch == "90" and dtype == "bfloat16":
    assert next(one for one in found if one.kernel == "softmax_read_kernel").matrix.startswith("wgmma")
print(len(found), "kernels")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, arch, dtype, str(width)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_has_a_row_for_every_class():
    table = json.loads((ROOT / "triton_kernels" / "configs.json").read_text())
    keys = {(r["kernel"], r["arch"], r["bits"], r["width"]) for r in table}
    assert len(keys) == len(table)
    assert {r["source"] for r in table} <= {"measured", "arithmetic"}
    for kernel in {r["kernel"] for r in table}:
        for arch in ("80", "90", "100"):
            assert {(kernel, arch, bits, width) for bits in (16, 32) for width in (64, 128, 256, 512)} <= keys, kernel
        assert (kernel, "interpreter", 32, 64) in keys, kernel
