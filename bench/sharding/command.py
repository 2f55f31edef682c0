"""``python -m bench sharding``: the nine bars of slots over ranks, measured here, and the tests that hold the others.

Ranks are processes of one thread each on this machine, joined by gloo. Times depend on what else runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import timeit
from pathlib import Path

import torch

import memkernels as mk
from memkernels import registration
from memkernels._scale import exchanged

from .. import results
from . import ranks
from .page import OUT

TESTS = {  # bar -> the tests that hold it
    "1 results of one process, edges": ("tests/test_sharding.py", "over_slots or other_axes or few_slots or ties"),
    "3 gradcheck and gradgradcheck": ("tests/test_sharding.py", "derivatives"),
    "7 lost ranks, calls that differ": ("tests/test_sharding_failures.py tests/test_sharding.py", "lost or checked"),
    "8 checkpoints over 2, 4 and 1 ranks": ("tests/test_sharding_modules.py", "checkpoints"),
    "9 fullgraph, FSDP2, DDP, 2-D meshes": ("tests/test_sharding_modules.py", "compiled or fsdp or ddp or two_dim"),
}


def measured(world: int) -> list[dict]:
    """Bars 1, 2 and 4 at ``world`` ranks."""
    rows = []
    found = ranks.run(ranks.differences, world)
    for name, got in found.items():
        wanted = True if isinstance(got, bool) else 1e-12
        kind = "4 same bits" if "bits" in name else "1 float64, relative error"
        rows.append(_row(kind, f"{name}, {world} ranks", wanted, got))
    moved = ranks.run(ranks.moved, world)
    tokens, width, best = ranks.TOKENS, ranks.WIDTH, ranks.BEST
    bounds = {
        "read": exchanged(tokens, (width + 1) * 4, world),
        "search": exchanged(tokens, best * (4 + 8), world),
        "backward": 2 * (world - 1) * tokens * width * 4 // world,
        "write": 0,
        "usage": 0,
    }
    for name, got in moved.items():
        rows.append(_row("2 bytes received", f"{name} slots, {world} ranks", bounds[name.split(" ")[0]], got))
    return rows


def _row(bar: str, what: str, wanted: float | bool | None, got: float | bool) -> dict:
    """wanted: True, a largest number, or None for what is only reported."""
    passed = wanted is None or (got is True if wanted is True else got <= wanted)
    return {"bar": bar, "what": what, "wanted": wanted, "got": got, "passed": bool(passed)}


def times() -> list[dict]:
    """Bars 5 and 6."""
    call = ranks.run(ranks.overhead, 1)
    key = _key_seconds()
    rows = [
        _row("5 share of a plain call that the type in its key takes", "softmax_read", 0.03, key / call["plain"]),
        _row("5 seconds more on a mesh of one rank", "softmax_read", 100e-6, call["one rank"] - call["plain"]),
    ]
    torch.set_num_threads(2)
    keys, values = (torch.randn(1 << 20, ranks.WIDTH) for _ in range(2))
    query = ranks.query()
    with torch.no_grad():
        alone = ranks.median_seconds(lambda: mk.softmax_read(query, keys, values))
    two = ranks.run(ranks.strong, 2)["seconds"]
    rows.append(_row("6 seconds of 2 ranks", "T=8 N=2^20, beside 2 threads of one process", 1.15 * alone + 0.6e-3, two))
    one, both = (ranks.run(ranks.weak, world)["seconds"] for world in (1, 2))
    rows.append(_row("6 seconds of 1 rank", "T=8, 2^19 slots", None, one))
    rows.append(_row("6 seconds of 2 ranks", "weak scaling: T=8, 2^19 slots each, one memory bus", None, both))
    return rows


def _key_seconds() -> float:
    """What ``type(t)`` of every tensor adds to the key of a plan of softmax_read."""
    tensors = [torch.randn(8, 32) for _ in range(3)] + [None, None]
    names = {"tensors": tensors}
    plain = "[None if t is None else (t.shape, t.dtype, t.device) for t in tensors]"
    typed = "[None if t is None else (type(t), t.shape, t.dtype, t.device) for t in tensors]"
    assert "(type(t), t.shape, t.dtype, t.device)" in Path(registration.__file__).read_text()
    count = 20000
    rounds = [[timeit.timeit(code, globals=names, number=count) / count for code in (typed, plain)] for _ in range(9)]
    return sorted(a - b for a, b in rounds)[4]


def tested() -> list[dict]:
    """The bars that tests hold: whether they pass here."""
    rows = []
    for bar, (files, which) in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files.split(), "-k", which]
        done = subprocess.run(command, cwd=results.DIRECTORY.parent.parent, capture_output=True, text=True)
        passed = done.returncode == 0
        row = {"bar": bar, "what": f"{files} -k '{which}'", "wanted": "pass", "got": "pass" if passed else "fail"}
        rows.append({**row, "passed": passed})
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sharding", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the result file")
    parser.add_argument("--no-tests", action="store_true", help="only what is measured")
    options = parser.parse_args(arguments)
    rows = [*measured(2), *measured(4), *times(), *([] if options.no_tests else tested())]
    rows.sort(key=lambda row: row["bar"])
    for row in rows:
        print(f"{'ok ' if row['passed'] else 'NO '} {row['bar']}: {row['what']}: {row['got']} of {row['wanted']}")
    options.out.write_text(json.dumps({"setting": results.environment("cpu", 2), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1
