"""Rules of the repository: direction and time of imports, public signatures, docstrings, length of files."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from promised import HELPERS, PROMISED, SIGNATURES
from support import ROOT, run_python

import memkernels as mk
from memkernels.registration import OPS

PACKAGE = ROOT / "memkernels"
# Layer -> the layers below it, which it may import beside itself.
LAYERS = {
    "_native": {"_host", "_stamp"},
    "_axes": set(),
    "spec": {"_axes", "_torch"},
    "_cuda": {"_native"},
    "_triton": set(),
    "_torch": set(),
    "_derivatives": {"_torch", "spec"},
    "backends": {"_cuda", "_native", "_torch", "_triton", "spec"},
    "_flops": {"spec"},
    "_collectives": {"_torch", "spec"},
    "_over_ranks": {"_collectives"},
    "_cuts": {"_collectives", "spec"},
    "_over_slots": {"_collectives", "_over_ranks", "spec"},
    "sharding": {"_collectives", "_cuts", "_over_ranks", "_over_slots", "spec"},
    "registration": {"_derivatives", "_flops", "_torch", "spec", "backends", "sharding"},
    "ops": {"_torch", "spec", "registration"},
    "nn": {"", "ops", "spec", "backends", "store"},  # of the store only at a call: NgramMemory.save_table
    "optim": {"ops", "spec", "_native"},
    "models": {"", "nn", "ops", "spec", "backends"},
    "integrations": {"", "models", "nn", "ops", "spec", "backends", "store", "_collectives", "_over_ranks"},
    "store": {"", "nn", "ops", "spec", "backends", "_native", "_torch"},
    "testing": {"_axes", "spec", "backends", "registration"},
    "_info": {"", "_native", "backends", "registration"},
}


def imports(path: Path) -> set[str]:
    """The parts of memkernels that a file imports, by their first name ("" is the package itself)."""
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            found |= {".".join([*base, a.name]) for a in node.names}
    own = {f"{name}.".split(".")[1] for name in found if name.split(".")[0] == "memkernels"}
    return {"" if name in {*mk.__all__, "__version__"} else name for name in own}


def files(layer: str) -> list[Path]:
    folder = PACKAGE / layer
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [p for p in [PACKAGE / f"{layer}.py"] if p.exists()]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    for path in files(layer):
        assert imports(path) <= LAYERS[layer] | {layer}, path


def test_every_layer_is_declared():
    layers = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    top = {"__init__", "__main__", "demo"}  # these, and the private modules of the demo, may import everything
    assert {name for name in layers - top if not name.startswith("_")} <= set(LAYERS)


def test_triton_kernels_never_import_memkernels():
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        assert not imports(path), path


def test_import_is_fast():
    """At most 0.3 s beyond torch, the median of three fresh processes; processor time, as other tests run beside it."""
    code = "import time, torch; t = time.process_time(); import memkernels; print(time.process_time() - t)"
    seconds = [float(run_python(code).stdout) for _ in range(3)]
    assert statistics.median(seconds) <= 0.3, seconds


def test_import_does_not_load_what_it_does_not_need():
    heavy = (
        "memkernels.nn",
        "memkernels.testing",
        "memkernels._show",
        "matplotlib",
        "transformers",
        "triton",
        "numpy.testing",
    )
    assert run_python(f"import sys, memkernels; print([m for m in {heavy} if m in sys.modules])").stdout.strip() == "[]"


# --- public functions ---


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name):
    signature = inspect.signature(getattr(mk, name))
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert parameters[-1].name == "backend" and parameters[-1].default is None
    assert parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY
    assert str(inspect.Signature(parameters[:-1])) == SIGNATURES[name]


def test_every_op_and_nothing_else_is_public():
    own = {name for name, op in OPS.items() if not op.twin_of}
    callable_ones = own | {f"{n}_" for n, op in OPS.items() if op.inplace}
    assert set(SIGNATURES) <= set(mk.ops.__all__) == callable_ones | set(HELPERS)
    assert {op.twin_of for op in OPS.values()} - {""} < own
    assert set(mk.__all__) == {*mk.ops.__all__, "show", "use_backend"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstrings_say_what_a_caller_needs(name):
    function = getattr(mk, name)
    text = inspect.getdoc(function)
    wanted = ["Returns", "Raises"] + ([] if name.endswith("_") else ["Args:", "Returns:", "Raises:", "Source:"])
    for part in wanted:
        assert part in text, part
    if name.endswith("_"):
        assert f":func:`{name[:-1]}`" in text
        return
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", text), parameter
    module = inspect.getmodule(function)
    assert module.__doc__ and "Source" in module.__doc__ and "=" in module.__doc__, "the module states the equation"
    assert "``" in text.split("Args:")[0], "the docstring states the equation before the arguments"


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if not op.twin_of])
def test_declarations_match_their_reference(op):
    """The reference takes the tensors and options in the declared order; the public function knows every tensor."""
    declared = OPS[op]
    names = [*(a.name for a in declared.args), *(name for name, _ in declared.params)]
    assert list(inspect.signature(declared.reference).parameters) == names
    if declared.selected is not None:
        assert list(inspect.signature(declared.selected).parameters) == [*names, "indices"]
    public = set(inspect.signature(getattr(mk, op)).parameters)
    assert {a.name for a in declared.args} <= public
    assert declared.equation or op not in PROMISED
    assert set(declared.saved) <= {o.name for o in declared.outputs}
    assert set(declared.autocast) <= {a.name for a in declared.args}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_sets_up_a_missing_environment_again(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "csrc/kernels.cmake", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".build").mkdir()
    (tmp_path / ".venv").mkdir()

    def make(*arguments: str) -> str:
        how = {"cwd": tmp_path, "env": {"PATH": os.environ["PATH"]}, "capture_output": True, "text": True}
        return subprocess.run(["make", "PYTHON=", *arguments], check=True, **how).stdout

    make("--touch", "dev")  # everything counts as made
    assert "-m venv .venv" not in make("--dry-run", "demo")
    shutil.rmtree(tmp_path / ".venv")
    assert "-m venv .venv" in make("--dry-run", "demo")


def test_files_stay_readable():
    """A file that outgrows about 400 lines is two things."""
    for folder in ("memkernels", "tests", "triton_kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 450, f"{path}: {lines} lines"
