"""Peak memory of a process that gathers from a table on disk, four times what its cache holds.

python -m bench.lookup.resident FILE CACHE_ROWS COUNT THREADS OUT
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memkernels.store import RowTable, StoreFormat

from ..contests.contest import same
from ..contests.finding import Finding, lacking, most
from ..memory import ENVIRONMENT, peak_extra
from .cold import COUNT, FEW, THREADS
from .setting import WIDTH, Setting

TO_FIND = 32  # bytes with which the cache finds a row
SLACK = 64 << 20  # bytes of buffers and threads
BATCHES = 8  # of random rows, after those that fill the cache
SCALE = 4  # bytes of a row's scale, all of which lie in memory


def resident(setting: Setting) -> Iterator[Finding]:
    """Peak memory of gathers from a table of four times the rows of its cache."""
    content, path = setting.content, setting.file
    cache, count = content.count // 4, setting.size(COUNT, FEW)
    allowed = cache * (WIDTH + TO_FIND) + content.count * SCALE
    what = f"tier direct of {content.text()}, {cache} rows in its cache of {allowed >> 20} MiB with the scales"
    goal = most(allowed + SLACK, "bytes")
    try:
        RowTable.open(path, tier="direct").close()
    except StoreFormat as error:
        yield lacking(f"{what}: peak memory", "", goal, f"no O_DIRECT here ({error})")
        return
    out = setting.folder / "rows.npz"
    words = [str(path), str(cache), str(count), str(setting.threads), str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.lookup.resident", *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with np.load(out) as found:
        same(torch.from_numpy(found["rows"]), content.rows(torch.from_numpy(found["slots"]), torch.float32))
    out.unlink()
    peak = json.loads(done.stdout.splitlines()[-1])
    yield Finding(f"{what}: peak memory", "", goal, peak, peak, unit="bytes")


def run(path: Path, cache_rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Fill the cache in the order of the file, then read random rows; those of the last call, and their slots."""
    random = np.random.default_rng(34)
    with RowTable.open(path, tier="direct", cache_rows=cache_rows, threads=THREADS) as table:
        out = torch.empty(count, WIDTH)
        for first in range(0, cache_rows, count):
            slots = torch.arange(first, first + count) % len(table)
            table.gather(slots, out=out)
        for _ in range(BATCHES):
            slots = torch.from_numpy(random.integers(len(table), size=count))
            table.gather(slots, out=out)
    return out, slots


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lookup.resident", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("cache", type=int, help="rows")
    parser.add_argument("count", type=int, help="rows of a call")
    parser.add_argument("threads", type=int, help="of torch")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak, (rows, slots) = peak_extra(lambda: run(options.file, options.cache, options.count), "cpu")
    np.savez(options.out, rows=rows.numpy(), slots=slots.numpy())
    print(json.dumps(peak))


ROWS = {"resident": resident}

if __name__ == "__main__":
    main()
