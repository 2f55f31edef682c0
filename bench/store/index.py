"""The approximate index after a twentieth of the slots changed, against the exact search of one tensor and faiss."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from memkernels import ops
from memkernels.store import MemoryStore

from ..contests.contest import Contest
from ..contests.finding import TOLD, Finding, Wrong, lacking, least
from ..contests.peers import missing
from . import exact
from .setting import Memory, Setting, normal, warm

EXACT, FAISS = "exact, one tensor", "faiss alone"
TOKENS, BEST = 16, 10
CHANGED = 0.05
NOISE = 0.3  # of a key or a query around its centre, whose numbers have variance 1


def clustered(count: int, centres: Tensor, seed: int) -> Tensor:
    """Rows around centres, as the keys of a trained model lie; isotropic ones have no neighbourhoods to index."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(centres), (count,), generator=generator)
    return centres[chosen] + NOISE * torch.randn(count, centres.shape[-1], generator=generator)


def index(setting: Setting) -> Iterator[Finding]:
    """The approximate search, 5% of the slots changed since the index was built: consecutive ones, then scattered."""
    if absent := missing("faiss"):
        yield lacking("approximate topk_search", EXACT, least(4), absent)
        return
    import faiss

    faiss.omp_set_num_threads(setting.threads)
    count, lists = setting.size(1 << 20, 1 << 12), setting.size(1024, 16)
    (centres,) = normal(setting.size(1 << 14, 64), 64, seed=9)
    keys = clustered(count, centres, seed=10)
    (values,) = normal(count, 4, seed=11)
    memory = Memory.make(setting, "index", keys, values)
    changes = int(CHANGED * count)
    places = {
        "consecutive": np.arange(count // 3, count // 3 + changes),
        "scattered": np.random.default_rng(12).choice(count, changes, replace=False),
    }
    with MemoryStore.open(memory.path, mode="w", ram_bytes=2 * memory.nbytes) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a low recall at quick sizes; it is measured below
        warm(store)
        for name, slots in places.items():
            store.build_index(f"IVF{lists},Flat")
            stale = store._engine.index[1]
            at = torch.from_numpy(slots)
            keys[at] = clustered(changes, centres, seed=13)
            store.write(at, keys=keys[at])
            yield from _compared(setting, store, keys, stale, centres, f"{changes} {name} slots changed")
        yield _just_written(store, clustered(setting.size(64, 8), centres, seed=16))
    shutil.rmtree(memory.path)


def _compared(setting: Setting, store: MemoryStore, keys: Tensor, stale, centres: Tensor, state: str):
    """Speed and recall. ``stale``: the index itself, which does not know what changed."""
    query = clustered(TOKENS, centres, seed=14)
    wanted, _ = exact.topk(query, keys, BEST)

    def rescored(found: tuple[Tensor, Tensor]) -> None:
        """Scores are those of their slots, each named once; how many of the best are among them is told below."""
        exact.best(found, query, keys, exact.scores(query, keys).gather(1, found[1]))

    what = f"approximate topk_search of {TOKENS} tokens, k = {BEST}, {state}"
    contest = Contest(what, lambda: store.topk_search(query, BEST, index="approximate"), rescored)
    contest.enter(
        EXACT,
        lambda: ops.topk_search(query, keys, BEST),
        check=lambda found: exact.best(found, query, keys, wanted),
    )
    contest.enter(FAISS, lambda: stale.search(query.numpy(), BEST), check=lambda _: None)  # its recall is told below
    contest.run(setting.seconds)
    yield contest.against(EXACT, least(4))
    yield contest.against(FAISS, TOLD)
    many = clustered(256, centres, seed=15)
    _, best = exact.topk(many, keys, BEST)
    _, slots = store.topk_search(many, BEST, index="approximate")
    _, theirs = stale.search(many.numpy(), BEST)
    own, other = recall(slots, best), recall(torch.from_numpy(theirs), best)
    yield Finding(f"recall of the {BEST} best, {state}", FAISS, least(0.98, "share"), own, own, other, "share")


def recall(found: Tensor, wanted: Tensor) -> float:
    """Share of the wanted slots that are found."""
    return float((wanted.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean())


def _just_written(store: MemoryStore, query: Tensor) -> Finding:
    """Keys that point where a query does, farther out than any other: each must be the best slot of its query."""
    query = query / query.norm(dim=1, keepdim=True)
    slots = torch.arange(0, store.capacity, store.capacity // len(query))[: len(query)]
    found = 0
    for slot, row in zip(slots, query):
        store.write(slot.view(1), keys=64 * row.unsqueeze(0))
        _, got = store.topk_search(row.unsqueeze(0), 1, index="approximate")
        found += int(got) == int(slot)
    if found != len(query):
        raise Wrong(f"of {len(query)} slots just written {found} were found")
    return Finding("slots just written that are found", "", least(1, "share"), 1.0, 1.0, unit="share")


ROWS = {"index": index}
