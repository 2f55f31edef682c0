"""Compiles the CUDA kernels for every target and reads the report. Needs nvcc, no GPU.

    python -m bench.cuda_check

Prints how long the build took, how large the library is, and what every kernel uses on every target. A kernel fails
that spills registers or keeps an array on the stack, that uses so many registers that two blocks do not fit a
processor, or that takes shared memory which its launcher does not count. Exit status 1 when one does. Objects are kept
in ``build/``, so a second run is short.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
# Blocks have up to 256 threads and a processor 65536 registers; of shared memory the runtime keeps 1 KiB for itself.
REGISTERS, SHARED = 168, 1024


@dataclass(frozen=True)
class Kernel:
    """What one kernel uses on one target: registers of a thread, bytes of its stack and of static shared memory."""

    target: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int

    def faults(self) -> list[str]:
        found = []
        if self.stack or self.local:
            found.append(f"{self.stack + self.local} bytes of a thread lie in memory")
        if self.registers > REGISTERS:
            found.append(f"{self.registers} registers, of which a thread may have {REGISTERS}")
        if self.shared > SHARED:
            found.append(f"{self.shared} bytes of static shared memory")
        return found


def tool(name: str) -> str:
    """A build tool: this interpreter's own, before one elsewhere on the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        raise RuntimeError(f"{name} is needed to build the kernels; pip install {name}")
    return found


def cmake(source: Path, folder: Path, target: str, *options: str) -> None:
    """Configures and builds one target of ``source`` in ``folder``. RuntimeError with what the tools say."""
    configure = [tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", *options]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # tests run side by side, and ask for the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [tool("cmake"), "--build", folder, "--target", target, "--parallel", jobs]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])


def cuobjdump() -> str | None:
    """The toolkit's, or else the one that Triton's package brings: a compiler alone does not have it."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(own) if own is not None and own.exists() else None)


def missing() -> str | None:
    """Why the library cannot be compiled and read here, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc here: the CUDA toolkit compiles the kernels"
    return None if cuobjdump() else "there is no cuobjdump here: the CUDA toolkit or Triton brings it"


def read(library: Path, what: str) -> str:
    """What cuobjdump says of the library."""
    return subprocess.run([cuobjdump(), what, library], capture_output=True, text=True, check=True).stdout


def build() -> Path:
    """The library for every target. It shares its objects with ``make cuda``, and is not installed."""
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    cmake(ROOT, folder, "memkernels_cuda", "-DMEMKERNELS_CUDA=ON")
    return folder / "libmemkernels_cuda.so"


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of ``library`` on every target, as the compiled code says."""
    found, target, name = [], "", ""
    for line in read(library, "--dump-resource-usage").splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            used = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            found.append(Kernel(target, name, used["REG"], used["STACK"], used["LOCAL"], used["SHARED"]))
    return found


def plain(name: str) -> str:
    """A mangled name as C++ writes it, where there is a tool for that."""
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    text = subprocess.run([filt, name], capture_output=True, text=True, check=True).stdout if filt else name
    return re.sub(r"\(anonymous namespace\)::|<unnamed>::|mk::cuda::|\(.*|^void ", "", text.strip())


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m bench.cuda_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if (why := missing()) is not None:
        print(f"cuda_check: {why}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    library = build()
    took = time.perf_counter() - start
    found = kernels(library)
    failed = 0
    for kernel in found:
        faults = kernel.faults()
        failed += bool(faults)
        print(f"{kernel.target:7} {kernel.registers:4} registers  {plain(kernel.name)}", *faults, sep="  FAILED: ")
    absent = set(TARGETS) - {kernel.target for kernel in found}
    print(f"{library.stat().st_size / 2**20:.1f} MiB, built in {took:.0f} s with {os.cpu_count()} processors")
    print(f"{len(found)} kernels compiled, {failed} failed" + (f", no code for {', '.join(absent)}" if absent else ""))
    return 1 if failed or absent or not found else 0


if __name__ == "__main__":
    sys.exit(main())
