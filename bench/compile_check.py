"""Compiles every Triton kernel and shipped configuration ahead of time and reads the report. Needs no GPU.

    python -m bench.compile_check                   # every architecture, dtype and width; compiles what is not recorded
    python -m bench.compile_check --arch 90 --dtype bfloat16 --width 64 128
    python -m bench.compile_check --recorded --write  # what the record has whole, and renews it

A kernel fails that spills registers, needs more shared memory than a block may have, has no matrix instruction where
it multiplies 16-bit (or TF32) matrices, or whose warp-group products ptxas serialises. Exit status 1 when one does.
What a compilation needed is recorded in ``bench/results/triton-compiled.jsonl`` by a hash of all that decides it
(``bench.compilation``), so that a check takes half a minute where nothing that is compiled has changed; all of it
compiled anew takes hours. Where not even a source has changed since ``--recorded --write`` went through all classes,
``--recorded`` looks only at what ``--sample`` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import itertools
import json
import sys
from collections.abc import Container, Sequence
from pathlib import Path

from memkernels import _triton
from memkernels._extras import optional, require

from .results import DIRECTORY
from .targets import TARGETS

with optional("triton"):
    import triton

    from .compilation import Needs, kernels
    from .compile import Compiled, compiled

    NEEDS = tuple(field.name for field in dataclasses.fields(Needs))

DTYPES = ("bfloat16", "float16", "float32", "tf32")
WIDTHS = (64, 128, 256, 512)
FILE = DIRECTORY / "triton-compiled.jsonl"
COLUMNS = ("key", "kernel", "arch", "dtype", "width", "constants")
DECIDING = ("compilation.py", "compile.py", "launches.py")  # of this folder: what is compiled and how


def sources() -> str:
    """Hash of every file that decides what is launched and compiled, and of Triton's version."""
    own, kernels = Path(__file__).parent, Path(_triton.kernels().__file__).parent
    files = (*sorted(kernels.glob("*.py")), kernels / "configs.json", *(own / name for name in DECIDING))
    parts = [triton.__version__, *(text for file in files for text in (file.name, file.read_text()))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Record:
    """What compilations needed, by their key: one line each, with the first class that launches it.

    classes: (dtype, width, architecture) of which everything is recorded, without a fault.
    compared: ``sources`` when all classes were last gone through at once, empty where the record has changed since.
    """

    def __init__(self) -> None:
        self.classes, self.rows, self.compared = set(), {}, ""
        if FILE.exists():
            head, *rows = map(json.loads, FILE.read_text().splitlines())
            self.classes, self.rows = set(map(tuple, head["classes"])), {row[0]: row for row in rows}
            self.compared = head["compared"]

    def needs(self) -> dict[str, Needs]:
        """Key -> what it needs."""
        return {key: Needs(*row[len(COLUMNS) :]) for key, row in self.rows.items()}

    def put(self, one: Compiled) -> None:
        """Keep ``one``, under the class that it has already, if any."""
        known = self.rows.get(one.key, [getattr(one, name) for name in COLUMNS])[: len(COLUMNS)]
        self.rows[one.key] = [*known, *dataclasses.astuple(one.needs)]

    def close(self, kind: tuple[str, int, str], launched: Container[str], faulty: bool) -> None:
        """The whole of a class has been put: forget what stands under it and is not among ``launched``.

        A class that has a fault now stays among the classes, if it was: so it fails until it is mended.
        """
        place = [kind[2], kind[0], kind[1]]
        self.rows = {k: row for k, row in self.rows.items() if row[2:5] != place or k in launched}
        if not faulty:
            self.classes.add(kind)

    def write(self) -> None:
        """Lines in an order in which a changed kernel changes lines that stand together."""
        rows = sorted(self.rows.values(), key=lambda row: (row[1], row[2].zfill(3), *row[3:6], row[0]))
        head = {"triton": triton.__version__, "columns": [*COLUMNS, *NEEDS], "compared": self.compared}
        head["classes"] = sorted(self.classes, key=str)
        FILE.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (head, *rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_check", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--width", nargs="+", type=int, choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--recorded", action="store_true", help="instead: the classes of which all is recorded")
    parser.add_argument("--fresh", action="store_true", help="compile also what is recorded, and compare")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="the same for N that are recorded")
    parser.add_argument("--write", action="store_true", help="renew the record")
    options = parser.parse_args(arguments)
    require(parser.prog, "triton")
    gc.freeze()  # what torch and Triton have loaded stays: looking through it again and again takes a sixth of the time
    record = Record()
    recorded = record.needs()
    given = itertools.product(options.dtype, options.width, options.arch)
    chosen = sorted(record.classes) if options.recorded else list(given)
    keys = sorted(key for key, row in record.rows.items() if (row[3], row[4], row[2]) in chosen)
    again = set(keys if options.fresh else keys[:: max(1, len(keys) // options.sample)] if options.sample else ())
    known = {key: needs for key, needs in recorded.items() if key not in again}
    present = sources()
    if options.recorded and record.compared == present:
        print(f"no source has changed since {len(chosen)} classes were compared")
        chosen = sorted({(row[3], row[4], row[2]) for key, row in record.rows.items() if key in again})
        if not chosen:
            return 0
    record.compared = ""
    launched, reached, failed, fresh = set(), set(), 0, 0
    for dtype, width, arch in chosen:
        before = failed
        for one in compiled(arch, dtype, width, known=known):
            faults = one.faults()
            if one.key not in known:
                fresh += 1
                known[one.key] = one.needs
                if recorded.get(one.key, one.needs) != one.needs:
                    faults.append(f"recorded as {recorded[one.key]}")
                print(one, flush=True)
            if faults:
                failed += 1
                print(f"FAILED {one}: {', '.join(faults)}", flush=True)
            launched.add(one.key)
            reached.add(one.kernel)
            record.put(one)
        if options.write:
            record.close((dtype, width, arch), launched, failed > before)
            record.write()
    for kernel in sorted(kernels() - reached):
        failed += 1
        print(f"FAILED {kernel}: nothing launches it")
    if options.recorded and options.write and not failed:
        record.compared = present
        record.write()
    print(f"{len(launched)} kernels, {fresh} of them compiled now, {failed} faults")
    return 1 if failed or not launched else 0


if __name__ == "__main__":
    sys.exit(main())
