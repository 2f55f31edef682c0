"""The C++ half: includes run one way, a header's name says where it is, and no line is wider than the limit."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
from support import ROOT

CSRC = ROOT / "csrc"
# Folder of csrc -> the layers below it, which it may include beside itself.
LAYERS = {
    "params": set(),
    "host": set(),
    "cpu/tiles": {"params"},
    "cpu": {"cpu/tiles", "params"},
    "table": {"params"},
    "cuda/tiles": {"params"},
    "cuda": {"cuda/tiles", "params"},
    "binding": {"cuda/tiles", "params"},
    "binding/cpu": {"binding", "cpu/tiles", "host", "params", "table"},
    "binding/cuda": {"binding", "params"},
}
SUFFIXES = (".h", ".cpp", ".cu")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
OUTSIDE = {"simt.h"}  # the runtime of tests/simt, which replaces that of CUDA
WIDTH = 120  # clang-format keeps code within it, but not comments, nor CMake
NATIVE = ("csrc", "tests/native", "tests/simt", "bench/gpu/stand_in")


def sources(csrc: Path) -> dict[str, list[Path]]:
    """The folders of ``csrc``, and their files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(csrc.rglob("*")):
        if path.suffix in SUFFIXES:
            found.setdefault(path.parent.relative_to(csrc).as_posix(), []).append(path)
    return found


def climbing(csrc: Path) -> list[str]:
    """The includes that no layer allows."""
    found = []
    for folder, paths in sources(csrc).items():
        for path in paths:
            for name in INCLUDE.findall(path.read_text()):
                target = Path(name).parent.as_posix()
                if name in OUTSIDE or target in {folder, *LAYERS.get(folder, ())}:
                    continue
                found.append(f"{path.relative_to(csrc)} includes {name}")
    return found


def test_includes_run_one_way():
    assert not climbing(CSRC)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_has_files(layer):
    assert sources(CSRC).get(layer), f"csrc/{layer} is empty"


def test_every_folder_is_a_layer():
    assert set(sources(CSRC)) == set(LAYERS)


def test_layers_have_an_order():
    """No layer includes, directly or not, a layer that includes it."""
    below = {layer: set(allowed) for layer, allowed in LAYERS.items()}
    for _ in LAYERS:
        below = {layer: allowed.union(*(below[a] for a in allowed)) for layer, allowed in below.items()}
    assert not [layer for layer in LAYERS if layer in below[layer]]


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "tests").glob("test_simt*.py")))
def test_seeded_faults_fit_the_kernels(module):
    """CI seeds few of them, so a text that a kernel no longer has would not be missed there."""
    found = importlib.import_module(module)
    for faults in [value for name, value in vars(found).items() if name.endswith("FAULTS")]:
        for name, fault in faults.items():
            at = next((i for i, part in enumerate(fault) if part.endswith((".h", ".cu"))), None)
            file, text = (found.KERNEL, fault[0]) if at is None else (fault[at], fault[at + 1])
            (source,) = (CSRC / "cuda").rglob(file)
            assert source.read_text().count(text) == 1, (name, file)


def test_no_two_headers_share_a_name():
    names = Counter(path.name for path in CSRC.rglob("*.h"))
    assert not [name for name, count in names.items() if count > 1]


def wide_lines(root: Path) -> list[str]:
    """Where a line of C, C++, CUDA or CMake is wider than ``WIDTH``."""
    paths = [path for folder in NATIVE for path in sorted((root / folder).rglob("*"))]
    found = []
    for path in [*paths, root / "CMakeLists.txt"]:
        if path.suffix in {*SUFFIXES, ".c", ".cmake", ".txt"}:
            name = path.relative_to(root).as_posix()
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [f"{name}:{number}: {len(line)} columns" for number, line in lines if len(line) > WIDTH]
    return found


def test_no_line_is_too_wide():
    assert not wide_lines(ROOT)


@pytest.mark.parametrize(
    "file", ["csrc/params/view.h", "tests/simt/CMakeLists.txt", "bench/gpu/stand_in/device.c", "CMakeLists.txt"]
)
def test_a_wide_line_is_noticed(tmp_path, file):
    (tmp_path / "CMakeLists.txt").write_text("")
    changed = tmp_path / file
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text("x" * WIDTH + "\n" + "x" * (WIDTH + 1) + "\n")
    assert wide_lines(tmp_path) == [f"{file}:2: {WIDTH + 1} columns"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("params/view.h", '#include "binding/binding.h"'),
        ("params/view.h", '#include "cpu/tiles/simd.h"'),
        ("cpu/tiles/simd.h", '#include "cpu/gated_write.h"'),
        ("cuda/tiles/numbers.h", '#include "cpu/tiles/rows.h"'),
        ("cpu/address.cpp", '#include "host/processor.h"'),
        ("cpu/address.cpp", '#include "tiles/simd.h"'),
    ],
)
def test_an_include_that_climbs_is_noticed(tmp_path, file, line):
    changed = tmp_path / file
    changed.parent.mkdir(parents=True)
    changed.write_text(f"#pragma once\n{line}\n" + (CSRC / file).read_text())
    assert len(climbing(tmp_path)) == 1
