"""A memory that is trained alone beside a frozen model, quickly: what lies below it is computed once.

The blocks up to the memory's do not learn, so that their output for the training windows is kept (bfloat16), and a step
runs the memory and the blocks above it. The head runs over a few tokens at a time, forward and backward.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..integrations.transformers import Attachment, Memory, ProductKeys
from ..integrations.transformers.place import Place
from .texts import Document

_TOKENS_OF_HEAD = 128  # logits of that many tokens stay in the processor's caches
_WARM = 20  # steps over which the rate rises


class FeedForward(Memory):
    """The control: ``y_t = x_t + W_o silu(W_i rms_norm(x_t))`` with ``hidden`` units after one block, no memory."""

    def __init__(self, layer: int, hidden: int):
        super().__init__((layer,), {"layer": layer, "hidden": hidden})
        self.part = nn.Sequential()

    def build(self, place: Place) -> None:
        hidden, out = self.options["hidden"], nn.Linear(self.options["hidden"], place.width, bias=False)
        self.zero_(out)
        self.part = nn.Sequential(nn.RMSNorm(place.width), nn.Linear(place.width, hidden), nn.SiLU(), out)
        self.part.to(**place.factory(self.layers[0]))

    def after_block(self, layer: int, hidden: Tensor, step: Any) -> Tensor:
        weight: Any = self.part[1].weight
        return hidden + self.part(hidden.to(weight.dtype)).to(hidden.dtype)


def hidden_of(parameters: int, width: int) -> int:
    """Units of the :class:`FeedForward` that comes nearest to a number of parameters."""
    return max(1, round((parameters - width) / (2 * width + 1)))


def active(memory: Memory) -> int:
    """Parameters that the computation of one token takes part of: of a table only the rows that it reads."""
    total = sum(p.numel() for p in memory.parameters())
    if isinstance(memory, ProductKeys):
        for part in memory.parts.values():
            values: Any = part.values
            total -= values.numel() - part.heads * part.k * values.shape[1]  # type: ignore[operator]
    return total


class Row(NamedTuple):
    """A window of a text: ids ``[T]``, and the output ``[T, width]`` of the block of the memory without it."""

    ids: Tensor
    below: Tensor


class _Reached(Exception):
    """The output is known: the blocks above need not run."""


def windows(documents: Iterable[Document], length: int) -> list[Tensor]:
    """Pieces ``[T]`` of ``length`` tokens, the last of a document of at least 2."""
    return [ids for document in documents for ids in document.ids.split(length) if len(ids) > 1]


@torch.no_grad()
def rows(place: Place, layer: int, texts: Iterable[Tensor]) -> list[Row]:
    """What block ``layer`` gives for windows, each read by itself; the blocks above do not run."""
    found: list[Row] = []

    def reached(module: nn.Module, args: tuple, output: Any) -> None:
        found[-1] = found[-1]._replace(below=(output[0] if isinstance(output, tuple) else output)[0])
        raise _Reached

    handle = place.blocks[layer].register_forward_hook(reached)
    try:
        for ids in texts:
            found.append(Row(ids, ids))
            with contextlib.suppress(_Reached):
                place.decoder(input_ids=ids[None], use_cache=False)
    finally:
        handle.remove()
    return found


@contextlib.contextmanager
def only_above(place: Place, layer: int) -> Iterator[None]:
    """In this block the decoder takes as embeddings what block ``layer`` gave, and passes it on from there."""
    blocks = place.blocks[: layer + 1]
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for block, forward in zip(blocks, before):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _batch(chosen: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Arguments of the decoder; which positions ``[B, T]`` have a next token, and those tokens."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([row.ids for row in chosen], batch_first=True)
    mask = pad([torch.ones_like(row.ids) for row in chosen], batch_first=True)
    below = pad([row.below for row in chosen], batch_first=True)
    counts = torch.zeros_like(mask, dtype=torch.bool)
    counts[:, :-1] = mask[:, 1:].bool()
    return {"inputs_embeds": below, "attention_mask": mask}, counts, ids[:, 1:][mask[:, 1:].bool()]


def _hidden(place: Place, chosen: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """What goes into the head ``[tokens, width]``, and the tokens to be told from it."""
    given, counts, targets = _batch(chosen)
    return place.decoder(**given, use_cache=False).last_hidden_state[counts], targets


def backward(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> float:
    """Add the gradient of the mean loss to the parameters below ``hidden``; the loss."""
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for x, wanted in zip(leaf.split(_TOKENS_OF_HEAD), targets.split(_TOKENS_OF_HEAD)):
        loss = F.cross_entropy(head(x).float(), wanted, reduction="sum") / len(targets)
        loss.backward()
        total += float(loss.detach())
    hidden.backward(leaf.grad)
    return total


@torch.no_grad()
def mean_loss(place: Place, texts: Sequence[Row]) -> float:
    """Nats per token over windows; within :func:`only_above`."""
    head = place.model.get_output_embeddings()  # type: ignore[operator]
    total, tokens = 0.0, 0
    for row in texts:
        hidden, targets = _hidden(place, [row])
        for x, wanted in zip(hidden.split(_TOKENS_OF_HEAD), targets.split(_TOKENS_OF_HEAD)):
            total += float(F.cross_entropy(head(x).float(), wanted, reduction="sum"))
        tokens += len(targets)
    return total / tokens


class Trained(NamedTuple):
    """losses: of every step. validation: (step, nats per token) at some steps. best: the step whose parameters the
    memory has. seconds, processor: of the steps, without the validation."""

    losses: list[float]
    validation: list[tuple[int, float]]
    best: int
    tokens: int
    seconds: float
    processor: float


def train(
    attachment: Attachment,
    texts: Sequence[Row],
    validation: Sequence[Row],
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    looks: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Trained:
    """Minimise the loss of the next token over the parameters of the memory by AdamW; within :func:`only_above`.

    The rate rises over 20 steps and falls linearly to a twentieth. Tables of values have three times the rate of the
    other parameters: a row learns only from the tokens that read it. ``looks`` times, at equal distances, the loss of
    the validation windows is taken; the memory is left with the parameters of the best.
    """
    place, own = attachment.place, list(attachment.parameters())
    tables = {id(p) for memory in attachment.memories for n, p in memory.named_parameters() if n.endswith("values")}
    groups = [
        {"params": [p for p in own if id(p) not in tables], "lr": rate},
        {"params": [p for p in own if id(p) in tables], "lr": 3 * rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM) * (1 - 0.95 * step / steps)
    )
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    head = place.model.get_output_embeddings()  # type: ignore[operator]
    losses: list[float] = []
    seen: list[tuple[int, float]] = []
    best: list[Tensor] = []
    tokens, seconds, processor = 0, 0.0, 0.0
    for step in progress(range(1, steps + 1)):
        wall, cpu = time.perf_counter(), time.process_time()
        if len(order) < batch:
            order = torch.randperm(len(texts), generator=generator).tolist()
        hidden, targets = _hidden(place, [texts[order.pop()] for _ in range(batch)])
        optimizer.zero_grad()
        losses.append(backward(head, hidden, targets))
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        tokens += len(targets)
        seconds, processor = seconds + time.perf_counter() - wall, processor + time.process_time() - cpu
        if step * looks // steps > (step - 1) * looks // steps:
            seen.append((step, mean_loss(place, validation)))
            if seen[-1][1] == min(loss for _, loss in seen):
                best = [p.detach().clone() for p in own]
    with torch.no_grad():
        for parameter, kept in zip(own, best):
            parameter.copy_(kept)
    return Trained(losses, seen, min(seen, key=lambda pair: pair[1])[0], tokens, seconds, processor)
