"""A knowledge base that changes under a frozen reader: facts are added, corrected and deleted while it answers.

    the capital of bakora is milu    a slot: the key says what it is about, the value the answer, metadata where from
    what is the seat of bakora?      a read of the store, and the answer is "milu", or "unknown"

A reader is trained once, on small sets of facts about names that never come back, and frozen. A store of other facts
about other names answers through it, while a second object writes to that store. After every change the answers are
counted: the right one, the old one, "unknown". Sources that contradict each other are told apart by filters of source
and year. Every answer comes with the slots that it was read from.

    python examples/knowledge_base.py [picture.png]
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels import softmax_read
from memkernels._extras import require
from memkernels.store import MemoryStore

RELATIONS = ("capital", "river", "ruler", "founder")
SYLLABLES = ("ba", "ko", "ra", "mi", "lu", "ne", "ta", "si", "do", "ve", "pa", "gu", "hi", "zo", "fe", "ja")
WIDTH, NEIGHBOURS = 64, 8
TRAINED, STORED, ANSWERS = 4000, 400, 100  # countries to train on and to store; answers, as many for each


@cache
def letters(part: str) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(part.encode())))


@cache
def vector(name: str) -> Tensor:
    """The sum of the name's letter triples, each a fixed random vector: every name has one. ``[WIDTH]``"""
    return F.normalize(sum(letters(f"^{name}$"[i : i + 3]) for i in range(len(name))), dim=0)


def vectors(names: list[str]) -> Tensor:
    return torch.stack([vector(name) for name in names])


