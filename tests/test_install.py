"""Installing as a user does: sdist, wheel, a fresh environment, the checkout beside it; and the errors of a failure.

Without a network: the requirements of a build are linked from this environment, and a path file makes torch visible.
The native code is compiled once, without optimisation.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support import ROOT

pytestmark = pytest.mark.slow

PACKAGES = Path(sysconfig.get_path("purelib"))
# As pip's isolated build does, hide the packages of the environment; the requirements of the build are elsewhere.
HIDE = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(PACKAGES)!r} and '/dist-packages' not in p]"
REQUIRED = ("setuptools", "setuptools-*", "_distutils_hack", "pkg_resources", "cmake", "cmake-*", "ninja", "ninja-*")
BACKEND = "import sys; sys.path.insert(0, 'build_backend'); import memkernels_build as b; "
HOOK = BACKEND + "print(getattr(b, sys.argv[1])(sys.argv[2]))"
USE = """
import torch, memkernels as mk
q, k, v = (torch.randn(n, 16) for n in (3, 50, 50))
with mk.use_backend("cpu"):
    read = mk.softmax_read(q, k, v)
wanted = torch.softmax(q.double() @ k.double().T / 4, -1) @ v.double()
assert (read - wanted).abs().max() < 1e-5
import memkernels.triton_kernels
assert "softmax_read" in memkernels.triton_kernels.operators()
print(mk.__file__)
"""
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "_lib", "*.so", "results")


def say(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    # A new session has no terminal that a build could write to.
    how = {"capture_output": True, "text": True, "check": False, "start_new_session": True, "timeout": 1800}
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "TORCH_DIR", "VIRTUAL_ENV")}
    return subprocess.run([*map(str, command)], cwd=cwd, env={**clean, **environment}, **how)


def done(*command, cwd: Path, **environment: str) -> str:
    ended = say(*command, cwd=cwd, **environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("install")


@pytest.fixture(scope="module")
def checkout(work) -> Path:
    """The checkout as it is cloned: nothing is built in it."""
    shutil.copytree(ROOT, work / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))
    return work / "checkout"


@pytest.fixture(scope="module")
def isolated(work) -> str:
    """The PYTHONPATH of an isolated build."""
    folder = work / "overlay"
    folder.mkdir()
    for name in REQUIRED:
        for found in PACKAGES.glob(name):
            (folder / found.name).symlink_to(found)
    (folder / "sitecustomize.py").write_text(HIDE)
    return str(folder)


@pytest.fixture(scope="module")
def wheel(work, checkout, isolated) -> Path:
    """Built from the unpacked sdist."""
    made = done(sys.executable, "-c", HOOK, "build_sdist", work, cwd=checkout, PYTHONPATH=isolated)
    with tarfile.open(work / made.splitlines()[-1]) as archive:
        archive.extractall(work / "sdist")
    (source,) = (work / "sdist").iterdir()
    how = {"PYTHONPATH": isolated, "CMAKE_BUILD_TYPE": "Debug"}
    made = done(sys.executable, "-c", HOOK, "build_wheel", work, cwd=source, **how)
    return work / made.splitlines()[-1]


@pytest.fixture(scope="module")
def python(work, wheel) -> Path:
    """An environment with the wheel, and torch."""
    venv.create(work / "venv", symlinks=True)
    python = work / "venv" / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    done(sys.executable, *install, cwd=work)
    (folder,) = (work / "venv" / "lib").glob("python*/site-packages")
    (folder / "this.pth").write_text(f"{PACKAGES}\n")
    return python


def test_one_wheel_for_every_python(wheel):
    assert re.fullmatch(r"memkernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "cpython" in name or "abi3" in name]
    assert "memkernels/_lib/libmemkernels_cpu.so" in names
    for name in ("configs.json", "softmax_read.py"):
        assert f"memkernels/triton_kernels/{name}" in names
    assert {name.split("/")[0] for name in names} == {"memkernels", wheel.name.split("-py3")[0] + ".dist-info"}


def test_it_runs_where_no_checkout_is(python, work):
    away = work / "away"
    away.mkdir(exist_ok=True)
    assert str(work / "venv") in done(python, "-c", USE, cwd=away)
    text = done(python, "-m", "memkernels", "info", cwd=away)
    assert re.search(r"^  cpu +on cpu: instruction set \w+$", text, re.MULTILINE), text
    assert "unknown" not in text
    assert f"{len(os.sched_getaffinity(0))} cores" in text


def test_it_runs_in_the_checkout(python, checkout):
    """The checkout hides the installed package, and uses its libraries."""
    assert str(checkout) in done(python, "-c", USE, cwd=checkout)
    text = done(python, "-m", "memkernels", "info", cwd=checkout)
    assert re.search(r"^  cpu +on cpu: instruction set \w+$", text, re.MULTILINE), text
    assert "unknown" not in text


def test_libraries_of_other_sources_are_not_used(python, checkout, work):
    changed = work / "changed"
    shutil.copytree(checkout, changed)
    with open(changed / "csrc" / "binding" / "cpu" / "library.cpp", "a") as file:
        file.write("// changed\n")
    text = done(python, "-m", "memkernels", "info", cwd=changed)
    assert "is not built (make dev builds it; the one in" in text
    assert "is of other sources than this checkout)" in text
    says = say(python, "-c", "from memkernels import _native; _native.host()", cwd=changed).stderr.splitlines()[-1]
    assert says.endswith(f"not built for Python 3.{sys.version_info[1]}: make dev builds it")


def test_a_checkout_that_is_not_built_says_so(checkout):
    """With no installed package either."""
    code = "from memkernels import _native; print(_native.missing())"
    path = os.pathsep.join([str(checkout), str(PACKAGES)])
    assert done(sys.executable, "-S", "-c", code, cwd=checkout, PYTHONPATH=path) == (
        "its native library is not built (make dev builds it)\n"
    )


# --- errors when something is missing ---


@pytest.fixture(scope="module")
def bare(work) -> Path:
    """An interpreter without packages."""
    venv.create(work / "bare", symlinks=True)
    return work / "bare" / "bin" / "python"


def only_sentence(ended: subprocess.CompletedProcess) -> str:
    assert ended.returncode != 0
    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert line.startswith("memkernels: the native code needs ")
    return line


def metadata(python: Path, cwd: Path, **environment: str) -> str:
    hook = (python, "-c", HOOK, "prepare_metadata_for_build_wheel", cwd)
    return only_sentence(say(*hook, cwd=cwd, **environment))


def test_no_torch(bare, checkout, isolated):
    line = metadata(bare, checkout, PYTHONPATH=isolated)
    assert f"the headers of torch >= 2.10, and none is installed for {bare}: install torch first" in line


def test_an_old_torch(checkout, isolated, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    line = metadata(sys.executable, checkout, PYTHONPATH=isolated, TORCH_DIR=str(tmp_path))
    assert f"and {tmp_path} has 2.9.1+cpu: " in line


def test_no_compiler(checkout, isolated, tmp_path):
    line = metadata(sys.executable, checkout, PYTHONPATH=isolated, PATH=str(tmp_path))
    assert "a C++20 compiler (GCC 11 or newer) and there is no c++, g++ or clang++ on the PATH" in line


def test_a_compiler_that_is_too_old(checkout, isolated, tmp_path):
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    line = metadata(sys.executable, checkout, PYTHONPATH=isolated, CXX=f"{old} -m64")
    assert f"and {old} -m64 is none" in line


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_no_build_tool(name, bare, checkout, isolated, tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    if name == "ninja":
        (tmp_path / "cmake").symlink_to(shutil.which("true"))
    line = metadata(bare, checkout, PYTHONPATH=isolated, PATH=str(tmp_path), TORCH_DIR=str(PACKAGES / "torch"))
    assert line == f"memkernels: the native code needs {name} and there is none: pip install {name}"


def test_pip_prints_little_and_the_sentence(checkout, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path, ".")
    ended = say(*pip, cwd=checkout, PATH=str(tmp_path))
    lines = (ended.stdout + ended.stderr).splitlines()
    assert ended.returncode != 0 and len(lines) < 25
    assert sum("there is no c++, g++ or clang++ on the PATH" in line for line in lines) == 1


def test_a_build_requires_no_torch(checkout):
    requires = re.search(r"^requires = \[(.*)\]$", (checkout / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert "setuptools" in requires and "torch" not in requires
    for hook in ("wheel", "editable", "sdist"):
        found = done(sys.executable, "-c", HOOK, f"get_requires_for_build_{hook}", "", cwd=checkout)
        assert "torch" not in found.splitlines()[-1]


def test_the_terminal_sees_how_far_the_build_is():
    """Also where the output is captured, as pip does."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "build_backend")!r})
import memkernels_build
memkernels_build.compile([sys.executable, "-c", "for i in range(8): print(f'[{{i + 1}}/8] step')"], 2)
"""
    child, terminal = pty.fork()
    if child == 0:
        caught = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, text=True)
        os._exit(caught.returncode or caught.stdout.count("step") != 8)
    text = ""
    while part := _read(terminal):
        text += part
    assert os.waitpid(child, 0)[1] == 0, text
    assert re.findall(r"memkernels: (\d+%) of the native code", text) == ["25%", "50%", "75%", "100%"]
    assert text.count("compiling the native code, about 90 s on 2 processors") == 1


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # the other end is closed
        return ""


def test_a_failed_build_ends_with_a_sentence():
    ended = say(sys.executable, "-c", BACKEND + "b.compile(['false'], 1)", cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "memkernels: the native build failed; the lines above say where"
