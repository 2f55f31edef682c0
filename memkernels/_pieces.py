"""Byte pairs: a small tokenizer, trained in seconds, for examples that need one.

Source: Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

# A word with the space before it, a digit, a run of other marks, or white space: no piece crosses these.
WORD = re.compile(rb" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+")


class Pieces:
    """The 256 bytes, then pairs of pieces of ``text`` joined, the most frequent first, until there are ``size``."""

    def __init__(self, text: bytes, size: int):
        self.pieces = [bytes([byte]) for byte in range(256)]
        self.joins: dict[tuple[int, int], int] = {}
        counts = Counter(WORD.findall(text))
        words = [(list(word), count) for word, count in counts.items()]
        pairs: Counter[tuple[int, int]] = Counter()
        where = defaultdict(set)
        for number, (word, count) in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += count
                where[pair].add(number)
        queue = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(queue)
        while len(self.pieces) < size and queue:
            count, best = heapq.heappop(queue)
            if -count != pairs[best]:  # it has changed since: back into the queue, as it is now
                if pairs[best]:
                    heapq.heappush(queue, (-pairs[best], best))
                continue
            new = self.joins[best] = len(self.pieces)
            self.pieces.append(self.pieces[best[0]] + self.pieces[best[1]])
            fresh = set()
            for number in where.pop(best):
                word, times = words[number]
                for pair in zip(word, word[1:]):
                    pairs[pair] -= times
                word[:] = join(word, best, new)
                for pair in zip(word, word[1:]):
                    pairs[pair] += times
                    where[pair].add(number)
                    fresh.add(pair)
            for pair in fresh:
                heapq.heappush(queue, (-pairs[pair], pair))
        self.known: dict[bytes, list[int]] = {}

    def encode(self, text: bytes) -> list[int]:
        return [piece for word in WORD.findall(text) for piece in self._word(word)]

    def _word(self, word: bytes) -> list[int]:
        if word not in self.known:
            pieces = list(word)
            while len(pieces) > 1:
                known = [(self.joins[pair], pair) for pair in zip(pieces, pieces[1:]) if pair in self.joins]
                if not known:
                    break
                new, pair = min(known)
                pieces = join(pieces, pair, new)
            self.known[word] = pieces
        return self.known[word]

    def get_vocab(self) -> dict[bytes, int]:
        return {piece: number for number, piece in enumerate(self.pieces)}

    def decode(self, numbers: Iterable[int]) -> str:
        return b"".join(self.pieces[n] for n in numbers).decode(errors="replace")


def join(pieces: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """``pieces`` with ``new`` wherever ``pair`` stood."""
    out: list[int] = []
    i = 0
    while i < len(pieces):
        found = i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair
        out.append(new if found else pieces[i])
        i += 2 if found else 1
    return out
