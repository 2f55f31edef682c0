"""A dialogue longer than the window that the model sees: what leaves the window is written into a memory.

    "my pet is a cat" ... small talk ... "no, my pet is a dog" ... small talk ...   "what is my pet?"   "a dog"

Every utterance is one vector. The model attends to the last few; those before them are written into an
``ExternalMemory``. Dialogues are generated. One model is trained with the memory and one without. Both are asked about
things said inside and outside the window, and about things that were corrected.

    python examples/dialogue_memory.py
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels import softmax_read
from memkernels.nn import ExternalMemory

SUBJECTS, VALUES, SMALL_TALK = 4, 8, 16  # subjects such as "pet"; what each may be; utterances that mean nothing
LENGTH, WINDOW = 24, 6
WORDS = SUBJECTS + VALUES + SMALL_TALK


class Dialogues(NamedTuple):
    """utterances: words ``[B, LENGTH, 2]``. asked, answer: ``[B]``, a subject and what was last said of it.

    distance: ``[B]``, utterances since then. corrected: bool ``[B]``, something else had been said before.
    """

    utterances: Tensor
    asked: Tensor
    answer: Tensor
    distance: Tensor
    corrected: Tensor


def dialogues(count: int, generator: torch.Generator) -> Dialogues:
    """Six facts at random places among small talk; the first four name each subject once, the rest correct one."""

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, (count, *shape), generator=generator)

    talk = SUBJECTS + VALUES + draw(SMALL_TALK, LENGTH, 2)
    place = torch.rand(count, LENGTH, generator=generator).argsort(1)[:, :6].sort(1).values
    order = torch.rand(count, SUBJECTS, generator=generator).argsort(1)
    subject = torch.cat([order, draw(SUBJECTS, 2)], 1)
    value = draw(VALUES, 6)
    facts = torch.stack([subject, SUBJECTS + value], -1)
    asked = draw(SUBJECTS)
    about = subject == asked[:, None]
    last = (about * torch.arange(1, 7)).argmax(1, keepdim=True)
    return Dialogues(
        talk.scatter(1, place.unsqueeze(-1).expand_as(facts), facts),
        asked,
        value.gather(1, last).squeeze(1),
        LENGTH - place.gather(1, last).squeeze(1),
        about.sum(1) > 1,
    )


class Listener(nn.Module):
    """Answers from the last ``WINDOW`` utterances, and from a memory of those before them."""

    def __init__(self, remembers: bool, width: int = 48):
        super().__init__()
        self.remembers = remembers
        self.word, self.position = nn.Embedding(WORDS, width), nn.Embedding(WINDOW, width)
        self.key = nn.Linear(width, width, bias=False)
        self.memory = ExternalMemory(16, width, width, gate_bias=-3.0)
        self.answer = nn.Linear(2 * width, VALUES)

    def forward(self, utterances: Tensor, asked: Tensor) -> Tensor:
        """words ``[B, T, 2]`` and subjects ``[B]`` -> scores of the values ``[B, VALUES]``."""
        said, question = self.word(utterances).sum(-2), self.word(asked).unsqueeze(1)
        window = said[:, -WINDOW:] + self.position.weight
        heard = softmax_read(question, self.key(window), window)
        state = self.memory.initial_state(len(said))
        if self.remembers:
            state = self.memory.write(said[:, :-WINDOW], state)
        return self.answer(torch.cat([heard, self.memory.read(question, state)], -1)).squeeze(1)


def train(remembers: bool, steps: int = 300, seed: int = 0) -> Listener:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Listener(remembers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        batch = dialogues(64, generator)
        loss = F.cross_entropy(model(batch.utterances, batch.asked), batch.answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> dict[str, dict[str, float]]:
    """Accuracy on dialogues that were not trained on, by model and by where the answer was said."""
    batch = dialogues(2000, torch.Generator().manual_seed(1))
    outside = batch.distance > WINDOW
    kinds = {"in the window": ~outside, "before the window": outside, "before it, corrected": outside & batch.corrected}
    accuracy = {}
    print(f"{'':20}" + "".join(f"{kind:>22}" for kind in kinds))
    for name, remembers in (("window alone", False), ("window and memory", True)):
        model = train(remembers)
        with torch.no_grad():
            right = model(batch.utterances, batch.asked).argmax(-1) == batch.answer
        accuracy[name] = {kind: right[chosen].float().mean().item() for kind, chosen in kinds.items()}
        print(f"{name:20}" + "".join(f"{share:22.1%}" for share in accuracy[name].values()))
    print(f"a guess is right in {1 / VALUES:.1%}; the window holds {WINDOW} of {LENGTH} utterances")
    return accuracy


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
