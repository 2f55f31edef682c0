"""Every command prints its help without its optional packages, and writes no file."""

from __future__ import annotations

import json

import pytest
from support import ROOT, run_python

EXTRAS = ("matplotlib", "tqdm", "faiss", "triton", "pybind11", "pytest")


def commands() -> list[str]:
    """The package with each of its commands, and every other file that can be run."""
    found = ["memkernels", "memkernels info", "memkernels check", "memkernels demo"]
    for folder in ("bench", "docs", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if '__name__ == "__main__"' in path.read_text():
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
                found.append(str(path) if folder == "examples" else module)
    return found


# All in one process, so that torch is imported once.
RUN = f"""
import contextlib, io, json, runpy, sys
for name in {EXTRAS}:
    sys.modules[name] = None  # an import of it fails
results = {{}}
for command in json.loads(sys.argv[1]):
    target, *words = command.split(" ")
    sys.argv = [target, *words, "--help"]
    said, status = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            if target.endswith(".py"):
                runpy.run_path(target, run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    results[command] = [status, said.getvalue()]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """Command -> exit status and what it printed; and the folder that they ran in."""
    folder = tmp_path_factory.mktemp("help")
    code = f"import os; os.chdir({str(folder)!r})\n{RUN}"
    done = run_python(code, json.dumps(commands()))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


@pytest.mark.parametrize("command", commands())
def test_help_is_printed(helps, command):
    status, text = helps[0][command]
    assert status == 0, status
    assert text.startswith("usage: ")
    assert "--help" in text


def test_help_writes_no_file(helps):
    assert not list(helps[1].iterdir())


LACKS = {"memkernels demo": "matplotlib", "bench.report FILE": "matplotlib", "bench.compile_check": "triton"}


@pytest.mark.parametrize("command", LACKS)
def test_a_run_without_a_package_says_so_in_one_sentence(command):
    target, *words = command.split(" ")
    code = f"import runpy, sys; sys.modules[{LACKS[command]!r}] = None; sys.argv = {[target, *words]}; "
    done = run_python(f"{code} runpy.run_module({target!r}, run_name='__main__', alter_sys=True)")
    assert done.returncode == 2
    needs = f"needs {LACKS[command]}, which is not installed (pip install {LACKS[command]})"
    assert done.stderr == f"python -m {command.removesuffix(' FILE')}: {needs}\n"
