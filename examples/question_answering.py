"""Questions over stored facts: a story is a memory of sentences, and an answer takes two of them.

    Mary went to the garden. John took the milk. John went to the hall.   Where is the milk?   The hall.

The first read finds who took the milk, the second where that person went. Stories are generated; the same model is
trained with one read and with two, so that the difference is what the second read brings.

    python examples/question_answering.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels import address
from memkernels.nn import MultiHopRead

PERSONS = ("Mary", "John", "Anna", "Paul")
THINGS = ("milk", "ball", "book", "lamp")
PLACES = ("garden", "hall", "kitchen", "office")
WORDS = (*PERSONS, *THINGS, *PLACES, "went", "took")
WORD = {word: number for number, word in enumerate(WORDS)}


def stories(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Every person goes to one place and every thing is taken by one person, in random order.

    Returns sentences ``[count, 8, 3]`` and questions ``[count, 1]`` as words, answers ``[count]`` as places.
    """
    persons, things = torch.arange(len(PERSONS)), torch.arange(len(THINGS))
    place = torch.randint(len(PLACES), (count, len(PERSONS)), generator=generator)
    owner = torch.randint(len(PERSONS), (count, len(THINGS)), generator=generator)
    first_thing, first_place = WORD[THINGS[0]], WORD[PLACES[0]]
    went = torch.stack([persons.expand_as(place), torch.full_like(place, WORD["went"]), first_place + place], -1)
    took = torch.stack([owner, torch.full_like(owner, WORD["took"]), (first_thing + things).expand_as(owner)], -1)
    sentences = torch.cat([went, took], 1)
    order = torch.rand(sentences.shape[:2], generator=generator).argsort(1)
    asked = torch.randint(len(THINGS), (count, 1), generator=generator)
    answers = place.gather(1, owner.gather(1, asked)).squeeze(1)
    return sentences.gather(1, order.unsqueeze(-1).expand_as(sentences)), first_thing + asked, answers


class Reader(nn.Module):
    """Sentences are slots: bags of words, with one embedding for the key and one for the value."""

    def __init__(self, hops: int, width: int = 32):
        super().__init__()
        self.key, self.value, self.question = (nn.Embedding(len(WORDS), width) for _ in range(3))
        for embedding in (self.key, self.value, self.question):
            nn.init.normal_(embedding.weight, std=0.3)
        self.read = MultiHopRead(hops, width, scaled=False)
        self.answer = nn.Linear(width, len(PLACES))

    def forward(self, sentences: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the places ``[B, P]``, and which sentence each hop read, ``[hops, B, N]``."""
        keys, values = self.key(sentences).sum(-2), self.value(sentences).sum(-2)
        found, queries = self.read(self.question(questions), keys, values, return_queries=True)
        return self.answer(found.squeeze(-2)), address(queries, keys, scale=self.read.scale).squeeze(-2)


def train(hops: int, steps: int = 200, seed: int = 0) -> Reader:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Reader(hops)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        sentences, questions, answers = stories(64, generator)
        loss = F.cross_entropy(model(sentences, questions)[0], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def main() -> dict[int, float]:
    """Accuracy on stories that were not trained on, by the number of reads."""
    sentences, questions, answers = stories(2000, torch.Generator().manual_seed(1))
    accuracy = {}
    for hops in (1, 2):
        with torch.enable_grad():
            model = train(hops)
        scores, weights = model(sentences, questions)
        accuracy[hops] = (scores.argmax(-1) == answers).float().mean().item()
        print(f"{hops} read{'s' if hops > 1 else ' '}  {accuracy[hops]:.1%} of {len(answers)} questions answered")
    print("\nOne story, and how much of each sentence the two reads took:")
    for sentence, (first, second) in zip(sentences[0], weights[:, 0].T):
        print(f"  {first:4.2f} {second:4.2f}  {' '.join(WORDS[word] for word in sentence)}")
    print(f"  Where is the {WORDS[questions[0, 0]]}?  {PLACES[scores[0].argmax()]}")
    return accuracy


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
