"""Types as a user's checker sees them: results by flag, submodules, and mistakes that are found."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from promised import SIGNATURES
from support import ROOT, run_python

import memkernels as mk

DATA = ROOT / "tests" / "data"
MISTAKES = {
    number for number, line in enumerate((DATA / "mistyped_user.py").read_text().splitlines(), 1) if "# wrong" in line
}


def mypy(script: Path, folder: Path) -> dict[int, str]:
    """Line -> error. The package is found on the interpreter's path, like an installed one, so py.typed is needed."""
    command = [sys.executable, "-m", "mypy", "--strict", "--hide-error-context", "--no-error-summary", "--no-pretty"]
    command += ["--cache-dir", str(folder), "--output", "json", str(script)]
    done = _run(command)
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["line"]: row["message"] for row in found if row["severity"] == "error"}


def pyright(script: Path, folder: Path) -> dict[int, str]:
    done = _run([sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(script)])
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    errors = [row for row in report["generalDiagnostics"] if row["severity"] == "error"]
    return {row["range"]["start"]["line"] + 1: row["message"] for row in errors}


def _run(command: list[str]) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, cwd=DATA, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(params=(mypy, pyright), ids=lambda checker: checker.__name__)
def checker(request):
    name = request.param.__name__
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    started = _run([sys.executable, "-m", name, "--version"])
    if started.returncode:  # pyright fetches the program that it wraps when it is first called
        pytest.skip(f"{name} does not start: {(started.stderr.splitlines() or ['no reason given'])[-1]}")
    return request.param


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A shared cache of what a checker learnt about torch, which takes most of its time."""
    return tmp_path_factory.mktemp("types")


def test_a_users_script_is_clean(checker, cache):
    assert checker(DATA / "typed_user.py", cache) == {}


def test_a_users_mistakes_are_found(checker, cache):
    assert set(checker(DATA / "mistyped_user.py", cache)) == MISTAKES


def test_the_script_calls_every_public_function():
    text = (DATA / "typed_user.py").read_text()
    assert not [name for name in (*SIGNATURES, "use_backend") if f"mk.{name}(" not in text]


# Everything whose result depends on a flag.
FLAGGED = [
    function
    for function in (
        *(getattr(mk, name) for name in SIGNATURES),
        *(
            member
            for name in mk.nn.__all__
            for _, member in inspect.getmembers(getattr(mk.nn, name), inspect.isfunction)
        ),
    )
    if any(name.startswith("return_") for name in inspect.signature(function).parameters)
]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
@pytest.mark.parametrize("function", FLAGGED, ids=lambda f: f.__qualname__)
def test_overloads_differ_from_the_function_in_their_flags_alone(function):
    def rest(f) -> list[inspect.Parameter]:
        return [p for p in inspect.signature(f).parameters.values() if not p.name.startswith("return_")]

    overloads = typing.get_overloads(function)
    assert len(overloads) >= 3, "one for False, one for True, one for a bool that is not known"
    assert all(rest(overload) == rest(function) for overload in overloads)
    for one, other in itertools.combinations(map(inspect.signature, overloads), 2):
        if one.return_annotation == other.return_annotation:  # two flags that each add a tensor give the same pair
            assert sum(p != other.parameters[name] for name, p in one.parameters.items()) >= 2


def test_the_marker_of_a_typed_package_is_there_and_is_packaged():
    assert (ROOT / "memkernels" / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "setup.py").read_text()


def test_dir_names_what_there_is():
    """Before any submodule was used, and without loading one."""
    code = "import sys, memkernels as mk; print(*dir(mk)); print('memkernels.nn' in sys.modules)"
    names, loaded = run_python(code).stdout.splitlines()
    assert {*mk.__all__, "nn", "models", "store", "testing", "ops", "__version__"} <= set(names.split())
    assert loaded == "False"
    assert all(hasattr(mk, name) for name in names.split())
