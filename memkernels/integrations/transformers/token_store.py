"""TokenStore: what followed each token of a collection of documents, found again by the hidden state before it.

    key_t = (y_t - m) C,   value_t = x_(t+1)

``y_t`` is the input of the feed-forward network of one block at token t, ``m`` and ``C`` the mean and the principal
components of such inputs.

Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models (the input of the
feed-forward network as key); He et al. 2021, Efficient Nearest Neighbor Language Models (principal components).
"""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...store import _where
from . import encoding
from .place import Place, differs, fingerprint
from .recall import recall
from .records import DiskRecords, Records, around, nearest

FORMAT = 1
_SAMPLE = 2**18  # tokens from which the principal components are found
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class Source(NamedTuple):
    """Where a record stands: the name of its document ("": the text at hand), the position of its key there, the text
    that ends with the token that it votes for, that token alone, and the text that follows it."""

    document: str
    position: int
    text: str
    token: str = ""
    after: str = ""


class TokenStore:
    """Keys ``[N, dim]`` and the token after each, for one model and its tokenizer. Made by :meth:`build`.

    A record's slot number is its own for as long as the store is in use; :meth:`save` numbers them anew where records
    were removed. :meth:`add` and :meth:`remove` take effect at the next search: a model beside the store may go on
    serving.

    Attributes:
        layer: of the block whose feed-forward input is the key; not negative. window: tokens that the model reads at
            once. mean, components: ``m [width]`` and ``C [width, dim]``, float32. documents: one dictionary each,
            with its name under ``document``; None where it was removed. records: keys, tokens, places.
        model, tokenizer: as they were given; None after a :meth:`load` without them.
    """

    def __init__(self, described: dict[str, Any], mean: Tensor, components: Tensor, records: Records | DiskRecords):
        self.described, self.mean, self.components, self.records = described, mean, components, records
        self.documents: list[dict[str, Any] | None] = list(described["documents"])
        self.model: Any = None
        self.tokenizer: Any = None

    @property
    def layer(self) -> int:
        return self.described["layer"]

    @property
    def window(self) -> int:
        return self.described["window"]

    @property
    def dim(self) -> int:
        return self.components.shape[1]

    @property
    def width(self) -> int:
        """Of the model's hidden states."""
        return self.components.shape[0]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def bytes_per_slot(self) -> int:
        """Key, length of the key, token, document and position."""
        return self.records.bytes_per_slot

    def __repr__(self) -> str:
        there = sum(document is not None for document in self.documents)
        return f"TokenStore({len(self)} records of {there} documents, dim={self.dim}, layer={self.layer})"

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Any,
        *,
        layer: int = -4,
        dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        path: str | os.PathLike[str] | None = None,
        window: int = 1024,
        progress: bool = True,
    ) -> TokenStore:
        """Read documents and keep what followed each token.

        Args:
            model: a causal language model of transformers. tokenizer: its tokenizer.
            texts: documents: str, pairs (name, text), or a mapping name -> text.
            layer: number of the block; negative ones count from the end. dim: of the keys; at most the model's width.
            dtype: of the keys: float32, bfloat16 or float16.
            path: a directory that is not there yet: the records lie in a MemoryStore there. None: in memory.
            window: tokens that the model reads at once. progress: show a bar.

        Raises:
            TypeError: the model is no decoder, texts are none, or the dtype does not fit. ValueError: no document has
                two tokens, or layer, dim or window does not fit. FileExistsError: there is something at ``path``.

        Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models.
        """
        place = Place.of(model)
        layer = place.layer("TokenStore", layer)
        place.feed_forward(layer)
        if not isinstance(dim, int) or not 1 <= dim <= place.width:
            raise ValueError(f"TokenStore: dim must lie in 1..{place.width}, got {dim}")
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"TokenStore: window must be at least 1, got {window}")
        if dtype not in _DTYPES.values():
            raise TypeError(f"TokenStore: dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
        if path is not None and os.path.exists(path):
            raise FileExistsError(f"TokenStore: path must not be there yet, got {os.fspath(path)!r}")
        documents = _tokens(tokenizer, texts)
        if not documents:
            raise ValueError("TokenStore: texts must hold a document of at least 2 tokens, got none")

        kept, read, todo = [], 0, iter(encoding.bar(documents, progress, "store", "document"))
        for name, ids in todo:
            kept.append((name, ids, encoding.feed_forward_inputs(place, layer, ids[:-1], window)))
            read += len(ids) - 1
            if read >= _SAMPLE:
                break
        mean, components = encoding.components(torch.cat([rows for _, _, rows in kept]), dim)
        described = {
            "format": FORMAT,
            "layer": layer,
            "window": window,
            "dtype": str(dtype)[6:],
            "dim": dim,
            "base": fingerprint(place.model),
            "vocabulary": encoding.vocabulary(tokenizer),
            "documents": [],
        }
        if path is None:
            store = cls(described, mean, components, Records(dim, dtype, mean.device))
        else:
            records = DiskRecords(Path(path) / "records", dim, dtype, create=True)
            store = cls(described, mean, components, records)
        store.model, store.tokenizer = model, tokenizer
        for name, ids, rows in kept:
            store._append(name, ids, rows)
        for name, ids in todo:
            store._append(name, ids, encoding.feed_forward_inputs(place, layer, ids[:-1], window))
        if path is not None:
            store.save(path)
        return store

    def add(self, texts: Any, *, progress: bool = True) -> int:
        """Read more documents; how many records they gave. A name may be there already: both are kept.

        Raises:
            TypeError: texts are none, or the store was loaded without its model and tokenizer.
        """
        if self.model is None or self.tokenizer is None:
            raise TypeError("TokenStore: model and tokenizer must be given to load before add, got None")
        place, count = Place.of(self.model), len(self)
        for name, ids in encoding.bar(_tokens(self.tokenizer, texts), progress, "store", "document"):
            self._append(name, ids, encoding.feed_forward_inputs(place, self.layer, ids[:-1], self.window))
        self._persist()
        return len(self) - count

    def _append(self, name: str, ids: Tensor, inputs: Tensor) -> None:
        count = len(ids) - 1
        columns = torch.stack([ids[1:], torch.full((count,), len(self.documents)), torch.arange(count)], -1)
        self.records.append(self.project(inputs), columns)
        self.documents.append({"document": name})

    def remove(self, *, where: Any) -> int:
        """Remove the documents that satisfy a condition; how many records they had.

        Args:
            where: ``(condition, values)``, SQL over the field ``document``, as in
                :meth:`memkernels.store.MemoryStore.delete`: ``("document like ?", ["faq/%"])``.

        Raises:
            ValueError, TypeError: the condition does not fit.
        """
        sql, values, _ = _where.parse("TokenStore.remove", where)
        there = [(i, json.dumps(document)) for i, document in enumerate(self.documents) if document is not None]
        with sqlite3.connect(":memory:") as base:
            base.execute("CREATE TABLE meta (number INTEGER, doc TEXT)")
            base.executemany("INSERT INTO meta VALUES (?, ?)", there)
            try:
                chosen = [row[0] for row in base.execute(f"SELECT number FROM meta WHERE {sql}", values)]
            except sqlite3.Error as error:
                raise ValueError(f"TokenStore.remove: where must be a condition of SQL, got {where[0]!r}") from error
        count = self.records.remove(chosen)
        for number in chosen:
            self.documents[number] = None
        self._persist()
        return count

    def project(self, inputs: Tensor) -> Tensor:
        """Keys or queries ``[..., dim]``, float32, of inputs ``[..., width]`` of the feed-forward network."""
        if self.components.device != inputs.device:
            self.mean, self.components = self.mean.to(inputs.device), self.components.to(inputs.device)
        return (inputs.float() - self.mean) @ self.components

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k nearest records of queries, exactly.

        Args:
            query: float32 ``[..., dim]``, from :meth:`project`. k: at least 1.

        Returns:
            ``(distances, tokens, slots)``, each ``[..., k]``, nearest first: the squared distance of the stored key,
            float32, +inf where fewer than k are there; int64, -1 there.
        """
        distances, slots, tokens = nearest(self.records, query.reshape(-1, self.dim), k)
        lead = (*query.shape[:-1], k)
        return distances.view(lead), tokens.view(lead), slots.view(lead)

    def recall(self, text: str, *, most: int = 3, k: int = 128) -> list[tuple[float, str]]:
        """The documents that are nearest to a text, such as a question: scores and names, best first.

        ``S(d) = 1/T sum_t (1 - min_{i in d} |q_t - k_i|^2 / f_t)`` over the k records nearest to each token,
        the farthest of which is at the distance ``f_t``: from 0, no record of d was found, to 1, each token has one at
        the distance 0. Of documents with the same score the later comes first. The text is read as :meth:`add` would
        read it: let it have the form of the documents.

        Args:
            text: of at least one token. most: documents. k: records of each token.

        Raises:
            TypeError: the store was loaded without its model and tokenizer. ValueError: the text has no token, or most
                or k is below 1.

        Source: Khattab and Zaharia 2020, ColBERT (the best match of each token, summed over the tokens).
        """
        if self.model is None or self.tokenizer is None:
            raise TypeError("TokenStore: model and tokenizer must be given to load before recall, got None")
        for name, number in (("most", most), ("k", k)):
            if number < 1:
                raise ValueError(f"TokenStore.recall: {name} must be at least 1, got {number}")
        ids = torch.as_tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) == 0:
            raise ValueError("TokenStore.recall: text must have a token, got none")
        inputs = encoding.feed_forward_inputs(Place.of(self.model), self.layer, ids, self.window)
        scores, documents = recall(self, self.project(inputs), k)
        named = [(self.documents[number] or {}).get("document", "") for number in documents[:most].tolist()]
        return list(zip(scores[:most].tolist(), named))

    def sources(self, slots: Tensor, *, tokens: int = 12) -> list[Source | None]:
        """Where records stand, for ``slots [M]``; None for -1 and for what was removed. tokens: of the text before
        each and after.

        Raises:
            TypeError: the store was loaded without its tokenizer.
        """
        if self.tokenizer is None:
            raise TypeError("TokenStore: tokenizer must be given to load before sources, got None")
        slots = slots.reshape(-1).cpu()
        found: list[Source | None] = []
        for slot, there in zip(slots.tolist(), self.records.alive(slots).tolist()):
            if not there:
                found.append(None)
                continue
            _, document, position = self.records.columns_at(torch.tensor([slot]))[0].tolist()
            described = self.documents[document] or {}
            text, after = (x.tolist() for x in around(self.records, slot, tokens - 1, tokens))
            parts = (self.tokenizer.decode(x) for x in (text, text[-1:], after))
            found.append(Source(described["document"], position, *parts))
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the store to a folder, which is made if it is not there. What lies on disk stays where it is: the
        folder then holds its path."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean.cpu(), "components": self.components.cpu()}
        described = {**self.described, "documents": self.documents}
        if isinstance(self.records, Records):
            keys, columns = self.records.live()
            numbers = [i for i, document in enumerate(self.documents) if document is not None]
            renumber = torch.full((max(len(self.documents), 1),), -1, dtype=torch.int32)
            renumber[numbers] = torch.arange(len(numbers), dtype=torch.int32)
            columns = columns.cpu().clone()
            columns[:, 1] = renumber[columns[:, 1].long()]
            tensors.update(keys=keys.cpu(), columns=columns)
            described["documents"] = [self.documents[i] for i in numbers]
        else:
            described["records"] = self.records.path
            self._folder = path
        save_file({name: x.contiguous() for name, x in tensors.items()}, path / ".store.safetensors.new")
        os.replace(path / ".store.safetensors.new", path / "store.safetensors")
        (path / ".store.json.new").write_text(json.dumps(described))
        os.replace(path / ".store.json.new", path / "store.json")

    def _persist(self) -> None:
        """What is on disk has its list of documents beside it."""
        if isinstance(self.records, DiskRecords):
            self.save(self._folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any = None, tokenizer: Any = None) -> TokenStore:
        """The store that :meth:`save` wrote.

        Args:
            folder: what was given to :meth:`save`, or the ``path`` of :meth:`build`.
            model, tokenizer: for :meth:`add` and :meth:`sources`; checked if they are given.

        Raises:
            FileNotFoundError: there is no store. ValueError: it is of a newer memkernels, or was built with another
                model or tokenizer.
        """
        from safetensors.torch import load_file

        path = Path(folder)
        if not (path / "store.json").exists():
            raise FileNotFoundError(f"TokenStore: folder must hold store.json, got {str(path)!r}")
        described = json.loads((path / "store.json").read_text())
        if described["format"] > FORMAT:
            raise ValueError(f"TokenStore: folder must be of format {FORMAT} at most, got {described['format']}")
        tensors = load_file(path / "store.safetensors")
        dtype = _DTYPES[described["dtype"]]
        records: Records | DiskRecords
        if model is not None:
            check_model(described["base"], model)
        if tokenizer is not None:
            check_tokenizer(described["vocabulary"], tokenizer)
        if "records" in described:
            records = DiskRecords(described["records"], described["dim"], dtype, create=False)
        else:
            records = Records(described["dim"], dtype)
            records.append(tensors["keys"], tensors["columns"])
        store = cls(described, tensors["mean"], tensors["components"], records)
        store.model, store.tokenizer, store._folder = model, tokenizer, path
        return store


def check_model(base: dict[str, Any], model: Any) -> None:
    """ValueError unless ``model`` is the one of a fingerprint."""
    if (why := differs(base, Place.of(model).model)) is not None:
        raise ValueError(f"TokenStore: model must be {why}")


def check_tokenizer(known: str, tokenizer: Any) -> None:
    """ValueError unless ``tokenizer`` has the vocabulary with which a store was built."""
    found = encoding.vocabulary(tokenizer)
    if found != known:
        raise ValueError(
            f"TokenStore: tokenizer must have the vocabulary {known[:8]} that the store was built with, "
            f"got {found[:8]} of {len(tokenizer.get_vocab())} tokens"
        )


def _tokens(tokenizer: Any, texts: Any) -> list[tuple[str, Tensor]]:
    """Names and ids ``[T]`` of the documents that have at least two tokens."""
    documents = []
    for name, text in encoding.named(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        documents.append((name, torch.as_tensor(ids, dtype=torch.int64)))
    return [(name, ids) for name, ids in documents if len(ids) > 1]
