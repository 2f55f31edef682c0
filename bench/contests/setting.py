"""How a run is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """
    folder: an empty folder on the disk that is measured; rows leave nothing in it that later rows do not use.
    quick: sizes at which everything runs within seconds. Their figures say nothing, and goals are not judged.
    """

    folder: Path
    quick: bool = False
    threads: int = 1

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def seconds(self) -> float:
        """About how long one contest is timed."""
        return 0.02 if self.quick else 4.0
