"""Domains arrive one after the other and never come back: a memory keeps the old ones, a network forgets them.

Each domain has its own inputs and its own names for five classes. The network is trained on the current domain. The
memory is not trained. An example that it gets wrong is written into the least used slot, because there are far fewer
slots than examples. An answer is a ``topk_read`` of the labels of the nearest examples. After every domain both are
tested on all domains so far. Forgetting is the accuracy on a domain right after it was learnt, less that at the end.

    python examples/continual_learning.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels import topk_read
from memkernels.nn import SlotUse, least_used, replace_slots

DOMAINS, CLASSES, WIDTH = 6, 5, 16
EXAMPLES, BATCH = 300, 20


def domain(generator: torch.Generator):
    """A function that draws examples ``[count, WIDTH]`` of unit length and their labels ``[count]``."""
    centre, spread = torch.randn(WIDTH, generator=generator), torch.randn(3 * CLASSES, WIDTH, generator=generator)
    label = torch.arange(3 * CLASSES) % CLASSES  # three clusters per class, so that no line separates the classes

    def draw(count: int) -> tuple[Tensor, Tensor]:
        cluster = torch.randint(3 * CLASSES, (count,), generator=generator)
        x = centre + spread[cluster] + 0.6 * torch.randn(count, WIDTH, generator=generator)
        return F.normalize(x, dim=-1), label[cluster]

    return draw


class Network:
    """Two layers, trained on what arrives; sees every example of a domain ten times."""

    def __init__(self):
        self.layers = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, CLASSES))
        self.optimizer = torch.optim.Adam(self.layers.parameters(), lr=5e-3)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        for _ in range(10):
            for part in torch.randperm(len(x)).split(BATCH):
                loss = F.cross_entropy(self.layers(x[part]), labels[part])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def predict(self, x: Tensor) -> Tensor:
        return self.layers(x).argmax(-1)


class Memory:
    """Examples, with their own vectors as keys; sees each example once."""

    def __init__(self, slots: int):
        self.keys, self.labels = torch.zeros(slots, WIDTH), torch.zeros(slots, CLASSES)
        self.use = SlotUse.none(slots)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        filled = self.use.last_used >= 0
        return topk_read(x, self.keys, self.labels, 5, scale=30.0, slot_mask=filled, return_slots=True)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        for part, wanted in zip(x.split(BATCH), labels.split(BATCH)):
            scores, slots, weights = self._read(part)
            read = torch.zeros(len(self.keys) + 1).index_add(0, (slots + 1).flatten(), weights.flatten())[1:]
            self.use = self.use.after_read(read, len(part), decay=0.9995)
            wrong = scores.argmax(-1) != wanted
            slots = least_used(self.use, int(wrong.sum()))
            self.keys = replace_slots(self.keys, slots, part[wrong])
            self.labels = replace_slots(self.labels, slots, F.one_hot(wanted[wrong], CLASSES))
            self.use = self.use.after_replacement(slots)

    def predict(self, x: Tensor) -> Tensor:
        return self._read(x)[0].argmax(-1)


def main(slots: int = 160) -> dict[str, dict[str, float]]:
    """Accuracy over all domains at the end, and what was forgotten, of both learners."""
    torch.manual_seed(0)
    domains = [domain(torch.Generator().manual_seed(seed)) for seed in range(DOMAINS)]
    tests = [draw(500) for draw in domains]
    learners = {"network": Network(), "memory": Memory(slots)}
    curve = {name: [] for name in learners}  # accuracy by domain, after each domain
    for number, draw in enumerate(domains):
        x, labels = draw(EXAMPLES)
        for name, learner in learners.items():
            learner.learn(x, labels)
            with torch.no_grad():
                right = [(learner.predict(x) == labels).float().mean().item() for x, labels in tests[: number + 1]]
            curve[name].append(right)
    measured = {}
    for name, rows in curve.items():
        print(f"{name}: accuracy on each domain (across), after each domain (down)")
        for row in rows:
            print("  " + " ".join(f"{share:6.1%}" for share in row))
        fresh = [row[-1] for row in rows]
        forgotten = [new - end for new, end in zip(fresh[:-1], rows[-1])]
        measured[name] = {
            "accuracy": sum(rows[-1]) / DOMAINS,
            "when fresh": sum(fresh) / DOMAINS,
            "forgetting": sum(forgotten) / len(forgotten),
        }
        print("  " + ", ".join(f"{key} {value:.1%}" for key, value in measured[name].items()))
    used = int((learners["memory"].use.last_used >= 0).sum())
    print(f"the memory used {used} of {slots} slots for {DOMAINS * EXAMPLES} examples")
    return measured


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
