"""TokenMap: which tokens become one, which stay apart, and the ids that come out."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from memkernels.nn import TokenMap
from memkernels.nn.token_map import fold

WORDS = ["<s>", "▁Apple", "apple", "APPLE", "▁", "▁▁", "\t", "Äpfel", "apfel", "ﬁ", "Fi", "<0xE2>", "<0x82>", "<pad>"]


class Tokenizer:
    """What SentencePiece does: the mark becomes a space, one at the beginning goes; bytes alone are no characters."""

    all_special_ids = (0,)

    def __init__(self, words=WORDS, ids=None, added=("<pad>",)):
        self.added = added
        self.ids = dict(zip(words, range(len(words)) if ids is None else ids))

    def get_vocab(self):
        return self.ids

    def get_added_vocab(self):
        return {word: number for word, number in self.ids.items() if word in self.added}

    def convert_tokens_to_string(self, tokens):
        text = "".join("\N{REPLACEMENT CHARACTER}" if t.startswith("<0x") else t for t in tokens)
        return text.replace("▁", " ").removeprefix(" ")


class Bytes:
    """A vocabulary of bytes, decoded by id."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def get_vocab(self):
        return {piece: number for number, piece in enumerate(self.pieces)}

    def decode(self, numbers):
        return b"".join(self.pieces[n] for n in numbers).decode(errors="replace")


def test_tokens_that_read_alike_are_one():
    #            <s> ▁Apple apple APPLE ▁ ▁▁ \t Äpfel apfel ﬁ Fi E2 82 <pad>
    wanted = [0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7]
    found = TokenMap.from_tokenizer(Tokenizer())
    assert found.map.tolist() == wanted and found.map.dtype == torch.int64
    assert found.size == 8


def test_ids_follow_the_order_of_ids_and_gaps_stay_apart():
    found = TokenMap.from_tokenizer(Tokenizer(["b", "B", "a"], [5, 1, 3]))
    assert found.map.tolist() == [0, 1, 2, 3, 4, 1]  # nobody, B, nobody, a, nobody, b


def test_special_tokens_do_not_become_words():
    found = TokenMap.from_tokenizer(Tokenizer(["the", "The", "THE"]))
    assert found.map.tolist() == [0, 1, 1], "token 0 is special"
    found = TokenMap.from_tokenizer(Tokenizer(["<s>", "the", "The", "THE"], added=("The",)))
    assert found.map.tolist() == [0, 1, 2, 1], "The is added"


def test_decode_where_tokens_are_bytes():
    found = TokenMap.from_tokenizer(
        Bytes(b"a", b" A", b"\xe2", b"\xe2\x82\xac", b"\xe2\x82", "Ａ".encode(), b"", b"\n ")
    )
    assert found.map.tolist() == [0, 0, 1, 2, 3, 0, 4, 5]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Crème Brûlée\n", "creme brulee"),
        ("a \t\n b", "a b"),
        ("STRASSE", fold("straße")),
        ("①", "1"),
        ("\u3000", " "),
        ("\u0301", ""),  # an accent alone
        ("한국", "한국"),
        ("don't", "don't"),
        ("x²", "x2"),
    ],
)
def test_fold(text, wanted):
    assert fold(text) == wanted
    assert fold(fold(text)) == wanted


def test_forward_leaves_what_is_no_token():
    found = TokenMap(torch.tensor([3, 0, 3], dtype=torch.int32))
    assert found(torch.tensor([[2, -1], [1, 0]])).tolist() == [[3, -1], [0, 3]]
    assert found(torch.tensor([1, -5], dtype=torch.int32)).dtype == torch.int64
    with pytest.raises(IndexError):
        found(torch.tensor([3]))
    assert found.size == 4 and "3 -> 4" in repr(found)


def test_state_dict():
    found, other = TokenMap.from_tokenizer(Tokenizer()), TokenMap(torch.zeros(len(WORDS)).long())
    other.load_state_dict(found.state_dict())
    assert torch.equal(other.map, found.map)
    given = torch.tensor([0, 1])
    kept = TokenMap(given)
    given += 1
    assert kept.map.tolist() == [0, 1], "a copy is kept"


EMPTY = "map must be [vocabulary] with at least one token, got "
NAMES = type("Names", (), {"get_vocab": lambda self: {"a": 0}})()


@pytest.mark.parametrize(
    ("make", "given", "sentence"),
    [
        (TokenMap, [0, 1], "map must be an int64 or int32 tensor, got list"),
        (TokenMap, torch.zeros(3), "map must be an int64 or int32 tensor, got torch.float32"),
        (TokenMap, torch.zeros(2, 2).long(), EMPTY + "[2, 2]"),
        (TokenMap, torch.zeros(0).long(), EMPTY + "[0]"),
        (TokenMap, torch.tensor([0, -2]), "map must hold no negative id, got -2"),
        (TokenMap.from_tokenizer, "words", "tokenizer must have get_vocab(), got str"),
        (TokenMap.from_tokenizer, Bytes(), "tokenizer must have at least one token, got an empty get_vocab()"),
        (
            TokenMap.from_tokenizer,
            NAMES,
            "tokenizer must have convert_tokens_to_string or decode, got Names with neither",
        ),
    ],
)
def test_bad_input(make, given, sentence):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(given)
    assert str(caught.value) == f"TokenMap: {sentence}"


def byte_level():
    """A byte-level tokenizer of the tokenizers package, with a special and an added token."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"the": 0, "Ġthe": 1, "ĠThe": 2, "Ġ": 3, "Ċ": 4, "Ã": 5, "Ã©": 6, "e": 7}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.add_tokens(["The"])
    return made


WANTED = [0, 0, 0, 1, 1, 2, 3, 3, 4, 5]


def test_a_tokenizer_of_tokenizers():
    assert TokenMap.from_tokenizer(byte_level()).map.tolist() == WANTED


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_a_tokenizer_of_transformers():
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    assert TokenMap.from_tokenizer(fast).map.tolist() == WANTED
