"""A pretrained model gets a memory of documents, in ten lines: SmolLM2-135M reads a manual and quotes what it read.

    python examples/pretrained_memory.py [FOLDER] [--tokens 24] [--prompt TEXT] [--page FILE]

FOLDER holds text files; by default it is docs/tutorials of this checkout. ``--page`` writes a page that shows the
records behind each token that was generated. Needs ``pip install
'memkernels[evaluate]'``. ``--tiny`` takes random weights and a few texts instead: it shows that everything works, in
seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import memkernels
from memkernels._evaluate import texts, tiny

DOCS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"


def remember(model: Any, tokenizer: Any, documents: dict[str, str], k: int = 32, cache: int = 1024, **options: Any):
    """The ten lines: a store of the documents, a memory over it, its shares learned on the last document."""
    from memkernels.integrations import transformers as mkt  # here, so that --help needs no extra

    *read, (_, held_out) = documents.items()
    store = mkt.TokenStore.build(model, tokenizer, read, **options)
    memory = mkt.Neighbours(store, k=k, cache=cache)
    h = mkt.attach(model.requires_grad_(False), memory)
    h.fit([held_out], window=256, progress=options.get("progress", True))
    return h, memory


def quote(h: Any, memory: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[torch.Tensor, list[str]]:
    """``prompt`` and what follows, ids ``[1, T]``, and for each token that follows the record that weighed most."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = h.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    lines = []
    following = written[0, ids.shape[1] :].tolist()
    read = [x[:, ids.shape[1] - 1 :] for x in h.reads["0.store"]]  # row t tells where token t + 1 came from
    for token, best in zip(following, memory.sources(type(h.reads["0.store"])(*read), most=1)):
        weight, source = best[0]
        lines.append(f"{tokenizer.decode([token])!r:>16}  {weight:5.1%}  {source}")
    return written, lines


LINES = ("a memory keeps what was read. ", "what was read is found again. ", "a memory is found again. ")  # for --tiny


def main(argv: list[str] | None = None) -> list[str]:
    """What it prints of each generated token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS)
    parser.add_argument("--prompt", default="A memory is N slots, each a")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--page", type=Path, help="write a page of the records behind each token")
    parser.add_argument("--tiny", action="store_true", help="random weights and small texts")
    options = parser.parse_args(argv)
    if options.tiny:
        model, tokenizer = tiny.language_model()
        documents = {f"notes/{number}": line * 8 for number, line in enumerate(LINES)}
        h, memory = remember(model, tokenizer, documents, k=8, cache=64, dim=16, progress=False)
    else:
        if absent := texts.missing():
            parser.error(f"needs {', '.join(absent)}: pip install 'memkernels[evaluate]'")
        model, tokenizer = texts.language_model()
        h, memory = remember(model, tokenizer, dict(texts.of_folder(options.folder)))
    prompt = "a memory " if options.tiny else options.prompt
    with h.disabled():
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.tokens, do_sample=False)
    print("without:", tokenizer.decode(alone[0].tolist()))
    written, lines = quote(h, memory, tokenizer, prompt, options.tokens)
    print("with:   ", tokenizer.decode(written[0].tolist()))
    print("token, share of the record in the store's vote, and where it stands:", *lines, sep="\n")
    if options.page:
        print("page:   ", memkernels.show(h, written, options.page, prompt=ids.shape[1]))
    h.detach()
    return lines


if __name__ == "__main__":
    main()
