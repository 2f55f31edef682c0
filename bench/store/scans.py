"""Peak memory of searches over more data than the budget holds, in a process of its own.

python -m bench.store.scans FOLDER BUDGET THREADS
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

from memkernels import ops
from memkernels.store import MemoryStore

from ..contests.finding import TOLD, Finding, Wrong, most
from ..memory import ENVIRONMENT, peak_extra
from . import exact
from .setting import Memory, Setting, normal

MAPPED = "memmap"
TOKENS, BEST, SLACK = 4, 10, 64 << 20


def queries(dim: int) -> Tensor:
    (query,) = normal(TOKENS, dim, seed=17)
    return query


def scan(setting: Setting) -> Iterator[Finding]:
    """A search and a read of all slots, four times what the budget holds."""
    memory = setting.memory
    budget = memory.nbytes // 4
    what = f"topk_search and softmax_read of {memory.nbytes >> 20} MiB, {budget >> 20} MiB of RAM given"
    done = subprocess.run(
        [sys.executable, "-m", "bench.store.scans", str(memory.path), str(budget), str(setting.threads)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peaks = json.loads(done.stdout.splitlines()[-1])
    for name in VARIANTS:
        _check(memory, setting.folder / f"{name}.npz")
    own, theirs = peaks["store"], peaks[MAPPED]
    yield Finding(what, "", most(budget + SLACK, "bytes"), own, own, unit="bytes")
    yield Finding(what, f"{MAPPED}, its mapped pages among them", TOLD, own / theirs, own, theirs, "bytes")


def _check(memory: Memory, file: Path) -> None:
    found = {name: torch.from_numpy(part) for name, part in np.load(file).items()}
    file.unlink()
    query = queries(memory.keys.shape[-1])
    exact.best((found["scores"], found["slots"]), query, memory.keys, exact.topk(query, memory.keys, BEST)[0])
    exact.near("read", found["read"], exact.softmax_read(query, memory.keys, memory.values))


def of_store(path: Path, budget: int) -> tuple[Tensor, ...]:
    with MemoryStore.open(path, ram_bytes=budget) as store:
        query = queries(store.columns["keys"].dim)
        return (*store.topk_search(query, BEST), store.softmax_read(query))


def of_memmap(path: Path, budget: int) -> tuple[Tensor, ...]:
    """The files of pages as they are, taken for one tensor each; the system alone decides what stays in memory."""
    with MemoryStore.open(path) as store:
        columns, tables, count = store.columns, store._engine.tables, len(store)
    pages = -(-count // columns["keys"].slots)
    if any((table["extent"][:pages] != np.arange(pages)).any() for table in tables.values()):
        raise Wrong("the pages do not lie in order")
    keys, values = (
        torch.from_numpy(np.memmap(path / f"{c.name}.pages", np.float32, mode="c").reshape(-1, c.dim)[:count])
        for c in columns.values()
    )
    query = queries(columns["keys"].dim)
    return (*ops.topk_search(query, keys, BEST), ops.softmax_read(query, keys, values))


VARIANTS = {"store": of_store, MAPPED: of_memmap}
ROWS = {"scan": scan}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.store.scans", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a store; results are written beside it")
    parser.add_argument("budget", type=int, help="ram_bytes")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keys, values = normal(64, 64, 64)
    query = queries(64)
    ops.topk_search(query, keys, BEST), ops.softmax_read(query, keys, values)  # loads kernels, starts threads
    peaks = {}
    for name, run in VARIANTS.items():
        peaks[name], (scores, slots, read) = peak_extra(lambda run=run: run(options.folder, options.budget), "cpu")
        np.savez(options.folder.parent / f"{name}.npz", scores=scores, slots=slots, read=read)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
