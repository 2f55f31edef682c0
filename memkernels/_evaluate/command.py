"""The command ``python -m memkernels evaluate``."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import texts

DESCRIPTION = """Give SmolLM2-135M a memory of a manual, and measure what it is worth and what it costs: perplexity of
documents that neither the store nor the tuning has seen, tokens per second, bytes, reads and writes. With --train, a
memory is trained alone on the documents of the store instead, the model frozen, and feed-forward networks of as many
parameters are trained in the same place beside it."""
KINDS = ("product-keys", "streaming")  # that --train takes


class Sizes(NamedTuple):
    """Tokens: of the store, for tuning, to measure, of one document, of another domain; generated one by one."""

    store: int = 160_000
    validation: int = 14_000
    test: int = 15_000
    document: int = 3072
    unrelated: int = 6_000
    decoded: int = 48


QUICK = Sizes(4_000, 2_000, 2_000, 1024, 1_000, 8)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m memkernels evaluate", description=DESCRIPTION)
    made.add_argument("--manual", action="append", choices=[*texts.MANUALS], help="whose documents (default: all)")
    made.add_argument("--texts", type=Path, help="a folder of texts in place of the manuals: one memory of your own")
    made.add_argument("--unrelated", type=Path, help="a folder of texts of another domain, to measure with each memory")
    made.add_argument("--work", type=Path, default=Path(".build/evaluate"), help="downloads and stores (%(default)s)")
    made.add_argument("--out", type=Path, help="write the result as JSON")
    made.add_argument("--picture", type=Path, help="write a picture of it")
    made.add_argument("--k", type=int, default=64, help="neighbours of a token (%(default)s)")
    made.add_argument("--cache", type=int, default=2048, help="tokens of the text so far (%(default)s)")
    made.add_argument("--dim", type=int, default=64, help="of the keys (%(default)s)")
    made.add_argument("--window", type=int, default=1024, help="context of the model (%(default)s); twice that too")
    made.add_argument("--train", action="append", choices=KINDS, help="train this memory alone, and controls beside it")
    made.add_argument("--steps", type=int, help="of the training of each (default: one pass over the documents)")
    made.add_argument("--seed", type=int, default=0, help="of the training (%(default)s)")
    made.add_argument("--quick", action="store_true", help="small texts: shows that it works, and no more")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(argv)
    if absent := texts.missing():
        names = ", ".join(absent)
        print(f"{made.prog}: needs {names} (pip install 'memkernels[evaluate]')", file=sys.stderr)
        return 2
    try:
        result = run(options)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 2
    from . import report, trained_report

    tables: Any = trained_report if options.train else report
    print(tables.table(result))
    print(tables.documents(result))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))
    if options.picture is not None:
        print(tables.draw(result, options.picture))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report holds."""
    model, tokenizer = texts.language_model()
    model.requires_grad_(False)
    sizes = QUICK if options.quick else Sizes()
    other = [] if options.unrelated is None else texts.of_folder(options.unrelated)
    collections = {}
    if options.texts is not None:
        collections[options.texts.name] = texts.of_folder(options.texts)
    else:
        for name in options.manual or texts.MANUALS:
            manual = texts.MANUALS[name]
            collections[name] = texts.of_archive(manual, texts.fetched(manual.package, options.work))
    result: dict[str, Any] = {
        "model": "SmolLM2-135M",
        "dtype": str(model.dtype)[6:],
        "sizes": sizes._asdict(),
        **{name: getattr(options, name) for name in ("k", "cache", "dim", "window")},
        **_environment(),
        "stores": {},
        "runs": [],
    }
    if options.train:
        from . import trained

        budget = trained.budget(options.steps, options.quick)
        del result["stores"], result["k"], result["cache"], result["dim"]
        result.update(budget=budget._asdict(), rates=list(trained.RATES), seed=options.seed)
    far = texts.unrelated(other, tokenizer, sizes.unrelated, sizes.document)
    for name, documents in collections.items():
        split = texts.split(documents, tokenizer, sizes._asdict(), sizes.document)
        for part, found in split._asdict().items():
            if not found:
                raise ValueError(f"evaluate: {name} must hold documents of each part, got none for {part}")
        if options.train:
            result["runs"].append(trained.run(name, model, tokenizer, split, far, options, budget))
            continue
        store, runs = _one(name, model, tokenizer, split, far, sizes, options)
        result["stores"][name] = store
        result["runs"] += runs
    return result


def _one(
    name: str, model: Any, tokenizer: Any, split: texts.Split, far: list, sizes: Sizes, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One memory: built, fitted, measured."""
    from ..integrations import transformers as mkt
    from ..integrations.transformers.encoding import bar
    from . import measure

    folder = options.work / f"{name}-store{'-quick' if options.quick else ''}"
    if (folder / "store.json").exists():
        store = mkt.TokenStore.load(folder, model, tokenizer)
        kept = [document["document"] for document in store.documents if document]
        if kept != [document for document, _ in split.store] or store.dim != options.dim:
            raise ValueError(f"evaluate: {folder} must hold the store of these texts, got another: remove it")
    else:
        store = mkt.TokenStore.build(model, tokenizer, split.store, dim=options.dim)
        store.save(folder)
    memory = mkt.Neighbours(store, k=options.k, cache=options.cache)
    attachment = mkt.attach(model, memory)
    losses = attachment.fit([document.ids for document in split.validation], window=options.window)
    runs = []

    def measured(label: str, documents: list, window: int) -> None:
        def progress(items: Any) -> Any:
            return bar(items, True, f"{label}, {window}", "document")

        rows = measure.scored(attachment, documents, window, progress)
        runs.append({"texts": label, "store": name, "total": measure.total(rows), "documents": rows})

    measured(name, split.test, options.window)
    if far:
        measured(f"{options.unrelated.name}, memory of {name}", far, options.window)
    measured(name, split.test, 2 * options.window)
    longest = max(split.test, key=lambda document: len(document.ids)).ids
    prompt = min(options.window, len(longest) - sizes.decoded - 1)
    described = {
        "records": len(store),
        "documents": sum(document is not None for document in store.documents),
        "bytes per slot": store.bytes_per_slot,
        "bytes": len(store) * store.bytes_per_slot,
        "parameters": sum(p.numel() for p in memory.parameters()),
        "validation": [document.name for document in split.validation],
        "loss of the fit": losses[-1],
        "temperatures": memory.mixing.log_temperature.exp().tolist(),
        "decoding": measure.decoded(attachment, longest, prompt, sizes.decoded),
    }
    attachment.detach()
    return described, runs


def _commit() -> str:
    """Of the checkout that this package lies in; empty where it is installed by itself."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git
        return ""


def _environment() -> dict[str, Any]:
    import transformers

    from .. import __version__, _native

    return {
        "device": "cpu",
        "processor": _native.host().processor(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.memkernels_cpu.isa() if _native.missing() is None else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memkernels": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
