"""The versions of the peers and of what the store itself stands on, and Lance."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memkernels.store import _crc

from ..contests import peers


def versions() -> dict[str, str]:
    """Of what is installed, and of what the store itself stands on."""
    return {"SQLite": sqlite3.sqlite_version, "crc32c": f"by {_crc.SOURCE}", **peers.versions(peers.PACKAGES)}


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
