"""A case of the grid, read from one line: sizes, then words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memkernels.registration import OPS
from memkernels.spec import Op, letters

from ..case import size_text

# What a word of a line means. Some take a value: ``shared=values``, ``bias=-4``, ``erase=0``.
WORDS = {
    "step": "forward, then the gradients of every float argument",
    "both": "a case forward and a case step, of which the latter is compiled, if any",
    "bfloat16": "in that dtype; float32 otherwise",
    "compile": "torch.compile of the plain form is a peer, too",
    "cached": "one memory for all calls, which stays in a cache that can hold it",
    "shared": "the memory (or the arguments named) lacks the leading dimensions",
    "by-head": "the memory lacks the first leading dimension: one for all streams",
    "mask": "a bool slot_mask, one slot in ten empty",
    "bias": "a float slot_mask, normal; around the value",
    "causal": "a slot_range: slots up to the token's own, the last T being the tokens; a value: the window",
    "tokens": "a token_mask, one token in ten silent",
    "initial": "a state that the scan starts from",
    "erase": "an erase vector per token; a value: that number",
    "sigmoid": "gate='sigmoid'",
    "in-place": "the form that writes into its memory, as a decoder calls it",
    "float8": "a table of float8_e4m3fn with a scale per row",
}
SILENT = ("step", "both", "bfloat16", "compile")  # words that a title does not repeat
QUICK = {"B": 2, "H": 2, "T": 16, "N": 256, "W": 512, "D": 64, "n": 32, "F": 4, "S": 64}  # at most


@dataclass(frozen=True)
class Row:
    """
    words: word -> its value, "" where it has none.
    """

    op: str
    sizes: dict[str, int]
    words: dict[str, str]

    @property
    def direction(self) -> str:
        return "step" if "step" in self.words else "forward"

    @property
    def step(self) -> bool:
        return "step" in self.words

    @property
    def in_place(self) -> bool:
        return "in-place" in self.words

    @property
    def dtype(self) -> str:
        return "int64" if self.op == "ngram_slots" else "bfloat16" if "bfloat16" in self.words else "float32"

    @property
    def title(self) -> str:
        shown = [f"{word}={value}" if value else word for word, value in self.words.items() if word not in SILENT]
        return " ".join([size_text(self.sizes), *shown])

    @property
    def key(self) -> str:
        """What tells this case from every other, in this run and in others."""
        return f"{self.op} {self.direction} {self.dtype} {self.title}"

    @property
    def declared(self) -> Op:
        return OPS[self.op]

    def quick(self) -> Row:
        """The same at sizes of a test."""
        return replace(self, sizes={axis: min(size, QUICK.get(axis, size)) for axis, size in self.sizes.items()})

    def leads(self) -> tuple[int, ...]:
        """Leading dimensions: the sizes that the op does not declare, streams, then heads, then tokens."""
        op = self.declared
        own = set().union(*(letters(x.axes) for x in (*op.args, *op.outputs)))
        return tuple(self.sizes[axis] for axis in "BHT" if axis in self.sizes and axis not in own)

    def lead(self, arg) -> tuple[int, ...]:
        """The leading dimensions that one argument has."""
        names = self.words.get("shared", "").split(",")
        if arg.flat or (arg.side == "memory" and "shared" in self.words and (names == [""] or arg.name in names)):
            return ()
        return self.leads()[1:] if arg.side == "memory" and "by-head" in self.words else self.leads()

    def axes(self) -> dict[str, int]:
        """Sizes by letter, and those that follow: half keys, a scale per row."""
        return {"h": self.sizes.get("K", 0) // 2, "C": 1, **self.sizes}

    def option(self, name: str) -> bool:
        """Does the op take an option of that name?"""
        return any(name == param for param, _ in self.declared.params)


def _number(text: str) -> int:
    base, _, power = text.partition("^")
    return int(base) ** int(power or 1)


def parse(op: str, line: str) -> Iterator[Row]:
    """The row of a line, or both. ``KV=64`` is ``K=64 V=64``. ValueError for an unknown op or word."""
    if op not in OPS:
        raise ValueError(f"everyday: unknown op {op!r} in {line!r}")
    sizes: dict[str, int] = {}
    words: dict[str, str] = {}
    for part in line.split():
        name, equals, value = part.partition("=")
        if name in WORDS:
            words[name] = value
        elif equals and name.isalpha() and (len(name) == 1 or name == "KV"):
            sizes |= dict.fromkeys(name, _number(value))
        else:
            raise ValueError(f"everyday: unknown word {part!r} in {op}: {line!r}")
    if "both" in words:
        del words["both"]
        yield Row(op, sizes, {word: value for word, value in words.items() if word != "compile"})
        words = {"step": "", **words}
    yield Row(op, sizes, words)
