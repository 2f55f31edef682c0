"""What a store of tokens needs of a model: the inputs of one feed-forward network, over texts in windows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .place import Place


class _Reached(Exception):
    """The input is known: the blocks above it need not run."""


@contextlib.contextmanager
def _noting(module: nn.Module) -> Iterator[list[Tensor]]:
    """In this block every forward pass ends at ``module``, whose first input becomes the one entry of the list."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found[:] = [args[0] if args else next(iter(kwargs.values()))]
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def feed_forward_inputs(place: Place, layer: int, ids: Tensor, window: int) -> Tensor:
    """The inputs ``[T, width]`` of the feed-forward network of block ``layer``, for a text ``ids [T]``.

    The text is read in windows of ``window`` tokens, each by itself. Blocks above ``layer`` do not run.
    """
    device = next(place.model.parameters()).device
    training = place.model.training
    place.model.eval()
    rows = []
    try:
        with _noting(place.feed_forward(layer)) as found:
            for piece in ids.split(window):
                with contextlib.suppress(_Reached):
                    place.decoder(input_ids=piece[None].to(device), use_cache=False)
                rows.append(found[0][0])
    finally:
        place.model.train(training)
    return torch.cat(rows)


def named(texts: Any) -> list[tuple[str, str]]:
    """Names and texts of documents.

    Args:
        texts: a mapping name -> text, or an iterable of texts or of pairs (name, text). A text without a name gets the
            first letters of its SHA-256.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, Mapping):
        texts = texts.items()
    if not isinstance(texts, Iterable):
        raise TypeError(f"TokenStore: texts must be an iterable of str or of (name, str), got {type(texts).__name__}")
    pairs = []
    for text in texts:
        if isinstance(text, str):
            pairs.append((hashlib.sha256(text.encode()).hexdigest()[:12], text))
        elif isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
            pairs.append(text)
        else:
            raise TypeError(f"TokenStore: texts must hold str or (name, str), got {type(text).__name__}")
    return pairs


def vocabulary(tokenizer: Any) -> str:
    """What tells one tokenizer from another: SHA-256 of its tokens and their numbers."""
    words = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256("\n".join(f"{number} {token}" for number, token in words).encode()).hexdigest()


def components(inputs: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The mean ``[width]`` and the first ``dim`` principal components ``[width, dim]`` of rows, float32.

    Each component points to where its largest entry is positive.
    """
    rows = inputs.to(torch.float64) if len(inputs) < 4096 else inputs.float()
    mean = rows.mean(0)
    centred = rows - mean
    covariance = (centred.mT @ centred).to(torch.float64) / max(len(rows), 1)
    found = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :dim]
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return mean.float(), (found * largest.sign()).float().contiguous()


def bar(items: Iterable[Any], progress: bool, what: str, unit: str) -> Iterable[Any]:
    """A progress bar where tqdm is installed."""
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(items, desc=what, unit=unit)
    return items
