"""What a memory does for a model, and what it costs: each figure with the memory and without, in turns."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..integrations.transformers import Attachment, Neighbours, score
from ..integrations.transformers.cache import returned_cache
from ..integrations.transformers.windows import cache_name
from .texts import Document


class Clock(NamedTuple):
    """Seconds of the wall and of the processor."""

    wall: float
    processor: float


@contextlib.contextmanager
def _without(attachment: Attachment, memory: bool) -> Iterator[None]:
    with contextlib.nullcontext() if memory else attachment.disabled():
        yield


def _timed(call: Any, *args: Any, **options: Any) -> tuple[Any, Clock]:
    wall, processor = time.perf_counter(), time.process_time()
    result = call(*args, **options)
    return result, Clock(time.perf_counter() - wall, time.process_time() - processor)


def scored(attachment: Attachment, documents: Sequence[Document], window: int, progress: Any) -> list[dict]:
    """One row per document: tokens, loss in nats per token and seconds, with the memory and without; what was read."""
    memory = attachment.memories[0]
    assert isinstance(memory, Neighbours)
    rows = []
    for number, document in enumerate(progress(documents)):
        row: dict[str, Any] = {"document": document.name, "tokens": len(document.ids) - 1, "window": window}
        for with_memory in (number % 2 == 0, number % 2 == 1):  # in turns, so that neither is always first
            name = "with" if with_memory else "without"
            with _without(attachment, with_memory):
                losses, took = _timed(score, attachment, document.ids, window=window)
            row[f"nats {name}"] = float(losses.double().mean())
            row[f"seconds {name}"], row[f"processor seconds {name}"] = took
            if with_memory:
                row.update(_read(attachment, memory, document))
        rows.append(row)
    return rows


def _read(attachment: Attachment, memory: Neighbours, document: Document) -> dict[str, Any]:
    """Records read and written for a document, and how often the true next token was among them."""
    targets, found = document.ids[1:, None], attachment.reads
    slots, weights = (x[0] for x in found["0.store"])
    in_store = (memory.store.records.rows(slots)[1][..., 0].cpu() == targets).any(-1)
    row = {
        "reads": int((slots >= 0).sum()),
        "hit rate": float(in_store.float().mean()),
        "share of the store": float(weights.sum(-1).mean()),
    }
    if memory.cache_size:
        at = found["0.cache"].slots[0]
        in_cache = ((document.ids[(at + 1).clamp(0, len(targets))] == targets) & (at >= 0)).any(-1)
        row["reads"] += int((at >= 0).sum())
        row["hit rate of the cache"] = float(in_cache.float().mean())
        row["share of the cache"] = float(found["0.cache"].weights[0].sum(-1).mean())
        row["writes"] = len(targets)
    return row


@torch.no_grad()
def decoded(attachment: Attachment, ids: torch.Tensor, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds per token where the model reads one token at a time after a prompt; with the memory and without, step by
    step in turns."""
    model, name = attachment.model, cache_name(attachment.model)
    caches: dict[bool, Any] = {}
    for with_memory in (False, True):
        with _without(attachment, with_memory):
            first = ids[None, :prompt]
            mask = torch.ones_like(first)
            caches[with_memory] = returned_cache(model(input_ids=first, attention_mask=mask, logits_to_keep=1))
    took: dict[bool, list[Clock]] = {False: [], True: []}
    for step in range(prompt, prompt + tokens):
        for with_memory in (step % 2 == 0, step % 2 == 1):
            given = {"input_ids": ids[None, step : step + 1], name: caches[with_memory], "use_cache": True}
            with _without(attachment, with_memory):
                output, clock = _timed(model, **given, attention_mask=torch.ones(1, step + 1).long())
            caches[with_memory] = returned_cache(output)
            took[with_memory].append(clock)
    row: dict[str, Any] = {"prompt": prompt, "tokens": tokens}
    for with_memory, word in ((False, "without"), (True, "with")):
        row[f"seconds {word}"] = statistics.median(clock.wall for clock in took[with_memory])
        row[f"processor seconds {word}"] = statistics.median(clock.processor for clock in took[with_memory])
    return row


def total(rows: Sequence[dict]) -> dict[str, Any]:
    """Of all documents: perplexities and their change, and the time of a token."""
    tokens = sum(row["tokens"] for row in rows)
    mean = {n: sum(row[f"nats {n}"] * row["tokens"] for row in rows) / tokens for n in ("without", "with")}
    found = {
        "tokens": tokens,
        "documents": len(rows),
        "window": rows[0]["window"],
        "perplexity without": math.exp(mean["without"]),
        "perplexity with": math.exp(mean["with"]),
        "change": math.expm1(mean["with"] - mean["without"]),
    }
    for word in ("without", "with"):
        found[f"tokens/s {word}"] = tokens / sum(row[f"seconds {word}"] for row in rows)
    ratios = [row["processor seconds with"] / row["processor seconds without"] for row in rows]
    found["time"] = statistics.median(ratios) - 1  # of the processor: other programs hardly move it
    for name in ("reads", "writes"):
        found[name] = sum(row.get(name, 0) for row in rows)
    for name in ("hit rate", "hit rate of the cache", "share of the store", "share of the cache"):
        if name in rows[0]:
            found[name] = sum(row[name] * row["tokens"] for row in rows) / tokens
    return found


def change(row: dict) -> float:
    """Of the perplexity of a document."""
    return math.expm1(row["nats with"] - row["nats without"])
