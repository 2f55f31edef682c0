"""``python -m memkernels evaluate --train KIND``: memories trained alone, and networks of their size beside."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..integrations import transformers as mkt
from ..integrations.transformers.encoding import bar
from ..integrations.transformers.place import Place
from . import texts
from .training import FeedForward, Row, Trained, active, hidden_of, mean_loss, only_above, rows, train, windows

RATES = (1e-3, 3e-3)  # of which the validation documents choose


class Budget(NamedTuple):
    """layer: the block after which all stand. length: tokens of a window. batch: windows of a step. steps: of each
    training. tuning: steps by which a rate is chosen. looks: how often the validation documents are measured."""

    layer: int = 26
    length: int = 512
    batch: int = 1
    steps: int = 128
    tuning: int = 24
    looks: int = 2


QUICK = Budget(length=128, steps=4, tuning=2)


def budget(steps: int | None, quick: bool) -> Budget:
    """The default one, or of that many steps, a fifth of them to choose a rate."""
    found = QUICK if quick else Budget()
    return found if steps is None else found._replace(steps=steps, tuning=max(1, steps // 5))


class Kind(NamedTuple):
    """How a memory is made beside a model, for a layer."""

    name: str
    make: Callable[[int], mkt.Memory]


KINDS = {
    "product-keys": Kind("product keys", lambda layer: mkt.ProductKeys([layer], n=128, heads=4, k=16)),
    "streaming": Kind("streaming", lambda layer: mkt.Streaming([layer], mem_size=64, heads=9)),
}


def run(
    name: str, model: Any, tokenizer: Any, split: texts.Split, far: list, options: argparse.Namespace, budget: Budget
) -> dict[str, Any]:
    """Everything trained on one manual, and its test documents by each."""
    place = Place.of(model.eval())
    began = time.perf_counter()

    def read(pieces: list[torch.Tensor], what: str) -> list[Row]:
        return rows(place, budget.layer, bar(pieces, True, what, "window"))

    def ids(text: str) -> torch.Tensor:
        return torch.as_tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    pieces = windows([texts.Document(title, ids(text)) for title, text in split.store], budget.length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(options.seed)).tolist()
    store = read([pieces[i] for i in order[: budget.steps * budget.batch]], f"{name}, to train")
    validation = read(windows(split.validation, budget.length)[::2], f"{name}, validation")
    encoded = time.perf_counter() - began
    with only_above(place, budget.layer):
        without = mean_loss(place, validation)
    memories: dict[str, mkt.Memory] = {}
    trained: list[dict[str, Any]] = []
    for key in options.train:
        memory, row = _trained(KINDS[key], place, store, validation, budget, options.seed)
        memories[row["name"]] = memory
        trained.append(row)
        for control in _controls(row, place.width):
            if control.name not in memories:
                memories[control.name], beside = _trained(control, place, store, validation, budget, options.seed)
                trained.append(beside)
    documents = _measured(model, memories, name, split.test, options)
    if far:
        documents += _measured(model, memories, options.unrelated.name, far, options)
    return {
        "texts": name,
        "documents": len(split.store),
        "tokens": sum(map(len, pieces)),
        "validation": [document.name for document in split.validation],
        "validation nats without": without,
        "seconds to encode": encoded,
        "seconds": time.perf_counter() - began,
        "trained": trained,
        "test": documents,
    }


def _controls(row: dict[str, Any], width: int) -> list[Kind]:
    """Feed-forward networks with as many parameters as a memory has, and as many as one of its tokens needs."""
    sizes = {hidden_of(row[what], width) for what in ("parameters", "active")}
    return [Kind(f"MLP of {size:,} units", partial(FeedForward, hidden=size)) for size in sorted(sizes)]


def _fresh(kind: Kind, layer: int, seed: int) -> mkt.Memory:
    torch.manual_seed(seed)
    return kind.make(layer)


def _trained(
    kind: Kind, place: Place, store: list[Row], validation: list[Row], budget: Budget, seed: int
) -> tuple[mkt.Memory, dict[str, Any]]:
    """The rate by the validation documents after a few steps, then all steps."""

    def once(rate: float, steps: int, looks: int) -> tuple[mkt.Memory, Trained]:
        memory = _fresh(kind, budget.layer, seed)
        attachment = mkt.attach(place.model, memory)
        try:
            with only_above(place, budget.layer):
                done = train(
                    attachment,
                    store,
                    validation,
                    steps=steps,
                    rate=rate,
                    batch=budget.batch,
                    seed=seed,
                    looks=looks,
                    progress=lambda steps: bar(steps, True, f"{kind.name}, rate {rate:g}", "step"),
                )
        finally:
            attachment.detach()
        return memory, done

    tuning = {rate: once(rate, budget.tuning, 1)[1].validation[-1][1] for rate in RATES}
    rate = min(tuning, key=lambda rate: tuning[rate])
    memory, done = once(rate, budget.steps, budget.looks)
    row = {
        "name": kind.name,
        "options": memory.options,
        "parameters": sum(p.numel() for p in memory.parameters()),
        "active": active(memory),
        "rate": rate,
        "tuning": [[rate, loss] for rate, loss in tuning.items()],
        "steps": len(done.losses),
        "best step": done.best,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "processor seconds": done.processor,
        "losses": [round(loss, 4) for loss in done.losses],
        "validation": [[step, loss] for step, loss in done.validation],
    }
    return memory, row


def _measured(
    model: nn.Module, memories: dict[str, mkt.Memory], label: str, documents: list, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per document: tokens, and nats per token without a memory and with each."""
    found = []
    for document in bar(documents, True, f"{label}, {options.window}", "document"):
        row: dict[str, Any] = {"texts": label, "document": document.name, "tokens": len(document.ids) - 1}
        row["nats"] = {"": float(mkt.score(model, document.ids, window=options.window).double().mean())}
        for name, memory in memories.items():
            attachment = mkt.attach(model, memory)
            loss = mkt.score(attachment, document.ids, window=options.window)
            attachment.detach()
            row["nats"][name] = float(loss.double().mean())
        found.append(row)
    return found


def perplexities(documents: list[dict[str, Any]]) -> dict[str, float]:
    """Over all tokens of some documents, by the name of what was trained; "": without."""
    tokens = sum(row["tokens"] for row in documents)
    return {
        name: math.exp(sum(row["nats"][name] * row["tokens"] for row in documents) / tokens)
        for name in documents[0]["nats"]
    }
