"""The text of the examples and its tokens: documents without repetition, byte pairs by hand."""

from __future__ import annotations

from collections import Counter

from memkernels import _text
from memkernels._pieces import WORD, Pieces

TEXT = _text.documentation()[:60_000]


def plainly(text: bytes, size: int) -> list[bytes]:
    """The pieces of a text, every pair counted anew for every join."""
    pieces = [bytes([byte]) for byte in range(256)]
    words = [list(word) for word in WORD.findall(text)]
    while len(pieces) < size:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces.append(pieces[best[0]] + pieces[best[1]])
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(pieces) - 1]
                i += 1
    return pieces


def test_pieces_are_the_most_frequent_pairs():
    assert Pieces(TEXT[:6000], 300).pieces == plainly(TEXT[:6000], 300)
    assert Pieces(b"aaaa aaaa", 258).pieces[256:] == [b"aa", b"aaaa"]


def test_a_text_with_few_pairs_has_few_pieces():
    assert Pieces(b"ab ab ab", 300).pieces[256:] == [b"ab", b" ab"]
    assert len(Pieces(b"", 300).pieces) == 256


def test_what_is_encoded_decodes():
    pieces = Pieces(TEXT, 600)
    numbers = pieces.encode(TEXT)
    assert b"".join(pieces.pieces[n] for n in numbers) == TEXT and len(numbers) < len(TEXT) / 2
    strange = "naïve 東京\t\n  12 ~~~".encode() + bytes(range(256))
    assert b"".join(pieces.pieces[n] for n in pieces.encode(strange)) == strange
    assert pieces.decode(pieces.encode("naïve".encode())) == "naïve"
    assert pieces.get_vocab()[b" the"] == pieces.pieces.index(b" the")


def test_docstrings_of_a_folder(tmp_path):
    package = tmp_path / "package"
    for name, text in {
        "a.py": '"""One.\n\nTwo."""\ndef f():\n    """Three."""\nx = "Four."\n',
        "sub/b.py": 'class C:\n    """Two.\n\n    Five."""\n',
        "c.py": "no python {",
        "tests/d.py": '"""Six."""',
        "empty.py": "",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    found = _text.docstrings(package)
    assert {name: text for name, text in found.items() if name.startswith("package")} == {
        "package/a.py": b"One.\n\nTwo.\n\nThree.\n\n",
        "package/sub/b.py": b"Five.\n\n",
    }
    topics = b"\n\n".join(_text.docstrings().values())
    assert paragraphs(topics) == paragraphs(_text.documentation())


def paragraphs(text: bytes) -> list[bytes]:
    return sorted(filter(None, (paragraph.strip() for paragraph in text.split(b"\n\n"))))
