"""The crash laboratory (tests/crash) at the size of a test; ``make crash-lab`` runs the long form."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from crash import disk, shim
from support import ROOT

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the shim stands before the calls of Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the shim is compiled here"),
]


@pytest.mark.parametrize("part", ["kills", "power", "flips", "refusals", "readers", "mutants"])
def test_the_laboratory_finds_nothing_but_mutants(part):
    command = [sys.executable, "-m", "crash", part, "--quick", "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, env=shim.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{part}: ")


class Draw:
    """Fates and choices in a given order."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def test_a_power_cut_keeps_what_was_synced_and_any_part_of_the_rest():
    file, told = disk.File(), dict.fromkeys(("writes torn", "calls lost"), 0)
    file.since.append((disk.WRITE, 0, b"a" * 1024))
    file.sync()
    file.since += [(disk.WRITE, 256, b"b" * 1024), (disk.TRUNCATE, 600, b"")]
    assert file.left(Draw(0.0, 0.0), 0.5, told) == b"a" * 256 + b"b" * 344  # both kept
    assert file.left(Draw(0.9, 0.9), 0.5, told) == b"a" * 1024  # both lost
    torn = file.left(Draw(0.6, 0.0, 0.9, 0.0, 0.9), 0.5, told)  # the first and the last piece of the write
    assert torn == b"a" * 256 + b"b" * 256 + b"a" * 512 + b"b" * 256
    assert told == {"writes torn": 1, "calls lost": 3}


def test_an_entry_of_a_directory_is_durable_once_that_is_synced():
    folder, file, told = disk.Folder(), disk.File(), {"entries lost": 0}
    folder.change("", "new", file)
    assert folder.left(Draw(0.9), 0.5, told) == {} and folder.left(Draw(0.1), 0.5, told) == {"new": file}
    folder.sync()
    folder.change("new", "old", file)
    assert folder.left(Draw(0.9), 0.5, told) == {"new": file} and folder.left(Draw(0.1), 0.5, told) == {"old": file}


def test_the_shim_sees_what_sqlite_and_python_do(tmp_path):
    """The trace of a store, replayed without a power cut, is the directory; so is every kind of call in it."""
    code = f"""
import shutil, torch
from pathlib import Path
from crash.shim import Shim
from memkernels.store import MemoryStore
folder, one = Path({str(tmp_path / "here")!r}), Shim()
folder.mkdir()
one.watch(folder)
one.record(Path({str(tmp_path / "trace")!r}))
with MemoryStore.create(folder / "s", 8, 4, page_slots=16) as store:
    store.append(torch.ones(100, 8), torch.ones(100, 4))
    store.backup(folder / "copy")
    store.delete(range(50, 100))
    store.compact()
"""
    subprocess.run([sys.executable, "-c", code], env=shim.environment(), check=True)
    now, kinds = disk.Disk(tmp_path / "here"), set()
    for call in disk.calls(tmp_path / "trace"):
        kinds.add(call.kind)
        now.take(call)
    (tmp_path / "again").mkdir()
    now.cut(AllKept(), tmp_path / "again", {})
    found = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "here", tmp_path / "again")
    ]
    assert found[0] == found[1] and len(found[0]) == 10
    everything = {disk.OPEN, disk.CLOSE, disk.WRITE, disk.TRUNCATE, disk.SYNC, disk.RENAME, disk.UNLINK, disk.MKDIR}
    assert kinds == everything


class AllKept:
    def random(self) -> float:
        return 0.0

    def choice(self, of: list[float]) -> float:
        return max(of)