def make_names(count: int, length: int, generator: torch.Generator) -> list[str]:
    """Different names of ``length`` syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        chosen = torch.randint(len(SYLLABLES), (length,), generator=generator).tolist()
        found["".join(SYLLABLES[i] for i in chosen)] = None
    return list(found)


class Facts(NamedTuple):
    """A list each: countries, relations as numbers, answers."""

    countries: list[str]
    relations: list[int]
    answers: list[str]

    def __getitem__(self, part: slice) -> Facts:
        return Facts(*(column[part] for column in (self.countries, self.relations, self.answers)))

    def answered(self, answers: list[str], generator: torch.Generator) -> Facts:
        """The same questions with other answers."""
        moved = torch.randint(1, len(answers), (len(self.answers),), generator=generator).tolist()
        others = [answers[(answers.index(old) + by) % len(answers)] for old, by in zip(self.answers, moved)]
        return self._replace(answers=others)


def make_facts(countries: list[str], answers: list[str], generator: torch.Generator) -> Facts:
    """Every relation of every country, in random order."""
    about = [(country, relation) for country in countries for relation in range(len(RELATIONS))]
    about = [about[i] for i in torch.randperm(len(about), generator=generator)]
    chosen = torch.randint(len(answers), (len(about),), generator=generator)
    return Facts([c for c, _ in about], [r for _, r in about], [answers[i] for i in chosen])


class Reader(nn.Module):
    """Keys of facts, queries of questions, and the answer that a read means.

    Facts and questions name a relation in different words, so that the reader must learn which belong together.
    "Unknown" has the weight of a slot whose score is ``threshold``.
    """

    def __init__(self):
        super().__init__()
        self.told, self.asked = (nn.Embedding(len(RELATIONS), WIDTH) for _ in range(2))
        self.key, self.query, self.answer = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.sharpness, self.threshold = nn.Parameter(torch.full((), 2.0)), nn.Parameter(torch.full((), 5.0))
        for relation in (self.told, self.asked):
            nn.init.normal_(relation.weight, std=WIDTH**-0.5)
        for linear, size in ((self.key, 1.0), (self.query, 1.0), (self.answer, 10.0)):
            nn.init.eye_(linear.weight)  # names that are alike point the same way from the beginning
            linear.weight.data.mul_(size)

    def keys(self, facts: Facts) -> Tensor:
        return self.key(vectors(facts.countries)) + self.told(torch.tensor(facts.relations))

    def queries(self, facts: Facts) -> Tensor:
        return self.sharpness.exp() * (self.query(vectors(facts.countries)) + self.asked(torch.tensor(facts.relations)))

    def scores(self, read: Tensor, lse: Tensor, answers: list[str]) -> Tensor:
        """Log probability of every answer, then of "unknown". read ``[T, WIDTH]``, lse ``[T]`` -> ``[T, A + 1]``."""
        among = (self.answer(read) @ vectors(answers).T).log_softmax(-1)
        known, unknown = F.logsigmoid(lse - self.threshold), F.logsigmoid(self.threshold - lse)
        return torch.cat([known.unsqueeze(-1) + among, unknown.unsqueeze(-1)], -1)


def train(countries: list[str], answers: list[str], steps: int = 150) -> Reader:
    """Each step tells 256 facts, then asks about 64 of them and about 64 that it did not tell."""
    generator = torch.Generator().manual_seed(1)
    reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        some = [countries[i] for i in torch.randperm(len(countries), generator=generator)[:80]]
        facts = make_facts(some, answers, generator)
        told, asked = facts[:256], facts[192:]
        keys, values = reader.keys(told), vectors(told.answers)
        read, lse = softmax_read(reader.queries(asked), keys, values, scale=1.0, return_lse=True)
        wanted = torch.tensor([answers.index(answer) for answer in asked.answers[:64]] + 64 * [len(answers)])
        loss = F.nll_loss(reader.scores(read, lse, answers), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader.eval().requires_grad_(False)


class Server:
    """Answers from a store that it opens for reading; it sees every commit at its next question."""

    def __init__(self, reader: Reader, path: Path, answers: list[str]):
        self.reader, self.answers, self.store = reader, answers, MemoryStore.open(path)

    def ask(self, facts: Facts, where=None) -> tuple[list[str], Tensor, Tensor]:
        """The answers to the questions behind ``facts``; the slots that were read, and with what weight."""
        query = self.reader.queries(facts)
        read, slots, weights, lse = self.store.topk_read(
            query, NEIGHBOURS, scale=1.0, where=where, return_slots=True, return_lse=True
        )
        best = self.reader.scores(read, lse, self.answers).argmax(-1)
        return [[*self.answers, "unknown"][i] for i in best], slots, weights

    def share(self, facts: Facts, other: Facts | None = None, where=None) -> dict[str, float]:
        """How many of the answers are those of ``facts``, those of ``other``, and "unknown".

        cited: how many are what the metadata of the slot that was read most say.
        """
        given, slots, _ = self.ask(facts, where)
        said = [meta["text"] for meta in self.store.meta(slots[:, 0])]
        found = {
            "right": [a == b for a, b in zip(given, facts.answers)],
            "other": [a == b for a, b in zip(given, other.answers)] if other else [],
            "unknown": [answer == "unknown" for answer in given],
            "cited": [a == b for a, b in zip(texts(facts._replace(answers=given)), said)],
        }
        return {kind: sum(those) / len(given) for kind, those in found.items()}


def texts(facts: Facts) -> list[str]:
    return [f"the {RELATIONS[relation]} of {country} is {answer}" for country, relation, answer in zip(*facts)]


def tell(reader: Reader, store: MemoryStore, facts: Facts, source: str, year: int) -> Tensor:
    """Facts into new slots."""
    return store.append(reader.keys(facts), vectors(facts.answers), documents(facts, source, year))


def documents(facts: Facts, source: str, year: int) -> list[dict]:
    return [{"text": text, "source": source, "year": year} for text in texts(facts)]


def changes(reader: Reader, folder: str, countries: list[str], answers: list[str]) -> dict[str, dict[str, float]]:
    """What is answered after each change of the store."""
    generator = torch.Generator().manual_seed(2)
    facts = make_facts(countries, answers, generator)
    base, added, never = facts[:1000], facts[1000:1300], facts[1300:]
    kept, corrected, deleted, disputed = base[:250], base[250:500], base[500:750], base[750:]
    measured = {}
    with MemoryStore.create(Path(folder) / "facts", WIDTH, WIDTH) as store:
        slots = tell(reader, store, base, "atlas", 2020)
        server = Server(reader, store.path, answers)
        measured["facts that are stored"] = server.share(base)
        measured["facts that nobody told"] = server.share(never)

        measured["to be added, before"] = server.share(added)
        tell(reader, store, added, "atlas", 2021)
        measured["added"] = server.share(added)

        right = corrected.answered(answers, generator)
        store.write(slots[250:500], values=vectors(right.answers), meta=documents(right, "errata", 2022))
        measured["corrected"] = server.share(right, other=corrected)

        store.delete(slots[500:750])
        measured["deleted"] = server.share(deleted, other=deleted)

        claims = disputed.answered(answers, generator)
        tell(reader, store, claims, "forum", 2023)
        for source, said, other in (("atlas", disputed, claims), ("forum", claims, disputed)):
            measured[f"disputed, of the {source}"] = server.share(said, other=other, where=("source = ?", [source]))
        measured["disputed, until 2020"] = server.share(disputed, other=claims, where=("year <= ?", [2020]))
        measured["disputed, no filter"] = server.share(disputed, other=claims)
        provenance(server, disputed[:1])
        store.delete(where=("source = ?", ["forum"]))
        measured["the forum is deleted, no filter"] = server.share(disputed, other=claims)
        measured["facts that never changed"] = server.share(kept)
        server.store.close()
    return measured


def provenance(server: Server, question: Facts) -> None:
    (answer,), slots, weights = server.ask(question)
    print(f"the {RELATIONS[question.relations[0]]} of {question.countries[0]}? {answer}, read from")
    for slot, weight in zip(slots[0, :3].tolist(), weights[0]):
        (meta,) = server.store.meta([slot])
        print(f"  {weight:4.2f} slot {slot:4}  {meta['text']} ({meta['source']}, {meta['year']})")


def draw(path: str | Path, measured: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure  # so that --help does without

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(measured)
    for kind, colour in (("right", "tab:blue"), ("other", "tab:red"), ("unknown", "lightgrey")):
        shares = [row[kind] for row in measured.values()]
        axes.barh(list(measured), shares, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, shares)]
    axes.invert_yaxis()
    axes.set_xlabel("share of the answers")
    figure.legend(loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=120)


def main(path: str | Path | None = None) -> dict[str, dict[str, float]]:
    """Shares of the answers that are right, the old one or that of the other source, and "unknown", by what changed."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    countries, answers = make_names(TRAINED + STORED, 4, generator), make_names(2 * ANSWERS, 2, generator)
    reader = train(countries[:TRAINED], answers[:ANSWERS])
    with tempfile.TemporaryDirectory() as folder:
        measured = changes(reader, folder, countries[TRAINED:], answers[ANSWERS:])
    print(f"\n{'':34}{'right':>8}{'other':>8}{'unknown':>9}{'cited':>8}")
    for name, row in measured.items():
        print(f"{name:34}{row['right']:8.1%}{row['other']:8.1%}{row['unknown']:9.1%}{row['cited']:8.1%}")
    if path is not None:
        draw(path, measured)
        print(f"picture: {Path(path).resolve()}")
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", help="where a picture goes (default: none is drawn)")
    options = parser.parse_args()
    if options.picture:
        require(parser.prog, "matplotlib")
    main(options.picture)
