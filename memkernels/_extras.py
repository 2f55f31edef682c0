"""Optional packages of some commands: their help needs none of them, a run that lacks one exits with a sentence."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator


def absent(*packages: str) -> list[str]:
    """Those that cannot be imported."""
    found = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(name)
    return found


@contextlib.contextmanager
def optional(*packages: str) -> Iterator[None]:
    """Ignore an ImportError in this block if one of ``packages`` is absent; call :func:`require` before using them."""
    try:
        yield
    except ImportError:
        if not absent(*packages):
            raise


def require(command: str, *packages: str) -> None:
    """Exit with status 2 and one sentence where one of ``packages`` is absent."""
    if names := absent(*packages):
        are = "is" if len(names) == 1 else "are"
        why = f"needs {' and '.join(names)}, which {are} not installed (pip install {' '.join(names)})"
        print(f"{command}: {why}", file=sys.stderr)
        raise SystemExit(2)
