"""The core of the tests under another version of torch: ``python -m bench.other_torch 2.10.0`` (make test-torch).

The wheel is fetched once and unpacked into a folder of its own. Wheels for CUDA link NVIDIA's libraries, which need not
be here: each that is missing is built as a library whose functions all fail, so that torch finds no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .gpu.stand_in import ROOT, said_by, stub, wanted
from .gpu.wheels import cache, torch_folder

# What a version of torch may change: operators, autograd, transforms, the compiler, the dispatcher.
FILES = (
    "test_laws",
    "test_write_laws",
    "test_eager_paths",
    "test_torch",
    "test_gradients",
    "test_higher_derivatives",
    "test_backend_scope",
    "test_compiled_transforms",
    "test_data_dependent_sizes",
    "test_flops",
    "test_private_torch",
)
CHECK = ("-m", "memkernels", "check", "--quick", "--backend")


def main(version: str) -> int:
    """Run them; the exit code of the first that fails, 0 also where this torch cannot be had, with the reason."""
    try:
        environment = environment_of(version)
    except RuntimeError as error:
        print(f"skipped: {error}")
        return 0
    said = "import torch; print(f'torch {torch.__version__}, {torch.cuda.device_count()} GPUs')"
    tests = [f"tests/{name}.py" for name in FILES]
    commands = [("-c", said), (*CHECK, "reference"), (*CHECK, "cpu"), ("-m", "pytest", "-p", "no:logging", *tests)]
    for command in commands:
        if (code := subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode) != 0:
            return code
    return 0


def environment_of(version: str) -> dict[str, str]:
    """Variables under which the interpreter imports torch ``version``. RuntimeError: it cannot be had."""
    torch = torch_folder(version)
    folder = cache() / f"{torch.name}-libraries"
    folder.mkdir(exist_ok=True)
    for soname, functions in wanted(torch / "torch").items():
        if not (folder / soname).exists():
            _library(folder / soname, functions)
    path = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "PYTHONPATH": f"{torch}:{ROOT}", "LD_LIBRARY_PATH": ":".join(path)}


def _library(path: Path, functions: dict[str, str]) -> None:
    """A library whose ``functions``, name -> version, all fail."""
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stubs.c"), Path(scratch, "versions")
        source.write_text("".join(map(stub, sorted(functions))))
        exported = f"global: {' '.join(f'{name};' for name in functions)}" if functions else ""
        script.write_text(f"{next(filter(None, functions.values()), '')} {{ {exported} local: *; }};\n")
        link = ["-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{path.name}", f"-Wl,--version-script,{script}"]
        said_by(os.environ.get("CC", "cc"), *link, source, "-o", path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.other_torch", description=__doc__.splitlines()[0])
    parser.add_argument("version", help="of torch, such as 2.10.0")
    given = parser.parse_args().version
    if not re.fullmatch(r"\d+\.\d+\.\d+", given):
        parser.error(f"version must be like 2.10.0, got {given!r}")
    sys.exit(main(given))
