"""A chat that outgrows its window: facts said long ago are recalled, and a correction wins over what it corrects.

    "Clara has a pet goat." ... small talk ... "I was wrong." "Clara has a pet parrot." ... small talk ...
    "What pet does Clara have?"   "Clara has a pet parrot."

The model sees the last few turns. Every turn that leaves this window goes to a ``TokenStore``. A frozen model answers
each question in these ways: from the window alone; with the votes of the store's nearest records (``Neighbours``); with
the turn that ``TokenStore.recall`` finds put back into the window; with both. Of turns that are recalled equally well,
to within 2%, the latest is taken: what is said twice of the same thing has nearly the same score, so the correction
wins, and nothing needs to be deleted. A fifth column has the right turn put there, what recall could give at best. An
answer is right if it names the value that was said last, and no other.

    python examples/chat_memory.py [--dialogues 2] [--facts 24]

Needs ``pip install 'memkernels[evaluate]'``. ``--tiny`` takes a small model that is trained on such dialogues in
seconds instead of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from typing import Any, NamedTuple

import torch

from memkernels._evaluate import texts

NAMES = (
    "Clara",
    "Bruno",
    "Ingrid",
    "Tomas",
    "Amara",
    "Felix",
    "Noor",
    "Pavel",
    "Greta",
    "Ruben",
    "Selma",
    "Oskar",
    "Mira",
    "Hugo",
    "Lena",
    "Anton",
    "Sofia",
    "Emil",
    "Irene",
    "Jonas",
    "Paula",
    "Viktor",
    "Nadia",
    "Boris",
)
KINDS = {
    "{name} works at the {value}.": (
        "Where does {name} work?",
        ("harbour", "library", "bakery", "museum", "school", "garden", "hospital", "station"),
    ),
    "{name} has a pet {value}.": (
        "What pet does {name} have?",
        ("parrot", "tortoise", "goat", "hedgehog", "lizard", "rabbit", "donkey", "snake"),
    ),
    "{name} lives in {value}.": (
        "Where does {name} live?",
        ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Vienna", "Porto", "Bergen"),
    ),
    "{name} plays the {value}.": (
        "Which instrument does {name} play?",
        ("cello", "banjo", "trumpet", "harp", "violin", "drums", "flute", "piano"),
    ),
}
TALK = """The weather has been mild this week.
I made soup for lunch and it was too salty.
The bus was late again this morning.
I read an article about how bridges are built.
The neighbours are painting their fence.
I am trying to drink less coffee.
The new shop on the corner sells good bread.
It rained all night and the grass is wet.
I watched a film about deep sea divers.
The meeting was longer than it had to be.
The train to the coast takes three hours.
Somebody left the lights on in the hall.
I like walking along the river in the evening.
The kitchen clock stopped at noon.
There is a market in the square on Saturday.
We are out of milk and eggs.""".splitlines()
CORRECTION = "I was wrong about something."
WINDOW = 4  # turns that the model sees
ALIKE = 0.02  # scores that differ by less are of turns about the same thing; chosen on dialogues that are not measured
GIVEN = "right turn given"  # what the model would answer if recall never failed
WAYS = ("window alone", "votes", "recall", "recall and votes", GIVEN)


class Fact(NamedTuple):
    """A question, the value that was said last, the one that it corrects (or ""), and the turns that said them."""

    question: str
    value: str
    before: str
    turn: int
    corrected: int
    others: tuple[str, ...]


def dialogue(seed: int, facts: int, corrections: int, names: tuple[str, ...]) -> tuple[list[str], list[Fact]]:
    """Turns, and what is to be known of them. Between two facts there are three turns of small talk."""
    draw = random.Random(seed)
    pairs = draw.sample([(name, kind) for name in names for kind in KINDS], facts)
    turns: list[str] = []
    known: dict[int, Fact] = {}

    def tell(number: int) -> None:
        (name, kind), old = pairs[number], known.get(number)
        question, values = KINDS[kind]
        value = draw.choice([value for value in values if old is None or value != old.value])
        before, corrected = (old.value, old.turn) if old else ("", -1)
        known[number] = Fact(question.format(name=name), value, before, len(turns), corrected, values)
        turns.append(kind.format(name=name, value=value))
        turns.extend(draw.sample(TALK, 3))

    for number in range(facts):
        tell(number)
    for number in draw.sample(range(facts), corrections):
        turns.append(CORRECTION)
        tell(number)
    turns.extend(draw.sample(TALK, WINDOW))
    return turns, list(known.values())


class Chat:
    """A frozen model that sees ``WINDOW`` turns, and a store of those before them."""

    def __init__(self, model: Any, tokenizer: Any, earlier: list[str], **options: Any):
        from memkernels.integrations import transformers as mkt  # here, so that --help needs no extra

        self.model, self.tokenizer = model.requires_grad_(False), tokenizer
        self.window: list[str] = []
        self.said: dict[str, str] = {}  # name of a turn, in the order of time -> what was said
        named = {f"0/{number:05}": turn(text) for number, text in enumerate(earlier)}
        self.store = mkt.TokenStore.build(model, tokenizer, named, dtype=torch.float32, progress=False, **options)
        self.memory = mkt.Neighbours(self.store, k=8, cache=0)
        self.h = mkt.attach(model, self.memory)

    def hear(self, text: str) -> None:
        """The turn that leaves the window goes to the store, while the model serves."""
        self.window.append(text)
        if len(self.window) > WINDOW:
            name = f"1/{len(self.said):05}"
            self.said[name] = self.window.pop(0)
            self.store.add({name: turn(self.said[name])}, progress=False)

    def forget(self) -> None:
        """Begin a new dialogue."""
        self.store.remove(where=("document like ?", ["1/%"]))
        self.window, self.said = [], {}

    def recall(self, question: str) -> str:
        """The name of the latest of the turns that are recalled best."""
        found = self.store.recall(turn(question), most=8)
        return max(name for score, name in found if score >= (1 - ALIKE) * found[0][0])

    def answer(self, fact: Fact, way: str) -> str:
        """What the model generates in one of ``WAYS``."""
        question, seen = fact.question, list(self.window)
        if way == GIVEN and (name := f"1/{fact.turn:05}") in self.said:
            seen.append(self.said[name])
        if "recall" in way and (name := self.recall(question)) in self.said:
            seen.append(self.said[name])
        with contextlib.nullcontext() if "votes" in way else self.h.disabled():
            return generate(self.model, self.tokenizer, prompt(seen, question))


def turn(text: str) -> str:
    """A turn in the form of the chat, as the store reads it."""
    return f"<|im_start|>user\n{text}<|im_end|>\n"


def prompt(seen: list[str], question: str) -> str:
    notes = "".join(f"- {text}\n" for text in seen)
    return f"{turn(f'I told you:{chr(10)}{notes}{chr(10)}{question}')}<|im_start|>assistant\n"


def generate(model: Any, tokenizer: Any, text: str, tokens: int = 14) -> str:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, ids.shape[1] :].tolist())


def right(answer: str, fact: Fact) -> bool:
    """Does it name the value, and no other of its kind?"""
    return {value for value in fact.others if value in answer} == {fact.value}


def ask(chat: Chat, questions: list[tuple[str, Fact]], counts: dict[str, dict[str, list[bool]]], talk: list) -> None:
    for group, fact in questions:
        answers = {way: chat.answer(fact, way) for way in WAYS}
        for way, answer in answers.items():
            counts[group][way].append(right(answer, fact))
        if group != "in the window":
            name = chat.recall(fact.question)
            counts[group]["turn found"].append(name == f"1/{fact.turn:05}")
        talk.append((fact, answers))


def measure(chat: Chat, dialogues: int, facts: int, progress: Any) -> dict[str, dict[str, float]]:
    """Share of right answers by group of questions and way."""
    groups = ("in the window", "before the window", "before it, corrected", "old value of those")
    counts: dict[str, dict[str, list[bool]]] = {group: {way: [] for way in (*WAYS, "turn found")} for group in groups}
    talk: list[tuple[Fact, dict[str, str]]] = []
    for seed in range(dialogues):
        turns, known = dialogue(100 + seed, facts, facts // 3, NAMES[:12])
        at_once = {fact.turn: fact for fact in known if fact.turn % 3 == 0}
        chat.forget()
        for number, text in enumerate(progress(turns, desc=f"dialogue {seed + 1}", unit="turn")):
            chat.hear(text)
            if number - 1 in at_once:  # one turn later: the fact is still in the window
                ask(chat, [("in the window", at_once[number - 1])], counts, talk)
        later = [("before it, corrected" if fact.before else "before the window", fact) for fact in known]
        for question in progress(later, desc="questions", unit="question"):
            ask(chat, [question], counts, talk)
            fact, answers = talk[-1]
            if fact.before:
                for way, answer in answers.items():
                    counts["old value of those"][way].append(fact.before in answer)
                found = chat.recall(fact.question)
                counts["old value of those"]["turn found"].append(found == f"1/{fact.corrected:05}")
    report(counts, talk)
    return {
        group: {way: sum(row) / len(row) for way, row in ways.items() if row} for group, ways in counts.items() if ways
    }


def report(counts: dict[str, dict[str, list[bool]]], talk: list[tuple[Fact, dict[str, str]]]) -> None:
    columns = (*WAYS, "turn found")
    print(f"{'':22}{'questions':>10}" + "".join(f"{way:>18}" for way in columns))
    for group, ways in counts.items():
        cells = [f"{sum(ways[way]) / len(ways[way]):.0%}" if ways[way] else "" for way in columns]
        print(f"{group:22}{len(ways[WAYS[0]]):10}" + "".join(f"{cell:>18}" for cell in cells))
    fails = [(fact, answers) for fact, answers in talk if not right(answers["recall"], fact)]
    print(f"\nwith recall {len(fails)} of {len(talk)} answers are wrong:" if fails else "\nwith recall all are right")
    for fact, answers in fails[:8]:
        print(f"  {fact.question} {fact.value}; answered {answers['recall']!r}")


class Words:
    """One token per word, for ``--tiny``."""

    def __init__(self, samples: list[str]):
        words = sorted({word for text in samples for word in self.split(text)})
        self.words = ["<|pad|>", "<|im_end|>", *(word for word in words if word != "<|im_end|>")]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    @staticmethod
    def split(text: str) -> list[str]:
        for mark in ("<|im_start|>", "<|im_end|>", "\n", ".", "?", ":"):
            text = text.replace(mark, f" {mark} " if mark != "\n" else " \\n ")
        return text.split()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.numbers[word] for word in self.split(text)]}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.numbers)

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[number] for number in ids)


def tiny(steps: int = 400) -> tuple[Any, Words]:
    """A small model that learned to answer from the last note that it sees, whatever the name and the value."""
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = random.Random(0)

    def sample() -> str:
        kind = draw.choice(list(KINDS))
        question, values = KINDS[kind]
        name, value = draw.choice(NAMES), draw.choice(values)
        told = kind.format(name=name, value=value)  # always last, where a recalled turn stands
        seen = [draw.choice([*TALK, CORRECTION]), told]
        return prompt(seen, question.format(name=name)) + told + " <|im_end|>"

    everything = [turn(CORRECTION), *map(turn, TALK), prompt(TALK[:1], "")]
    for kind, (question, values) in KINDS.items():
        everything += [kind.format(name=name, value=value) for name in NAMES for value in values]
        everything += [question.format(name=NAMES[0])]
    tokenizer = Words(everything)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "rope_theta": 100.0,
    }
    config = LlamaConfig(vocab_size=len(tokenizer.words), **special, **size)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, steps, pct_start=0.1)
    for _ in range(steps):
        rows = [torch.tensor(tokenizer(sample())["input_ids"]) for _ in range(32)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = ids.masked_fill(ids == 0, -100)
        for row, labelled in zip(ids, labels):  # what is said cannot be known: only answers are learned
            labelled[: int((row == tokenizer.numbers["assistant"]).nonzero()[0]) + 1] = -100
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), tokenizer


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Share of right answers, by group of questions and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=2)
    parser.add_argument("--facts", type=int, default=24, help="of each dialogue; a third of them is corrected")
    parser.add_argument("--tiny", action="store_true", help="a small model, trained at once")
    options = parser.parse_args(argv)
    if options.tiny:
        model, tokenizer = tiny()
        shape = {"layer": 0, "dim": 64}
    else:
        if absent := texts.missing():
            parser.error(f"needs {', '.join(absent)}: pip install 'memkernels[evaluate]'")
        model, tokenizer = texts.language_model()
        shape = {"layer": 23, "dim": 256}
    earlier, known = dialogue(7, options.facts, options.facts // 3, NAMES[12:])
    chat = Chat(model, tokenizer, earlier, **shape)
    # Shares of the votes are learned from answers in the earlier dialogue, of other people.
    answered = [prompt([earlier[fact.turn]], fact.question) + earlier[fact.turn] for fact in known]
    chat.h.fit(answered, tokenizer, steps=100, progress=False)
    print(f"the model sees {WINDOW} turns; the store has {len(chat.store):,} records of an earlier dialogue already")
    return measure(chat, options.dialogues, options.facts, bar(not options.tiny))


def bar(show: bool) -> Any:
    """tqdm, or nothing."""
    if show:
        from tqdm import tqdm

        return tqdm
    return lambda items, **_: items


if __name__ == "__main__":
    main()
