"""The peers: packages that may be absent, their versions, and what several rows make of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import sqlite3
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memkernels.store import _crc

PACKAGES = {"LMDB": ("lmdb", "lmdb"), "Lance": ("lance", "pylance"), "faiss": ("faiss", "faiss-cpu")}


def missing(name: str) -> str:
    """Why a peer cannot run here; "" where it can."""
    module, package = PACKAGES[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{error} (pip install {package})"
    return ""


def versions() -> dict[str, str]:
    """Of what is installed, and of what the store itself stands on."""
    found = {"SQLite": sqlite3.sqlite_version, "crc32c": f"by {_crc.SOURCE}"}
    for name, (_, package) in PACKAGES.items():
        if not missing(name):
            found[name] = importlib.metadata.version(package)
    return found


class Lmdb:
    """Rows under their slot number, in one LMDB environment; a commit is durable unless ``sync`` is off."""

    def __init__(self, path: Path, rows: np.ndarray, sync: bool = True) -> None:
        """rows: uint8 [N, bytes]."""
        import lmdb

        self.env = lmdb.open(str(path), map_size=64 * rows.nbytes + (64 << 20), sync=sync, metasync=sync)
        step = 1 << 16
        for first in range(0, len(rows), step):
            with self.env.begin(write=True) as txn:
                for i, row in enumerate(rows[first : first + step], first):
                    txn.put(self.key(i), row.tobytes(), append=True)

    @staticmethod
    def key(slot: int) -> bytes:
        return slot.to_bytes(8, "big")

    def write(self, slots: np.ndarray, rows: np.ndarray) -> None:
        with self.env.begin(write=True) as txn:
            for slot, row in zip(slots.tolist(), rows):
                txn.put(self.key(slot), row.tobytes())

    def read(self, slots: np.ndarray) -> np.ndarray:
        with self.env.begin(buffers=True) as txn:
            return np.stack([np.frombuffer(txn.get(self.key(slot)), np.uint8) for slot in slots.tolist()])

    def close(self) -> None:
        self.env.close()


def lance_values(path: Path, values: Tensor):
    """A Lance dataset of one column ``value``; ``take(slots [n]) -> values [n, V]``."""
    import lance
    import pyarrow

    width = values.shape[-1]
    flat = pyarrow.array(values.reshape(-1).numpy())
    column = pyarrow.FixedSizeListArray.from_arrays(flat, width)
    dataset = lance.write_dataset(pyarrow.table({"value": column}), str(path))

    def take(slots: np.ndarray) -> Tensor:
        taken = dataset.take(slots, columns=["value"])["value"].combine_chunks()
        return torch.from_numpy(taken.flatten().to_numpy(zero_copy_only=False).copy()).view(-1, width)

    return take
