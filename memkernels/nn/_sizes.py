"""The check of sizes that module constructors share."""

from __future__ import annotations


def check_sizes(module: str, **sizes: int) -> None:
    """ValueError that names the module and the argument for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{module}: {name} must be at least 1, got {size}")
