"""Train the memories of an attachment on texts, the model frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .place import token_ids

if TYPE_CHECKING:
    from .attachment import Attachment


def fit(
    attachment: Attachment,
    data: Any,
    tokenizer: Any = None,
    *,
    steps: int | None = None,
    lr: float = 1e-3,
    batch: int = 4,
    length: int = 256,
    progress: bool = True,
    seed: int = 0,
) -> list[float]:
    """Minimise the loss of the next token over the parameters of the memories alone, by AdamW.

    The model is in evaluation mode and frozen meanwhile; what was trainable before is so afterwards.

    Args:
        attachment: whose memories learn. data: texts (a str or an iterable of them), or token ids (a tensor ``[T]`` or
            ``[B, T]``, or an iterable of sequences).
        tokenizer: for texts; default: the one that a memory has, such as that of a ``TokenStore``.
        steps: of the optimizer; default: one epoch. lr: learning rate at the beginning; it decays linearly to a tenth.
        batch, length: rows per step, and their tokens. progress: show a bar. seed: of the order of the rows.

    Returns:
        The loss of each step.

    Raises:
        TypeError: texts without a tokenizer. ValueError: no text of at least 2 tokens, a tokenizer that is not that of
            the model, or nothing to train.
    """
    own = list(attachment.parameters())
    if not own:
        raise ValueError("fit: the memories must have parameters, got none")
    rows = _rows(attachment, data, tokenizer, length)
    order = torch.Generator().manual_seed(seed)
    steps = -(-len(rows) // batch) if steps is None else steps
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / max(steps, 1))
    losses: list[float] = []
    with alone(attachment), torch.enable_grad():
        for number in _bar(steps, progress):
            at = number * batch % len(rows)
            if at == 0 or number == 0:
                rows = [rows[i] for i in torch.randperm(len(rows), generator=order)]
            ids, mask = _padded(rows[at : at + batch])
            labels = ids.masked_fill(mask == 0, -100)
            loss = attachment.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses


def _rows(attachment: Attachment, data: Any, tokenizer: Any, length: int) -> list[Tensor]:
    """Texts in rows of at most ``length`` tokens, of at least 2."""
    if tokenizer is None:
        tokenizer = next((m.tokenizer for m in attachment.memories if m.tokenizer is not None), None)
    if isinstance(data, str) or (isinstance(data, Tensor) and data.dim() == 1):
        data = [data]
    rows: list[Tensor] = []
    for text in data:
        ids = token_ids("fit", attachment.place, text, tokenizer)
        rows += [row for row in ids.split(length) if len(row) > 1]
    if not rows:
        raise ValueError("fit: data must hold a text of at least 2 tokens, got none")
    return rows


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``ids [B, T]`` and ``mask [B, T]``, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


@contextlib.contextmanager
def alone(attachment: Attachment) -> Iterator[None]:
    """The memories are trainable, and nothing else."""
    model = attachment.model
    own = {id(p) for p in attachment.parameters()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in own)
    try:
        yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)
        model.train(training)


def _bar(steps: int, progress: bool) -> Iterator[int] | range:
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(range(steps), desc="fit", unit="step")
    return range(steps)
