"""New documents reach a model that serves: they are known at once, old ones are measured too, and all can go again.

A frozen model reads from a ``TokenStore`` of old documents. Between its requests documents of another kind are added,
one at a time. The store has the first two thirds of each document; perplexity is measured on the last third, which
nobody reads before. Shares that were learned while the store was small may not fit the larger one: they are learned
again, on an old document that is not in the store. At the end the old shares are back and the new documents removed.

    python examples/continual_documents.py [OLD] [NEW] [--documents 3] [--tokens 384]

OLD and NEW are folders of text files. By default OLD is docs/ of this checkout, and NEW are the manuals of modules of
Python, as ``help()`` prints them. Needs ``pip install 'memkernels[evaluate]'``. ``--tiny`` takes random weights and a
few texts instead.
"""

from __future__ import annotations

import argparse
import copy
import math
import pydoc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memkernels._evaluate import texts, tiny

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODULES = ("argparse", "csv", "json", "logging", "random", "socket", "statistics", "string")
FORGOTTEN = 0.02  # rise of the perplexity of old documents that is allowed; whether it was kept is printed
LINES = {
    "old": ("a memory keeps what was read. ", "what was read is found again. ", "the model reads a memory. "),
    "new": ("3.14159 = pi; 2.71828 = e; ", "[1, 2, 3] + [4, 5] -> [1, 2, 3, 4, 5]; ", "x*x + y*y <= r*r & x > 0; "),
}


class Document(NamedTuple):
    """name, the text that the store gets, and ids ``[T]`` that are measured."""

    name: str
    text: str
    measured: torch.Tensor


def parted(documents: Sequence[tuple[str, str]], tokenizer: Any, count: int, tokens: int) -> list[Document]:
    """The first ``count`` documents that are long enough: two thirds to keep, ``tokens`` of the rest to measure."""
    found: list[Document] = []
    for name, text in documents:
        text = text[: 24 * tokens]
        cut = 2 * len(text) // 3
        ids = torch.as_tensor(tokenizer(text[cut:], add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) > tokens // 2 and len(found) < count:
            found.append(Document(name, text[:cut], ids[:tokens]))
    return found


class Server:
    """A model with a memory: answers requests, takes documents in and out, and is measured."""

    def __init__(
        self, model: Any, tokenizer: Any, old: list[Document], held_out: Document, progress: Any, **store: Any
    ):
        from memkernels.integrations import transformers as mkt  # here, so that --help needs no extra

        self.tokenizer, self.progress, self.score = tokenizer, progress, mkt.score
        read = [(document.name, document.text) for document in old]
        self.store = mkt.TokenStore.build(model.requires_grad_(False), tokenizer, read, progress=False, **store)
        self.h = mkt.attach(model, mkt.Neighbours(self.store, k=32, cache=256))
        self.held_out = held_out
        self.fit()

    def fit(self) -> None:
        """Learn the shares of the memory on a document that it has not read."""
        self.h.fit([(self.held_out.name, self.held_out.text)], progress=False, window=256)

    def request(self, ids: torch.Tensor, tokens: int = 8) -> str:
        """What follows a prompt ``ids [T]``."""
        given = ids[None]
        mask = torch.ones_like(given)
        written = self.h.model.generate(given, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(written[0, ids.shape[0] :].tolist())

    def perplexity(self, documents: Sequence[Document], what: str) -> float:
        losses = [self.score(self.h, document.measured) for document in self.progress(documents, desc=what)]
        return math.exp(torch.cat(losses).double().mean())


def measure(server: Server, old: list[Document], new: list[Document]) -> dict[str, dict[str, float]]:
    """Perplexity of old and new documents: without memory, before, after each addition, and after the removal."""
    measured: dict[str, dict[str, float]] = {}

    def note(step: str) -> None:
        row = {"old": server.perplexity(old, f"{step}: old"), "new": server.perplexity(new, f"{step}: new")}
        measured[step] = {**row, "records": len(server.store)}

    with server.h.disabled():
        note("no memory")
    note("before")
    for number, document in enumerate(new):
        answer = server.request(old[number % len(old)].measured[:32])  # served while the store grows
        records = server.store.add([(document.name, document.text)], progress=False)
        print(f"answered {answer!r}, then read {document.name}: {records:,} records")
        if number in (0, len(new) - 1):
            note(f"with {number + 1} new")
    mixing = server.h.memories[0].mixing
    before = copy.deepcopy(mixing.state_dict())
    server.fit()
    note("shares anew")
    mixing.load_state_dict(before)
    server.store.remove(where=("document like ?", ["new/%"]))
    note("removed")
    return measured


def report(measured: dict[str, dict[str, float]]) -> None:
    before = measured["before"]
    print(f"{'perplexity of':16}{'old documents':>16}{'':9}{'new documents':>16}{'':9}{'records':>10}")
    for step, row in measured.items():
        cells = "".join(f"{row[kind]:16.3f} {row[kind] / before[kind] - 1:+7.1%} " for kind in ("old", "new"))
        print(f"{step:16}{cells}{int(row['records']):10,}")
    for step in [step for step in measured if step.startswith("with")][-1:] + ["shares anew"]:
        worse = measured[step]["old"] / before["old"] - 1
        kept = "kept" if worse <= FORGOTTEN else "not kept"
        print(f"old documents, {step}: {worse:+.2%}; at most {FORGOTTEN:+.0%} is allowed: {kept}")


def manuals() -> list[tuple[str, str]]:
    """What ``help()`` prints of modules of Python."""
    return [(name, pydoc.render_doc(name, renderer=pydoc.plaintext)) for name in MODULES]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Perplexities, by step and kind of document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", nargs="?", type=Path, default=DOCS)
    parser.add_argument("new", nargs="?", type=Path)
    parser.add_argument("--documents", type=int, default=3, help="of each kind")
    parser.add_argument("--tokens", type=int, default=384, help="of each document that are measured, at most")
    parser.add_argument("--tiny", action="store_true", help="random weights and small texts")
    options = parser.parse_args(argv)
    count, tokens = options.documents, options.tokens
    if options.tiny:
        model, tokenizer = tiny.language_model()
        kinds = {kind: [(str(number), line * 20) for number, line in enumerate(LINES[kind])] for kind in LINES}
        count, tokens, shape = 2, 96, {"dim": 16, "layer": -2}
    else:
        if absent := texts.missing():
            parser.error(f"needs {', '.join(absent)}: pip install 'memkernels[evaluate]'")
        model, tokenizer = texts.language_model()
        kinds = {"old": [(name, text) for name, text in texts.of_folder(options.old) if name.endswith((".md", ".txt"))]}
        kinds["new"] = texts.of_folder(options.new) if options.new else manuals()
        shape = {"dim": 64, "layer": -4}
    *old, held_out = parted([(f"old/{name}", text) for name, text in kinds["old"]], tokenizer, count + 1, tokens)
    new = parted([(f"new/{name}", text) for name, text in kinds["new"]], tokenizer, count, tokens)
    server = Server(model, tokenizer, old, held_out, bar(not options.tiny), **shape)
    measured = measure(server, old, new)
    report(measured)
    server.h.detach()
    return measured


def bar(show: bool) -> Any:
    """tqdm, or nothing."""
    if show:
        from tqdm import tqdm

        return tqdm
    return lambda items, **_: items


if __name__ == "__main__":
    main()
