"""English text that every CPython has: its own language documentation, and docstrings of what is installed."""

from __future__ import annotations

import ast
import itertools
import pydoc_data.topics
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def documentation() -> bytes:
    """The language reference behind ``help()``, topics in alphabetical order.

    Topics quote each other; of equal paragraphs only the first is kept, so that no part of a split repeats another.
    """
    topics = pydoc_data.topics.topics
    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n") if p.strip())
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def split(text: bytes, held_out: float) -> tuple[Tensor, Tensor]:
    """Bytes as int64 tokens: the first part to train on, the last share ``held_out`` to score."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = int(len(tokens) * (1 - held_out))
    return tokens[:cut], tokens[cut:]


def streams(tokens: Tensor, count: int) -> Tensor:
    """``count`` consecutive pieces of equal length, side by side: ``[count, length]``."""
    length = len(tokens) // count
    return tokens[: count * length].view(count, length)


def windows(text: Tensor, width: int) -> list[Tensor]:
    """``text`` ``[B, length]`` as ``[B, width + 1]`` windows in order.

    Each ends with the first token of the next, so that every token is predicted once.
    """
    return [text[:, i : i + width + 1] for i in range(0, text.shape[1] - width, width)]


def docstrings(*folders: Path) -> dict[str, bytes]:
    """The docstrings of every Python file below ``folders``, by path, and the language reference by topic.

    Tests and installed packages below a folder are left out. Of equal paragraphs only the first is kept, so that no
    document repeats another.
    """
    seen: set[str] = set()
    found: dict[str, bytes] = {}
    for name, text in itertools.chain(_topics(), *map(_docstrings, folders)):
        paragraphs = [p for p in dict.fromkeys(text.split("\n\n")) if p.strip() and p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            found[name] = "\n\n".join(paragraphs).encode() + b"\n\n"
    return found


def _topics() -> Iterator[tuple[str, str]]:
    topics = pydoc_data.topics.topics
    return ((f"topic/{name}", topics[name]) for name in sorted(topics))


def _docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """Path within the parent of ``folder`` and docstrings of each file, in order of their paths."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).parts
        if {"site-packages", "test", "tests"} & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in the file's literals
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # made to be no Python, or of another version
            continue
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield "/".join(parts), "\n\n".join(filter(None, texts))
