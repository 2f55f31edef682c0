"""A picture of which slots each token read, how strongly, and which token had written them.

A ``SimilarityLM`` is trained for some seconds on CPython's documentation. Its hidden state after each character of one
sentence is stored with the character that followed. The characters of a second sentence then read the memory by
``topk_read``: a row of the picture is a reader, a column a slot, named by the character it holds.

    python examples/slots_read.py [picture.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels import _text, topk_read
from memkernels._extras import require
from memkernels.models import SimilarityLM

WRITTEN = "a class is an object that is called to make objects"
READER = "an object is made when its class is called"


def train(steps: int = 60, width: int = 64) -> SimilarityLM:
    torch.manual_seed(0)
    text, _ = _text.split(_text.documentation(), 0.1)
    model = SimilarityLM(256, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for tokens in _text.windows(_text.streams(text, 32), 64)[:steps]:
        (logits, _), _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def contexts(model: SimilarityLM, sentence: str) -> tuple[Tensor, Tensor]:
    """The hidden state after every character but the last ``[T, D]``, and the character that followed ``[T]``."""
    tokens = torch.tensor(list(sentence.encode()))
    return model(tokens[None, :-1])[0].hidden[0], tokens[1:]


def draw(path: Path, weights: Tensor) -> None:
    from matplotlib.figure import Figure  # here, so that --help does not need it

    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(WRITTEN) - 1), list(WRITTEN[1:]), family="monospace")
    axes.set_yticks(range(len(READER) - 1), list(READER[1:]), family="monospace")
    axes.set_xlabel("slot: the character that it holds")
    axes.set_ylabel("reader: the character that came next")
    axes.xaxis.set_ticks_position("top")
    figure.colorbar(image, label="weight of the read", shrink=0.6)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main(path: str = "slots_read.png") -> dict[str, float]:
    """How often the slot that was read most holds the character that came next, and how often by chance."""
    with torch.enable_grad():
        model = train()
    keys, stored = contexts(model, WRITTEN)
    query, following = contexts(model, READER)
    values = F.one_hot(stored, 256).float()
    read, slots, weights = topk_read(query, keys, values, 4, scale=0.3, return_slots=True)
    draw(Path(path), torch.zeros(len(query), len(keys)).scatter(1, slots, weights))
    print("reader, and the four slots that it read, each with what follows in the memory:")
    for t in range(0, len(query), 6):
        places = (f"{w:.2f} {WRITTEN[: i + 1][-8:]!r} -> {WRITTEN[i + 1]!r}" for i, w in zip(slots[t], weights[t]))
        print(f"  {READER[: t + 1][-8:]!r:>10} -> {READER[t + 1]!r} read  " + ", ".join(places))
    measured = {
        "right": (read.argmax(-1) == following).float().mean().item(),
        "by chance": (following[:, None] == stored).float().mean().item(),
    }
    print(f"the next character has most of the weight in {measured['right']:.0%} of the reads", end="; ")
    print(f"a slot taken at random holds it in {measured['by chance']:.0%}\npicture: {Path(path).resolve()}")
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", default="slots_read.png", help="where it goes (default: %(default)s)")
    options = parser.parse_args()
    require(parser.prog, "matplotlib")
    main(options.picture)
