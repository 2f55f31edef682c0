"""TokenMap: one id for all tokens that read alike.

    map[i] = map[j]   iff   fold(text_i) = fold(text_j)
    fold(text) = NFC(unaccented(NFKC(casefold(NFKC(text))))), runs of white space as one space, none at the ends

Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup (arXiv 2601.07372), section on tokenizer compression.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character decode to
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space; alone, it decodes to nothing


class TokenMap(nn.Module):
    """Maps token ids to fewer ids, dense from 0: what :func:`memkernels.ngram_slots` hashes.

    ``mapped = map[tokens]``. "Apple", " apple" and "APPLE" are tokens of their own to a model; to an n-gram they are
    one word, and share its rows of the tables. :meth:`from_tokenizer` makes the map from the texts of a vocabulary.

    Args:
        map: integers ``[vocabulary]``, none negative: the new id of each token. A copy is kept as the buffer ``map``,
            int64, part of ``state_dict``.

    Raises:
        ValueError, TypeError: ``map`` is no such tensor.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """

    map: Tensor

    def __init__(self, map: Tensor):
        super().__init__()
        if not isinstance(map, Tensor) or map.dtype not in (torch.int64, torch.int32):
            got = map.dtype if isinstance(map, Tensor) else type(map).__name__
            raise TypeError(f"TokenMap: map must be an int64 or int32 tensor, got {got}")
        if map.dim() != 1 or not len(map):
            raise ValueError(f"TokenMap: map must be [vocabulary] with at least one token, got {list(map.shape)}")
        if map.device.type != "meta" and map.min() < 0:
            raise ValueError(f"TokenMap: map must hold no negative id, got {int(map.min())}")
        self.register_buffer("map", map.detach().long().clone())

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenMap:
        """The map of a vocabulary: tokens whose texts are equal but for form, accent, case and white space are one.

        The text of a token is what ``convert_tokens_to_string([token])`` or else ``decode([id])`` gives, so that marks
        for a space (such as "Ġ" or "▁") and for bytes are resolved. It is folded by NFKC, without combining marks and
        case; white space at its ends goes, and within becomes one space. Tokens of white space alone are one. Apart
        stay: special and added tokens; tokens that decode to nothing or to replacement characters, such as single bytes
        of a longer character; ids that no token has. New ids are dense, in order of their first token.

        Args:
            tokenizer: has ``get_vocab()``, and ``convert_tokens_to_string`` or ``decode``, as those of ``transformers``
                and ``tokenizers`` have.

        Raises:
            TypeError: ``tokenizer`` lacks these methods. ValueError: its vocabulary is empty.

        Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
        """
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise TypeError(f"TokenMap: tokenizer must have get_vocab(), got {type(tokenizer).__name__}")
        vocabulary: Mapping[Any, int] = tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError("TokenMap: tokenizer must have at least one token, got an empty get_vocab()")
        text, special = _reader(tokenizer), _special(tokenizer)
        token_of = {number: token for token, number in vocabulary.items()}
        new: dict[Hashable, int] = {}
        ids = []
        for number in range(max(token_of) + 1):
            known = number in token_of and number not in special
            name = fold(text(token_of[number], number) or _spaces(token_of[number])) if known else ""
            apart = not name or _UNKNOWN in name
            ids.append(new.setdefault((number,) if apart else name, len(new)))
        return cls(torch.tensor(ids))

    @property
    def size(self) -> int:
        """How many new ids there are: one more than the largest."""
        return int(self.map.max()) + 1

    def forward(self, tokens: Tensor) -> Tensor:
        """The new id of each token.

        Args:
            tokens: int64 or int32 ``[...]``; negative ones are no tokens, and stay as they are.

        Returns:
            int64 ``[...]``.

        Raises:
            IndexError: a token is not in the map.
        """
        return torch.where(tokens < 0, tokens.long(), self.map[tokens.clamp(min=0)])

    def extra_repr(self) -> str:
        return f"{len(self.map)} -> {self.size}" if self.map.device.type != "meta" else f"{len(self.map)}"


def fold(text: str) -> str:
    """``text`` without what tells apart words that read alike; " " for white space, "" where nothing is left."""
    if text and text.isspace():
        return " "
    normal = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    parts = unicodedata.normalize("NFD", normal)
    plain = "".join(c for c in parts if unicodedata.category(c) != "Mn")
    return " ".join(unicodedata.normalize("NFC", plain).split())


def _reader(tokenizer: Any) -> Callable[[Any, int], str]:
    """A function of a token and its id that gives the text."""
    if callable(convert := getattr(tokenizer, "convert_tokens_to_string", None)):

        def read(token: Any, number: int) -> str:
            return token.decode(errors="replace") if isinstance(token, bytes) else convert([token])

    elif callable(decode := getattr(tokenizer, "decode", None)):

        def read(token: Any, number: int) -> str:
            return decode([number])

    else:
        raise TypeError(
            "TokenMap: tokenizer must have convert_tokens_to_string or decode, "
            f"got {type(tokenizer).__name__} with neither"
        )
    return read


def _spaces(token: Any) -> str:
    """A space if ``token`` is nothing but marks for spaces."""
    return " " if isinstance(token, str) and token and not token.strip(_SPACE) else ""


def _special(tokenizer: Any) -> set[int]:
    """Ids of special and of added tokens, as far as the tokenizer tells them."""
    found = set(getattr(tokenizer, "all_special_ids", ()))
    if callable(added := getattr(tokenizer, "get_added_vocab", None)):
        found |= set(added().values())
    if callable(added := getattr(tokenizer, "get_added_tokens_decoder", None)):
        found |= set(added())
    return found
