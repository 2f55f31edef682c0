"""Writes tests/data/stores: what a release leaves on a disk, which every later one must open (test_store_format.py).

Run it when the format gets a new version, and commit what it writes beside the old ones:

    python tests/data/make_stores.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from memkernels.store import MemoryStore
from memkernels.store._database import FORMAT

FOLDER = Path(__file__).with_name("stores")
SLOTS, K, V, PAGE = 40, 3, 2, 16


def keys(slots: torch.Tensor) -> torch.Tensor:
    return torch.stack([slots.float(), 100.0 - slots, torch.ones(len(slots))], 1)


def values(slots: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    return torch.stack([slots * 2.0 + shift, slots * -1.0], 1)


def write(path: Path, key_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    """40 slots; a snapshot; then slots 3 and 20 with other values, slots 5 and 6 deleted, and slots 40 and 41."""
    with MemoryStore.create(path, K, V, key_dtype=key_dtype, value_dtype=value_dtype, page_slots=PAGE) as store:
        slots = torch.arange(SLOTS)
        store.append(
            keys(slots).to(store.columns["keys"].read_dtype),
            values(slots).to(store.columns["values"].read_dtype),
            [{"number": i, "kind": "even" if i % 2 == 0 else "odd"} for i in range(SLOTS)],
        )
        store.snapshot("before")
        some = torch.tensor([3, 20])
        store.write(some, values=values(some, 1000.0).to(store.columns["values"].read_dtype))
        store.delete([5, 6])
        more = torch.tensor([40, 41])
        store.append(
            keys(more).to(store.columns["keys"].read_dtype), values(more).to(store.columns["values"].read_dtype)
        )


STORES = {
    "float32": (torch.float32, torch.float32),
    "float8_int8": (torch.float8_e4m3fn, torch.int8),
}

if __name__ == "__main__":
    for name, dtypes in STORES.items():
        path = FOLDER / f"format{FORMAT}_{name}"
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(exist_ok=True)
        write(path, *dtypes)
