"""The rehearsal of a check on a GPU: its parts that need no CUDA build of torch. ``make gpu-rehearsal`` runs all."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from support import ROOT

from bench.gpu import rehearsal, wheels

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")


@pytest.fixture
def torch_with(tmp_path, monkeypatch):
    """Makes a stand-in for the folder of torch, whose libraries define the given symbols."""
    libraries = tmp_path / "torch" / "lib"
    libraries.mkdir(parents=True)
    monkeypatch.setattr(rehearsal, "torch_folder", lambda version: tmp_path)

    def compiled(name: str, text: str):
        path = libraries / f"lib{name}.so"
        source = tmp_path / f"{name}.c"
        source.write_text(text)
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", path], check=True)
        return path

    for name in ("torch_cpu", "torch_cuda", "c10"):
        compiled(name, f"void {name}_is_here(void) {{}}")
    return compiled


@compiler
def test_a_symbol_that_torch_lacks_is_named(torch_with):
    text = "void torch_list_size(void); void aoti_torch_new_thing(void);"
    library = torch_with("own", f"{text} void f(void) {{ torch_list_size(); aoti_torch_new_thing(); }}")
    assert rehearsal.unresolved(library, "2.11.0") == ["aoti_torch_new_thing", "torch_list_size"]
    torch_with("torch_cuda", "void torch_list_size(void) {}")
    assert rehearsal.unresolved(library, "2.11.0") == ["aoti_torch_new_thing"]


@compiler
def test_a_library_that_takes_nothing_from_torch_proves_nothing(torch_with):
    with pytest.raises(rehearsal.Failed, match="the wrong file"):
        rehearsal.unresolved(torch_with("own", "void f(void) {}"), "2.11.0")


def test_telling_cases_compile_few_kernels(monkeypatch):
    """Each kernel takes a second of a core to compile; needless specialisation would make them thousands."""
    totals = rehearsal.counted(2)
    assert 100 < totals[0] < totals[1]
    assert totals[1] <= rehearsal.MOST_BUILDS[1]
    monkeypatch.setattr(rehearsal, "MOST_BUILDS", (totals[0] - 1,))
    with pytest.raises(rehearsal.Failed, match="what is specialised"):
        rehearsal.counted(1)


def test_a_version_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMKERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="torch 0.0.1 cannot be had by pip: ") as caught:
        wheels.torch_folder("0.0.1")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "what is not whole must not stay"


def test_help_needs_nothing(tmp_path):
    """No torch for CUDA, no nvcc, no network."""
    command = [sys.executable, "-m", "bench.gpu.rehearsal", "--help"]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "MEMKERNELS_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
