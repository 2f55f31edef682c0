"""No list names the ops of the Triton backend: registration, compilation and tuning find what an op's file declares."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from support import ROOT, run_python

from memkernels import _triton

pytest.importorskip("triton")
package = _triton.kernels()
FOLDER = ROOT / "triton_kernels"

# An op with a forward launcher only.
FILE = """
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declare import Example, Inputs, operator
from .launch import launch, plan


@triton.jit
def doubled_kernel(x, out, T, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + t, 2.0 * tl.load(x + t, mask=t < T, other=0.0), mask=t < T)


@operator
def doubled(x: Tensor) -> Tensor:
    p, out, x = plan("doubled", 1, x), torch.empty(x.shape, dtype=x.dtype, device=x.device), x.contiguous()
    block = p.config.block_t
    launch(doubled_kernel, triton.cdiv(x.numel(), block), x, out, x.numel(), plan=p, BLOCK=block)
    return out


def examples(x: Inputs) -> Iterator[Example]:
    yield Example(doubled, (x(2, x.tokens),), main=True)
"""
DECLARED = """
import importlib.util, json, sys
import torch
name, folder = "memkernels.triton_kernels", sys.argv[1]
spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])
package = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)

from memkernels import backends
from memkernels.registration import register
from memkernels.spec import Arg, Op, Out
register(Op("doubled", (Arg("x", "T", "tokens", "lead"),), (Out("twice", "T"),), lambda x: 2 * x))
"""


@pytest.fixture(scope="module")
def dropped(tmp_path_factory) -> Path:
    """A copy of the kernels with one file more, and its rows in the table."""
    folder = tmp_path_factory.mktemp("copy") / "triton_kernels"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "doubled.py").write_text(FILE)
    table = json.loads((folder / "configs.json").read_text())
    table += [{**row, "kernel": "doubled"} for row in table if row["kernel"] == "merge_reads"]
    (folder / "configs.json").write_text(json.dumps(table))
    return folder


def answer(folder: Path, code: str, **environment: str):
    done = run_python(DECLARED + code, str(folder), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_file_that_is_dropped_in_is_compiled_and_measured(dropped):
    launched, kernels, bfloat16, tuned, in_digest = answer(
        dropped,
        """
from bench import compilation, compile, compile_check, launches, tune
(one,) = (one for one in launches.launches(torch.bfloat16, 64, "meta") if one.name == "doubled")
launched = [(noted.kernel, noted.row) for noted in compile.launched(one, "90")]
(found,) = compile.compiled("90", "bfloat16", 64, ("doubled",))
before, path = compile_check.sources(), f"{folder}/doubled.py"
open(path, "a").write("# changed\\n")
rows = tune.takers("90", 16, 64)
print(json.dumps([launched, sorted(compilation.kernels()), [found.kernel, found.faults()],
                  rows["doubled", "90", 16, 64], compile_check.sources() != before]))
""",
        TRITON_INTERPRET="0",
    )
    assert launched == [["doubled_kernel", ["doubled", "90", 16, 64]]]
    assert "doubled_kernel" in kernels and bfloat16 == ["doubled_kernel", []]
    assert tuned == ["doubled"] and in_digest


def test_a_file_that_is_dropped_in_is_registered_in_the_directions_that_it_has(dropped):
    gaps, result = answer(
        dropped,
        """
row = next(b for b in backends.BACKENDS if b.name == "triton")
x = torch.arange(40.0)
result = torch.ops.memkernels_triton.doubled(x)
gaps = [row.gap("doubled", "cpu", torch.float32, direction) for direction in ("forward", "backward")]
print(json.dumps([gaps, torch.equal(result, 2 * x)]))
""",
        TRITON_INTERPRET="1",
    )
    assert gaps == [None, "doubled: backend 'triton' has no backward kernel on cpu"] and result


def test_what_is_found_in_the_text_is_what_the_files_mark():
    """The text is searched, because parsing takes a hundred times as long; so a mark must have this one form."""
    marked = {}
    for file in FOLDER.glob("*.py"):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        own = [f.name for f in functions if any(ast.unparse(mark) == "operator" for mark in f.decorator_list)]
        marked |= dict.fromkeys(own, file.stem)
        assert ("examples" in {f.name for f in functions}) == bool(own), file
    assert marked == package.operators()


def test_every_kernel_is_launched_and_every_row_of_the_table_is_taken():
    done = run_python(
        """
import json
from bench import tune
from bench.compilation import kernels
from bench.compile import launched
from bench.launches import launches
reached, rows = set(), set()
for bits in (16, 32):
    for precision, width in tune.served(bits):
        with tune.matmul_precision(precision):
            rows |= tune.takers("90", bits, width).keys()
            for one in launches(tune.DTYPE[bits], width, "meta"):
                reached |= {noted.kernel for noted in launched(one, "90")}
print(json.dumps([sorted(kernels() ^ reached), sorted(rows)]))
""",
        TRITON_INTERPRET="0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left, rows = json.loads(done.stdout)
    assert not left
    table = json.loads((FOLDER / "configs.json").read_text())
    taken = {(kernel, bits, width) for kernel, _, bits, width in rows}
    for arch in ("80", "90", "100"):
        there = {(row["kernel"], row["bits"], row["width"]) for row in table if row["arch"] == arch}
        assert sorted(there) == sorted(taken), arch
    shown = {row["kernel"] for row in table if row["arch"] == "interpreter"}
    assert shown == {kernel for kernel, *_ in taken}
