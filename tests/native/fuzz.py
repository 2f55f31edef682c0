"""Calls the native operators directly, without the checks of Python, with invalid arguments, under sanitizers.

    python tests/native/fuzz.py LIBRARY [--seconds S]               every instruction set, from case 0 on
    python tests/native/fuzz.py LIBRARY --case N --isa ISA          one case again

LIBRARY is libmemkernels_cpu.so, compiled with -fsanitize=address,undefined (tests/native/run builds it). A case is
drawn from its number alone. It passes if the call returns or raises one sentence. It fails on access out of bounds,
undefined arithmetic, a crash, a call that does not end, or an error without an explanation; the failure names the case.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from draw import draw

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds without a new case; the first waits for torch to be imported
SANITIZERS = {
    # A failed allocation returns null, as without a sanitizer; torch's allocator and ours then raise.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def with_library(library: Path, folder: Path) -> Path:
    """A copy of memkernels made of links, with ``library`` as its native library."""
    package = folder / "memkernels"
    (package / "_lib").mkdir(parents=True)
    for entry in (ROOT / "memkernels").iterdir():
        if entry.name not in ("_lib", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "_lib" / "libmemkernels_cpu.so").symlink_to(library.resolve())
    return folder


def environment(folder: Path, isa: str) -> dict[str, str]:
    def runtime(name: str) -> str:
        return subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()

    paths = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    return {**os.environ, **SANITIZERS, "LD_PRELOAD": preload, "PYTHONPATH": paths, "MEMKERNELS_CPU_ISA": isa}


def sets() -> list[str]:
    """The instruction sets of this processor, the fastest first."""
    code = "import memkernels._native as n\nfor isa in reversed(n.ISAS): print(isa)"
    found = []
    for isa in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split():
        probe = "import torch, memkernels; torch.ops.memkernels_cpu.isa()"
        env = {**os.environ, "MEMKERNELS_CPU_ISA": isa}
        if subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, check=False).returncode == 0:
            found.append(isa)
    return found


def run_cases(first: int, last: int, seconds: float) -> None:
    """Run the cases, in the process under sanitizers; print a line before each call."""
    import torch

    refused = case = 0
    end = time.monotonic() + seconds
    for case in range(first, last):
        if time.monotonic() > end:
            break
        name, arguments, threads = draw(case)
        print(f"case {case} {name}", flush=True)
        torch.set_num_threads(threads)
        try:
            getattr(torch.ops.memkernels_cpu, name).default(*arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            refused += 1
            if "API call failed" in str(error):
                print(f"UNCLEAR {error}", flush=True)
                sys.exit(1)
    print(f"done: {case + 1 - first} calls, {refused} of them refused", flush=True)


def watch(command: list[str], env: dict[str, str]) -> tuple[str, str, str]:
    """Run ``command``: its last line of output, its error output, and why it failed ("" if it did not)."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line.strip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        last, why = "before the first case", ""
        try:
            while (line := lines.get(timeout=PATIENCE)) is not None:
                if line.startswith("UNCLEAR"):
                    why = line
                else:
                    last = line
        except queue.Empty:
            process.kill()
            why = f"no end after {PATIENCE:.0f} s"
        code = process.wait()
        errors.seek(0)
        told = errors.read()
    return last, told, why or (f"exit status {code}" if code else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--case", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process under sanitizers
    given = parser.parse_args()
    first, last = (0, 1 << 62) if given.case is None else (given.case, given.case + 1)
    if given.here:
        run_cases(first, last, given.seconds)
        return 0
    chosen = [given.isa] if given.isa else sets()
    with tempfile.TemporaryDirectory() as folder:
        package = with_library(given.library, Path(folder))
        for isa in chosen:
            options = ["--here", "--seconds", str(given.seconds / len(chosen))]
            if given.case is not None:
                options += ["--case", str(given.case)]
            command = [sys.executable, __file__, str(given.library), *options]
            last_line, told, why = watch(command, environment(package, isa))
            if why:
                number = last_line.split()[1] if last_line.startswith("case ") else "0"
                print("\n".join(told.splitlines()[:40]))  # further down the stack is torch and Python
                print(f"FAIL fuzz, {isa}, {last_line}: {why}")
                print(f"again: {sys.executable} {__file__} {given.library} --isa {isa} --case {number}")
                return 1
            print(f"fuzz, {isa}: {last_line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
