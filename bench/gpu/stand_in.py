"""The real torch for CUDA where there is no GPU, over stand-ins for NVIDIA's libraries that record what would have run.

Under :func:`environment` torch sees one device like an H100. Its memory is the host's; copies and fills are done;
kernels are checked against the device's limits and recorded, never run. ``stand_in/`` has the sources of the runtime
and of the driver. What else torch's files ask of NVIDIA's libraries is read from those files, and fails when called.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from .wheels import torch_folder

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = Path(__file__).with_name("stand_in")
RECORD, RUNTIME, DRIVER = "libstand_in.so", "libcudart.so.13", "libcuda.so.1"
# What is written by hand, by the soname of its library; the record is below both of the others.
WRITTEN = {
    RECORD: ("record.c", "device.c"),
    RUNTIME: ("runtime.c", "runtime_memory.c", "runtime_streams.c"),
    DRIVER: ("driver.c", "cubin.c"),
}
CC = os.environ.get("CC", "cc")
NVIDIA = re.compile(r"lib(cu|nv|nccl)")
# A function that returns words must not return a number.
TEXT = re.compile(r"(String|GetLastError)$")


def environment(version: str = "2.11.0") -> dict[str, str]:
    """Variables under which ``sys.executable`` imports torch ``version`` and finds a device. RuntimeError: not here.

    Two more may be set: ``STAND_IN_FAIL``, a part of the name of a kernel that breaks the device, and ``STAND_IN_LOG``,
    a file that gets the record when the process ends.
    """
    torch, libraries = torch_folder(version), build(version)
    path = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "PYTHONPATH": f"{torch}:{ROOT}",
        "LD_LIBRARY_PATH": ":".join(path),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "CUDA_VISIBLE_DEVICES": "0",
    }


class Record:
    """The record of the process that this runs in, under :func:`environment`."""

    def __init__(self):
        self._library = ctypes.CDLL(RECORD)
        self._library.stand_in_launches.restype = ctypes.c_uint64

    def launches(self) -> int:
        """How many kernels and graphs were launched since the last reset."""
        return self._library.stand_in_launches()

    def reset(self) -> None:
        self._library.stand_in_reset()


# --- the libraries ----------------------------------------------------------------------------------------------------


def build(version: str = "2.11.0") -> Path:
    """The folder of the stand-ins for torch ``version``, made anew when a source of theirs has changed."""
    texts = [path.read_bytes() for path in [Path(__file__), *sorted(SOURCES.iterdir())]]
    folder = ROOT / "build" / f"stand-in-{version}-{hashlib.sha256(b''.join(texts)).hexdigest()[:12]}"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_name(f"stand-in-{version}.lock"), "w") as lock:  # processes may build it side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_name(f"stand-in-{version}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _build(version, unfinished)
            unfinished.rename(folder)
    return folder


def _build(version: str, folder: Path) -> None:
    wants = wanted(torch_folder(version) / "torch")
    if RUNTIME not in wants:
        raise RuntimeError(f"torch {version} is not built for CUDA 13, whose runtime the stand-ins know")
    include = _toolkit()
    wants[DRIVER].update(dict.fromkeys(_driver_functions(include), ""))
    for soname in [*WRITTEN, *sorted(set(wants) - set(WRITTEN))]:
        _library(folder, soname, wants[soname], include)


def said_by(*command: str | Path, text: str | None = None) -> str:
    """What a tool says. RuntimeError with its own words when it fails."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise RuntimeError(f"the stand-ins are built with {command[0]}, which is not here") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{command[0]} fails on the stand-ins: {error.stderr.strip()[-2000:]}") from error
    return done.stdout


