"""The peers: packages that may be absent, and what several rows make of them."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PACKAGES = {"LMDB": ("lmdb", "lmdb"), "Lance": ("lance", "pylance"), "faiss": ("faiss", "faiss-cpu")}


def missing(name: str) -> str:
    """Why a peer cannot run here; "" where it can."""
    module, package = PACKAGES[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{error} (pip install {package})"
    return ""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of the peers that are installed."""
    return {name: importlib.metadata.version(PACKAGES[name][1]) for name in names if not missing(name)}


class Lmdb:
    """Rows under their slot number, in one LMDB environment; a commit is durable unless ``sync`` is off."""

    def __init__(self, path: Path, rows: np.ndarray, sync: bool = True) -> None:
        """rows: uint8 [N, bytes]."""
        self.options = {"map_size": 64 * rows.nbytes + (64 << 20), "sync": sync, "metasync": sync}
        self.open(path)
        step = 1 << 16
        for first in range(0, len(rows), step):
            with self.env.begin(write=True) as txn:
                for i, row in enumerate(rows[first : first + step], first):
                    txn.put(self.key(i), row.tobytes(), append=True)

    def open(self, path: Path) -> None:
        """Again, after :meth:`close`."""
        import lmdb

        self.env = lmdb.open(str(path), **self.options)

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
