"""What the compiler makes of every Triton kernel and configuration, for every architecture, on any machine.

The record of ``python -m bench.compile_check`` must have every class of dtype, width and architecture, without a fault.
Kernels are compared with it by hash: changed ones are compiled here, and a few unchanged ones, to check the record.
Where no source has changed since the last full comparison, only those few are compiled. Under another version of Triton
nothing can be compared; then every kernel is compiled in bfloat16 with rows of 64.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
from support import ROOT

triton = pytest.importorskip("triton")
LINES = [json.loads(line) for line in (ROOT / "bench" / "results" / "triton-compiled.jsonl").read_text().splitlines()]
HEAD, ROWS = LINES[0], [dict(zip(LINES[0]["columns"], line)) for line in LINES[1:]]
RECORDED = HEAD["triton"] == triton.__version__
SAMPLE = 6  # unchanged kernels that are compiled, spread over the record
# What the record must have: dtypes, widths of rows, architectures.
WHOLE = {
    *itertools.product(("bfloat16", "float16", "float32", "tf32"), (64, 128, 256, 512), ("90",)),
    *itertools.product(("bfloat16",), (128,), ("80", "100")),
}


def finished(*command: str) -> str:
    """Output of a process without Triton's interpreter; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = (sys.executable, *command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not RECORDED, reason=f"the record is of Triton {HEAD['triton']}")
def test_recorded_kernels_need_no_spills_fit_shared_memory_and_use_the_matrix_unit():
    assert {tuple(kind) for kind in HEAD["classes"]} >= WHOLE
    finished("-m", "bench.compile_check", "--recorded", "--sample", str(SAMPLE))


@pytest.mark.skipif(RECORDED, reason="the record has all of this")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_kernels_under_another_version_of_triton(arch):
    code = """
import sys
import torch
from bench.compilation import kernels
from bench.compile import compiled, launched
from bench.launches import launches
arch, names, reached = sys.argv[1], [], set()
for one in launches(torch.bfloat16, 64, "meta"):
    own = {noted.kernel for noted in launched(one, arch)}
    if one.main or own - reached:
        names.append(one.name)
        reached |= own
assert reached == kernels(), reached ^ kernels()
found = list(compiled(arch, "bfloat16", 64, tuple(names)))
faults = [f"{one}: {', '.join(one.faults())}" for one in found if one.faults()]
assert not faults, "\\n".join(faults)
"""
    finished("-c", code, arch)


def test_nothing_recorded_spills_or_is_serialised():
    """On Hopper, where warp-group products may overlap; the report of ptxas says where they may not."""
    assert not [row for row in ROWS if row["serialised"] or row["spills"]]
    assert [row for row in ROWS if row["matrix"] == "wgmma.mma_async"], "there is nothing that could be serialised"


def test_serialised_products_are_read_off_the_report():
    from bench.compilation import serialised

    said = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert serialised(f"ptxas info    : 0 bytes gmem\n{said}\nptxas info    : Used 90 registers")
    assert not serialised("ptxas info    : Used 90 registers, used 1 barriers")


def test_the_read_multiplies_by_warp_groups_on_hopper():
    reads = [row for row in ROWS if row["kernel"] == "softmax_read_kernel" and row["arch"] == "90"]
    blocks = [row["matrix"] for row in reads if (row["dtype"], row["width"]) == ("bfloat16", 64)]
    assert "wgmma.mma_async" in blocks


def test_a_hash_knows_code_and_not_where_it_stands():
    code = """
import importlib, types
from bench import compilation
from memkernels import _triton

tiles = importlib.import_module(f"{_triton.kernels().__name__}.tiles")
build = dict(function=tiles.tile, signature={"rows": "*fp32"}, constants={}, attributes={}, options={"num_warps": 4})
key = lambda: compilation.Build(types.SimpleNamespace(**build, target="sm_90")).key
first = key()
for change, same in (
    (lambda f: setattr(f, "starting_line_number", f.starting_line_number + 7), True),
    (lambda f: f._unsafe_update_src(f.src.replace(":\\n", ":  # said\\n", 1)), True),
    (lambda f: f._unsafe_update_src(f.src.replace("start +", "start -")), False),
):
    change(tiles.tile)
    compilation._sources.cache_clear()
    assert (key() == first) is same
"""
    finished("-c", code)


def test_all_classes_are_compared_where_a_source_has_changed():
    code = """
from pathlib import Path
from bench import compile_check as check

present, read = check.sources(), Path.read_text
for name in ("configs.json", "layout.py", "launches.py"):
    Path.read_text = lambda path: read(path) + " " * (path.name == name)
    assert check.sources() != present, name
Path.read_text = read
recorded, asked = check.Record(), []
check.compiled = lambda arch, dtype, width, known: asked.append((dtype, width, arch)) or ()
check.sources = lambda: recorded.compared
assert check.main(["--recorded"]) == 0 and not asked
check.main(["--recorded", "--sample", "2"])
assert 0 < len(asked) < 4
asked.clear()
check.sources = lambda: "changed"
check.main(["--recorded"])
assert set(asked) == recorded.classes
"""
    finished("-c", code)