def wanted(torch: Path) -> dict[str, dict[str, str]]:
    """What torch's files ask of NVIDIA's libraries: soname -> function -> its version, "" where it has none."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    defined: set[str] = set()
    loose: dict[str, list[str]] = {}  # functions without a version, and the libraries that may have them
    for file in [*torch.glob("*.so"), *torch.glob("lib/*.so*")]:
        text = said_by("readelf", "--wide", "--dynamic", "--version-info", file)
        needed = [name for name in re.findall(r"\(NEEDED\).*\[(.*)\]", text) if NVIDIA.match(name)]
        owners, owner = {}, ""  # number of a version -> the library that has it
        for soname, number in re.findall(r"File: (\S+)|Flags: \S+ +Version: (\d+)", text):
            owner = soname or owner
            owners[number] = owner
        open_to = [soname for soname in needed if soname not in owners.values()]
        for soname in needed:
            found[soname].update()
        for line in said_by("readelf", "--wide", "--dyn-syms", file).splitlines():
            fields = (
                line.split()
            )  # number, value, size, type, binding, visibility, section, name, number of the version
            if len(fields) < 8 or fields[4] not in ("GLOBAL", "WEAK", "UNIQUE"):
                continue
            name, _, symbol_version = fields[7].partition("@")
            if fields[6] != "UND":
                defined.add(name)
            elif symbol_version and NVIDIA.match(owners[fields[8].strip("()")]):
                found[owners[fields[8].strip("()")]][name] = symbol_version
            elif not symbol_version and open_to and fields[4] == "GLOBAL":
                loose[name] = open_to
    for name in loose.keys() - defined:
        if (owner := _owner(name, loose[name])) is not None:
            found[owner].setdefault(name, "")
    return found


def _owner(function: str, sonames: list[str]) -> str | None:
    """The library of a function without a version: the function's name begins as the library's. None: not NVIDIA's."""
    stems = {re.match(r"lib(.*?)\.so", soname)[1].lower(): soname for soname in sonames}
    if "cuda" in stems:
        stems["cu"] = stems.pop("cuda")  # the driver's own
    fits = [stem for stem in stems if function.lower().startswith(stem)]
    return stems[max(fits, key=len)] if fits else None


def _toolkit() -> Path:
    """The headers of the CUDA toolkit."""
    try:
        said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    except FileNotFoundError:
        raise RuntimeError(
            "the stand-ins are built with the CUDA toolkit's headers, and there is no nvcc here"
        ) from None
    if (match := re.search(r'INCLUDES="-I(.*?)"', said)) is None:
        raise RuntimeError("nvcc does not tell where its headers are")
    return Path(match[1])


def _driver_functions(include: Path) -> list[str]:
    """Every function of the driver, by its exported name: torch asks for some by name when it runs."""
    text = said_by(CC, "-E", "-P", f"-I{include}", "-", text="#include <cuda.h>\n")
    return re.findall(r"\bCUresult +(cu\w+) *\(", text)


def _library(folder: Path, soname: str, wants: dict[str, str], include: Path) -> None:
    """One stand-in: what is written for it, and a function that fails for whatever else is wanted."""
    with tempfile.TemporaryDirectory() as scratch:
        objects, written = [], set()
        for name in WRITTEN.get(soname, ()):
            objects.append(Path(scratch, f"{name}.o"))
            said_by(CC, "-std=gnu11", "-O2", "-fPIC", f"-I{include}", "-c", SOURCES / name, "-o", objects[-1])
            table = said_by("nm", "--defined-only", "--extern-only", "--format=posix", objects[-1])
            written |= {line.split()[0] for line in table.splitlines()}
        stubs, script = Path(scratch, "stubs.c"), Path(scratch, "versions")
        stubs.write_text("".join(stub(name) for name in sorted(set(wants) - written)))
        link = ["-shared", "-fPIC", "-fno-builtin", stubs, *objects, f"-Wl,-soname,{soname}"]
        if soname != RECORD:  # its functions are for the others, theirs for torch
            exported = " ".join(f"{name};" for name in wants)
            scope = f"global: {exported} local: *;" if wants else "local: *;"
            script.write_text(f"{next(filter(None, wants.values()), '')} {{ {scope} }};\n")
            link.append(f"-Wl,--version-script,{script}")
        if soname in WRITTEN and soname != RECORD:
            link += [f"-L{folder}", f"-l:{RECORD}", "-Wl,-rpath,$ORIGIN"]
        said_by(CC, *link, "-ldl", "-lpthread", "-o", folder / soname)


def stub(function: str) -> str:
    if TEXT.search(function):
        return f'const char* {function}(void) {{ return "a stand-in, which does nothing"; }}\n'
    return f"int {function}(void) {{ return 801; }}\n"
