"""Build backend (PEP 517): setuptools, after a look at what the native code needs.

An isolated build does not see the packages of the environment, and the native code needs only torch's headers, so torch
is no build requirement: that would download one, with gigabytes of CUDA. The build finds a torch that is installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist, get_requires_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST = (2, 10)  # the torch whose stable ABI the operators use (TORCH_TARGET_VERSION in CMakeLists.txt)
FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"  # does not import it
# <barrier> is the youngest of what the native code takes from the standard library.
PROBE = "#include <barrier>\n#if __cplusplus < 202002L\n#error\n#endif\nint main() { std::barrier all(1); }\n"
PROCESSOR_SECONDS = 180  # what compiling takes, all cores together
FAILED = "memkernels: the native build failed; the lines above say where"


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    # A checkout that is built in place has memkernels._host too, which the benchmarks use.
    return [*build_meta.get_requires_for_build_editable(config_settings), "pybind11>=2.13"]


# pip asks for the metadata first, and downloads the run-time requirements next. So what is missing is said before that.
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    check()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    check()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    check()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    check()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


# --- what the native code needs ---


def check() -> None:
    """SystemExit with one sentence where the native code cannot be built, before anything else is printed."""
    check_compiler()
    torch()
    tool("cmake")
    tool("ninja")


def check_compiler() -> None:
    wanted = "memkernels: the native code needs a C++20 compiler (GCC 11 or newer)"
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if found is None:
            raise SystemExit(f"{wanted} and there is no c++, g++ or clang++ on the PATH: install one (apt install g++)")
        command = [found]
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{wanted} and there is no {command[0]}, which CXX names")
    probe = [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input=PROBE, text=True, capture_output=True, check=False).returncode != 0:
        raise SystemExit(f"{wanted} and {shlex.join(command)} is none: install one, and name it in CXX")


def torch() -> Path:
    """The folder of an installed torch, without importing it."""
    wanted = f"torch >= {'.'.join(map(str, OLDEST))}"
    if given := os.environ.get("TORCH_DIR"):
        folders = [Path(given)]
    else:
        folders = list(dict.fromkeys(_installed()))
    old = []
    for folder in folders:
        version = _version(folder)
        if version and tuple(map(int, re.findall(r"\d+", version)[:2])) >= OLDEST:
            return folder
        old.append(f"{folder} has {version or 'no version.py'}")
    found = "; ".join(old) or f"none is installed for {sys.executable}"
    raise SystemExit(
        f"memkernels: the native code needs the headers of {wanted}, and {found}: install torch first (pip install "
        "torch, for the CPU alone --index-url https://download.pytorch.org/whl/cpu), activate the environment that "
        "has it, or name its folder in TORCH_DIR"
    )


def _installed() -> Iterator[Path]:
    """The torch of this process, then of the environment that the build is for, as far as it can be known."""
    own = importlib.util.find_spec("torch")
    if own is not None and own.origin:
        yield Path(own.origin).parent
    pythons = [Path(sys.executable)]
    # pip hides the packages of this environment, and no other counts. Other tools run an environment of their own.
    if Path(setuptools.__file__).is_relative_to(sys.prefix):
        for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            if variable in os.environ:
                pythons.append(Path(os.environ[variable]) / "bin" / "python")
        for folder in os.get_exec_path():
            pythons += [Path(folder) / name for name in ("python", "python3")]
    for python in dict.fromkeys(pythons):
        if not os.access(python, os.X_OK):
            continue
        # -I: without the PYTHONPATH by which an isolated build hides the packages.
        done = subprocess.run([python, "-I", "-c", FIND], capture_output=True, text=True, check=False)
        if origin := done.stdout.strip():
            yield Path(origin).parent


def _version(folder: Path) -> str | None:
    file = folder / "version.py"
    match = re.search(r"^__version__ = '([^']+)'", file.read_text(), re.MULTILINE) if file.exists() else None
    return match[1] if match else None


def tool(name: str) -> str:
    """The program of this interpreter's environment, before one elsewhere on the path.

    Some are scripts that need a package which an isolated build hides, so each must show that it runs.
    """
    for folder in [str(Path(sys.executable).parent), *os.get_exec_path()]:
        found = shutil.which(name, path=folder)
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found
    raise SystemExit(f"memkernels: the native code needs {name} and there is none: pip install {name}")


# --- the native build ---


def run(command: list) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(FAILED)


def compile(command: list, jobs: int) -> None:
    """Run Ninja. pip shows none of its output until it fails, so the terminal is told how far it is."""
    if sys.stdout.isatty():
        return run(command)
    told = 0  # quarters of the steps
    with (
        open(_terminal(), "w") as terminal,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        seconds = math.ceil(PROCESSOR_SECONDS / jobs)
        _tell(terminal, f"compiling the native code, about {seconds} s on {jobs} processors where all of it is new")
        for line in process.stdout:
            print(line, end="", flush=True)
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and told < (quarter := 4 * int(step[1]) // int(step[2])):
                told = quarter
                _tell(terminal, f"{25 * quarter}% of the native code")
    if process.returncode != 0:
        raise SystemExit(FAILED)


def _terminal() -> str:
    try:
        open("/dev/tty", "w").close()
    except OSError:  # there is none
        return os.devnull
    return "/dev/tty"


def _tell(terminal, text: str) -> None:
    print(f"\n  memkernels: {text} ", end="", file=terminal, flush=True)  # the spinner of pip stands on the line
