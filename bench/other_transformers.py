"""Memories in pretrained models under another version of transformers: ``python -m bench.other_transformers 4.57.6``.

pip puts that version, and the versions of what it needs, into a folder of its own under .build, once; torch, PEFT and
pytest come from the environment (make test-transformers).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .gpu.stand_in import ROOT


def main(version: str) -> int:
    """Run every test of the integration; the exit code of pytest, 0 also where that version cannot be had."""
    try:
        folder = folder_of(version)
    except RuntimeError as error:
        print(f"skipped: {error}")
        return 0
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    said = "import transformers; print(f'transformers {transformers.__version__} of', transformers.__path__[0])"
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_transformers_*.py"))
    for command in (("-c", said), ("-m", "pytest", *tests)):
        if (code := subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode) != 0:
            return code
    return 0


def folder_of(version: str) -> Path:
    """A folder for ``PYTHONPATH`` with that version, installed at the first call. RuntimeError: it cannot be had."""
    folder = ROOT / ".build" / f"transformers-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--target", f"{scratch}/unpacked", f"transformers=={version}"]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = re.search(r"ERROR: (.*)", done.stderr)
            raise RuntimeError(f"transformers {version} cannot be had by pip: {said[1] if said else 'it says no more'}")
        # A folder with the final name is complete: the name comes last.
        Path(scratch, "unpacked").rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.other_transformers", description=__doc__.splitlines()[0])
    parser.add_argument("version", help="of transformers, such as 4.57.6")
    given = parser.parse_args().version
    if not re.fullmatch(r"\d+\.\d+\.\d+", given):
        parser.error(f"version must be like 4.57.6, got {given!r}")
    sys.exit(main(given))
