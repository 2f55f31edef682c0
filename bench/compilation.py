"""One compilation of a Triton kernel: what it is known by, and what its machine code needs."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from dataclasses import dataclass

import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITCallable

from memkernels import _triton

from .targets import TARGETS

INSTRUCTIONS = {"80": ("mma.sync",), "90": ("wgmma.mma_async", "mma.sync"), "100": ("tcgen05.mma", "mma.sync")}
MULTIPLY_ADDS = "fma"


@dataclass(frozen=True)
class Needs:
    """The resources of the machine code of one kernel.

    matrix: the instruction of its matrix products, MULTIPLY_ADDS where none does them, empty where there are none.
    serialised: whether ptxas serialises its warp-group products (C7515).
    """

    registers: int
    spills: int
    shared: int
    matrix: str
    serialised: bool


class Build:
    """What a launch compiles (``triton_kernels/builds.py``), and the key of it in a record."""

    def __init__(self, build) -> None:
        self.build = build

    @functools.cached_property
    def key(self) -> str:
        """The same wherever the same machine code would come out, and without compiling.

        Triton's own key will not do for a file that is kept: it hashes the binary of the compiler, which differs by
        platform and by version of Python, the line that a function starts at, and comments. Triton's version stands
        for its compiler and for the ptxas and the libdevice that come with it.
        """
        own = self.build
        constants = {k: _text(v) for k, v in sorted(own.constants.items())}
        parts = (triton.__version__, own.target, _text(own.function), own.signature, constants)
        whole = repr((*parts, sorted(own.attributes.items()), sorted(own.options.items())))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def compile(self) -> Needs:
        """Compile it. Triton keeps the result on disk."""
        log = io.StringIO()
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            kernel = self.build.compile()
        arch, ptx = str(self.build.target.arch), kernel.asm["ptx"]
        matrix = next((word for word in INSTRUCTIONS[arch] if word in ptx), MULTIPLY_ADDS if multiplies(kernel) else "")
        # A kernel that Triton took from disk leaves no report.
        said = log.getvalue() or report(arch, ptx)
        return Needs(*registers_and_spills(said), kernel.metadata.shared, matrix, serialised(said))


def multiplies(kernel: CompiledKernel) -> bool:
    """Whether a compiled kernel has matrix products."""
    return "tt.dot" in kernel.asm["ttir"]


def _text(value) -> str:
    return _sources()[value.__module__, value.__qualname__] if isinstance(value, JITCallable) else str(value)


@functools.cache
def _functions() -> dict[tuple[str, str], JITCallable]:
    """Module and name of every function of the package that Triton compiles -> the function."""
    package = _triton.kernels()
    for operator in package.operators():
        package.file(operator)
    return {
        (f.__module__, f.__qualname__): f
        for name in [n for n in sys.modules if n.startswith(f"{package.__name__}.")]
        for f in vars(sys.modules[name]).values()
        if isinstance(f, JITCallable) and f.__module__.startswith(f"{package.__name__}.")
    }


def _used(function: JITCallable) -> list[JITCallable]:
    """The functions that ``function`` names."""
    names, known = function.fn.__code__.co_names, function.fn.__globals__
    return [known[name] for name in names if isinstance(known.get(name), JITCallable)]


def kernels() -> set[str]:
    """The names of all kernels: functions that no other uses."""
    functions = _functions().values()
    used = {f for user in functions for f in _used(user)}
    return {f.__name__ for f in functions if f not in used}


@functools.cache
def _sources() -> dict[tuple[str, str], str]:
    """Module and name of every function of the package -> hash of its code and of all that it calls.

    By Triton's own search for what a function uses, on sources that say nothing of where they stand.
    """
    functions = _functions()
    before = {f: (f._src, f.starting_line_number, f.hash) for f in functions.values()}
    try:
        for f in functions.values():
            f._src, f.starting_line_number, f.hash = _bare(f._src), 0, None
        return {name: f.cache_key for name, f in functions.items()}
    finally:
        for f, (source, line, known) in before.items():
            f._src, f.starting_line_number, f.hash = source, line, known


def _bare(source: str) -> str:
    """A function without its docstring, comments and empty lines."""
    lines = textwrap.dedent(source).splitlines()
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    function = ast.parse(source).body[0]
    if ast.get_docstring(function) is not None:
        doc = function.body[0]
        lines[doc.lineno - 1 : doc.end_lineno] = []
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def report(arch: str, ptx: str) -> str:
    """What ptxas says of ``ptx``."""
    tool = triton.knobs.nvidia.ptxas_blackwell if int(arch) >= 100 else triton.knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", f"-arch={TARGETS[arch][0]}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def serialised(report: str) -> bool:
    """Whether ptxas serialises warp-group products (C7515)."""
    return re.search(r"wgmma\S* instructions are serialized", report) is not None


def registers_and_spills(said: str) -> tuple[int, int]:
    """Registers and bytes spilled, of ``ptxas -v``."""
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", said)), spills
