"""The native library uses PyTorch's stable ABI only: its undefined symbols of torch are those of the C shim."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from memkernels import _native

SHIM = re.compile(r"^(aoti_torch|torch)_\w+$")
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")  # symbols of the C and C++ runtime, which carry versions
LINKER = re.compile(r"^(_ITM_\w+|__gmon_start__|__cxa_finalize)$")


def tool(name: str, *options: str) -> list[str]:
    """The lines that a tool of binutils prints about the library."""
    assert _native.LIBRARY.exists(), _native.missing()
    program = shutil.which(name)
    assert program, f"{name} (binutils) is needed to read the library"
    text = subprocess.run([program, *options, _native.LIBRARY], capture_output=True, text=True, check=True).stdout
    return [line for line in text.splitlines() if line.strip()]


def symbols(which: str) -> list[str]:
    return [line.split()[-1] for line in tool("nm", "-D", which)]


def test_undefined_symbols_are_the_c_shim_and_the_runtime():
    names = symbols("--undefined-only")
    assert any(SHIM.match(n) for n in names), "a library of operators that uses no function of torch is the wrong file"
    strangers = [n for n in names if not (SHIM.match(n) or RUNTIME.search(n) or LINKER.match(n))]
    assert not strangers, strangers


@pytest.mark.parametrize("part", ["c10", "2at", "5torch", "Py", "pybind"])
def test_no_symbol_of_the_c_plus_plus_interface_of_torch_or_of_python(part):
    pattern = re.compile(rf"^_?Py|^_Z.*{part}" if part == "Py" else rf"^_Z.*{part}")
    assert not [n for n in symbols("--undefined-only") if pattern.search(n)]


def test_the_insides_are_not_exported():
    leaked = [n for n in symbols("--defined-only") if re.match(r"_ZNK?2mk", n)]
    assert not leaked, leaked


@pytest.mark.parametrize("library", ["libpython", "libc10", "libtorch_python", "libmkl", "libopenblas"])
def test_the_library_does_not_link(library):
    needed = [line for line in tool("readelf", "-d") if "NEEDED" in line]
    assert needed and not [line for line in needed if library in line]
