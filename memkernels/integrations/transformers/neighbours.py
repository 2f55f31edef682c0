"""Neighbours: a frozen model reads what followed similar tokens, in a store of documents and in the text so far.

    p(w) = m_0 softmax(logits)[w] + m_1 p_store(w) + m_2 p_cache(w)
    p_s(w) = sum_{j: token_sj = w} softmax_j(-d_sj / T_s)

over the k records of the store, and the k of the last ``cache`` tokens, whose keys lie nearest to that of the token.

Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models; Grave et al.
2017, Improving Neural Language Models with a Continuous Cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops import cache_nll, causal_range, topk_search
from .encoding import bar, named
from .fitting import alone
from .memory import Memory, Mixture, Read, Step, Vote, Votes, no_entries
from .mixing import Found, Mixing, Past, Recorded, learn
from .place import Place, token_ids
from .token_store import Source, TokenStore, check_model, check_tokenizer
from .windows import windows

if TYPE_CHECKING:
    from .attachment import Attachment

_RATED = 256  # tokens over which it is counted how often the nearest entry was right
_SLACK = 256  # tokens that a crop may take back once the cache is full


class CacheState(NamedTuple):
    """The last tokens of a text: ``keys [B, M, dim]``, ``tokens [B, M]``, ``real [B, M]`` (False: padding), the token
    of the nearest entry of each source ``nearest [B, M, 2]``, and ``first [B]``, the position of the oldest."""

    keys: Tensor
    tokens: Tensor
    real: Tensor
    nearest: Tensor
    first: Tensor


class Neighbours(Memory):
    """Mixes the distributions of a store's nearest records and of a cache into that of the model.

    ``p(w) = m_0 softmax(logits)[w] + m_1 p_store(w) + m_2 p_cache(w)`` with
    ``p_s(w) = sum_{j: token_sj = w} softmax_j(-d_sj / T_s)`` and ``d`` the squared distance of keys. The shares m are
    the constants of ``shares`` until :meth:`Attachment.fit` learns them, and the temperatures T, from texts that are
    neither in the store nor what is measured. The model's weights stay as they are.

    What a text leaves in the cache rides in the model's cache of keys and values. The store may change while the model
    serves.

    Args:
        store: a :class:`TokenStore` of this model. k: neighbours of a token, of each source.
        cache: tokens of the text so far that are searched; 0: none.
        shares: m_1 and m_2 to begin with. temperature: T to begin with.

    Raises:
        TypeError: the store is none. ValueError: k, cache, shares or temperature do not fit; by ``attach``: the store
            is empty, smaller than k, or was built with another model.

    Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models.
    """

    mixes = True
    packed = False

    def __init__(
        self,
        store: TokenStore | Mapping[str, Any],
        k: int = 64,
        cache: int = 2048,
        *,
        shares: tuple[float, float] = (0.2, 0.05),
        temperature: float = 1.0,
    ):
        if not isinstance(store, (TokenStore, Mapping)):
            raise TypeError(f"Neighbours: store must be a TokenStore, got {type(store).__name__}")
        for name, value, least in (("k", k, 1), ("cache", cache, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Neighbours: {name} must be an integer of at least {least}, got {value!r}")
        if not (len(shares) == 2 and min(shares) >= 0 and sum(shares) < 1):
            raise ValueError(f"Neighbours: shares must be two numbers of at least 0 and below 1 in all, got {shares}")
        if not temperature > 0:
            raise ValueError(f"Neighbours: temperature must be above 0, got {temperature}")
        options = {"store": {"saved": True}, "k": k, "cache": cache}
        super().__init__((), {**options, "shares": list(shares), "temperature": temperature})
        self.store: Any = store  # a mapping stands for what load_parts brings
        self.k, self.cache_size = k, cache
        self.mixing = Mixing(shares, temperature)
        self.tokenizer = getattr(store, "tokenizer", None)
        self._mixture: tuple[Step, Mixture] | None = None
        self._recorded: list[Recorded] | None = None
        self._targets: Tensor | None = None

    def build_once(self, place: Place) -> None:
        if isinstance(self.store, TokenStore):  # at every attachment: the store may have changed, and the model
            self._check(place)
        super().build_once(place)

    def _check(self, place: Place) -> None:
        store = self.store
        if store.width != place.width:
            raise ValueError(f"Neighbours: store must have keys of width {place.width}, got {store.width}")
        check_model(store.described["base"], place.model)
        if len(store) == 0:
            raise ValueError("Neighbours: store must hold records, got none")
        if len(store) < self.k:
            raise ValueError(f"Neighbours: k must be at most the {len(store)} records of the store, got {self.k}")

    def build(self, place: Place) -> None:
        self.mixing.to(next(place.model.parameters()).device)

    def inputs(self, place: Place) -> dict[str, nn.Module]:
        return {"key": place.feed_forward(self.store.layer)}

    # --- a forward pass ---

    def finish(self, step: Step) -> None:
        """Search for every token, keep its key and what was nearest, and mix for those that get logits."""
        if step.input_ids is None:
            raise ValueError("Neighbours: the model must be given input_ids, got embeddings")
        keys = self.store.project(step.input_of(self, "key").detach())  # [B, T, dim]
        distances, tokens, slots = self.store.search(keys, self.k)
        old, real = step.state(self), step.token_mask
        real = torch.ones_like(step.input_ids, dtype=torch.bool) if real is None else real
        text = CacheState(keys, step.input_ids, real, keys.new_empty(0), keys.new_empty(0))
        if old is not None:
            text = CacheState(*(torch.cat(x, 1) for x in zip(old[:3], text[:3])), *old[3:])
        cache, entries, at = self._cached(text, keys)
        nearest = torch.stack([tokens[..., 0], cache.tokens[..., 0]], -1)
        first = nearest.new_zeros(len(nearest))
        if old is not None:
            nearest, first = torch.cat([old.nearest, nearest], 1), old.first
        text = text._replace(nearest=nearest, first=first)
        past = Past(entries, _rates(text, keys.shape[1]))
        drop = max(0, nearest.shape[1] - max(self.cache_size, _RATED) - 1 - _SLACK)
        kept = text.keys[:, drop:], text.tokens[:, drop:], text.real[:, drop:], nearest[:, drop:]
        step.keep(self, "", CacheState(*kept, first + drop))

        found = [Found(distances, tokens), cache]
        if self._recorded is not None:
            assert self._targets is not None
            store, cached = (Found(*(x.flatten(0, 1) for x in source)) for source in found)
            flat = Past(*(x.flatten(0, 1) for x in past))
            self._recorded.append(Recorded(store, cached, flat, self._targets.flatten(), keys.new_empty(0)))
            return
        whole = Mixture(*self.mixing.mixture(found, past))
        self._mixture = (step, Mixture(*(step.with_logits(x) for x in whole)))
        with torch.no_grad():  # of every token, whether it gets logits or not: token t of a text is row t of its reads
            weights = torch.softmax(whole.scores.masked_fill(whole.tokens < 0, -1e30), -1) * whole.mix[..., None]
            of_store, of_cache = weights.split([self.k, weights.shape[-1] - self.k], -1)
            step.record(self, "store", slots, of_store)
            step.record(self, "cache", at + first[:, None, None] * (at >= 0), of_cache)

    def _cached(self, text: CacheState, query: Tensor) -> tuple[Found, Tensor, Tensor]:
        """What the cache holds for the last T tokens of a text: entries, how many ``[B, T]``, which ``[B, T, k]``."""
        (B, N), T = text.tokens.shape, query.shape[1]
        k = min(self.k, self.cache_size) or 1
        if self.cache_size == 0 or N == 1:
            none = torch.full((B, T, k), -1, dtype=torch.int64, device=query.device)
            return Found(torch.full_like(none, torch.inf, dtype=query.dtype), none), none[..., 0] + 1, none
        # Entry i is the key of token i, and token i + 1: the last token has none.
        entry, held = text.real[:, :-1] & text.real[:, 1:], text.keys[:, :-1]
        span = causal_range(T, N - 1, window=self.cache_size, offset=N - T - 1).to(query.device)
        mask = (-held.square().sum(-1)).masked_fill(~entry, -torch.inf)
        scores, at = topk_search(query, held, k, scale=2.0, slot_mask=mask, slot_range=span.expand(B, -1, -1))
        distances = (query.square().sum(-1, keepdim=True) - scores).clamp(min=0).masked_fill(at < 0, torch.inf)
        following = text.tokens[:, None, 1:].expand(-1, T, -1)
        tokens = following.gather(-1, at.clamp(min=0)).masked_fill(at < 0, -1)
        return Found(distances, tokens), _between(entry, span), at

    def mixture(self, step: Step, logits: Tensor) -> Mixture | None:
        if self._recorded is not None:
            last = self._recorded[-1]
            own = -cache_nll(logits.flatten(0, 1), last.targets, *no_entries(logits.flatten(0, 1)))
            self._recorded[-1] = last._replace(own=own)
            return None
        found, self._mixture = self._mixture, None
        return None if found is None or found[0] is not step else found[1]

    def crop(self, state: Any, tokens: int) -> Any:
        M = state.keys.shape[1]
        if bool((state.first > 0).any()) and tokens > _SLACK:
            raise NotImplementedError(f"Neighbours: crop must remove at most {_SLACK} tokens, got {tokens}")
        keep = max(M - tokens, 0)
        keys, kept, real, nearest = (x[:, :keep] for x in state[:4])
        return CacheState(keys, kept, real, nearest, state.first)

    # --- learning, and what was read ---

    def fit(
        self,
        attachment: Attachment,
        data: Any,
        tokenizer: Any = None,
        *,
        steps: int = 200,
        lr: float = 1e-2,
        batch: int = 1024,
        window: int = 1024,
        progress: bool = True,
        seed: int = 0,
    ) -> list[float]:
        """Learn the shares and the temperatures: what :meth:`Attachment.fit` does where Neighbours is attached alone.

        The model reads the texts once; steps go over what was found. Texts must not be in the store.

        Args:
            data: texts: str, (name, text) or a mapping, or token ids. tokenizer: default: that of the store.
            steps, lr, batch, seed: of AdamW. window: tokens that the model reads at once, as it will be used.

        Returns:
            The loss of each step.

        Raises:
            TypeError: texts without a tokenizer. ValueError: another tokenizer, or no text of at least 2 tokens.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is not None:
            check_tokenizer(self.store.described["vocabulary"], tokenizer)
        texts = _ids(attachment.place, data, tokenizer)
        with alone(attachment), torch.enable_grad():
            recorded = self._record(attachment, texts, window, progress)
            return learn(self.mixing, recorded, steps=steps, lr=lr, batch=batch, seed=seed)

    @torch.no_grad()
    def _record(self, attachment: Attachment, texts: list[Tensor], window: int, progress: bool) -> Recorded:
        device = next(attachment.model.parameters()).device
        self._recorded = []
        try:
            for ids in bar(texts, progress, "fit", "document"):
                run = windows(attachment.model, ids, window, carries=True)
                for targets in ids[1:].split(window):
                    self._targets = targets[None].to(device)
                    next(run)
            parts = self._recorded
        finally:
            self._recorded, self._targets = None, None
        return Recorded(
            Found(*map(torch.cat, zip(*(row.store for row in parts)))),
            Found(*map(torch.cat, zip(*(row.cache for row in parts)))),
            Past(*map(torch.cat, zip(*(row.past for row in parts)))),
            torch.cat([row.targets for row in parts]),
            torch.cat([row.own for row in parts]),
        )

    def sources(self, read: Read, *, row: int = 0, most: int = 3) -> list[list[tuple[float, Source | None]]]:
        """For each token of a row of ``h.reads["0.store"]``, the records of the largest weight and where they stand.

        Args:
            read: of the store, from :attr:`Attachment.reads`. row: of the batch. most: records for each token.

        Raises:
            TypeError: the store was loaded without its tokenizer.
        """
        told = []
        for slots, weights in zip(read.slots[row], read.weights[row]):
            best = weights.topk(min(most, len(weights)))
            told.append(list(zip(best.values.tolist(), self.store.sources(slots[best.indices]))))
        return told

    def votes(self, reads: Mapping[str, Read], ids: Tensor, first: int, most: int) -> list[Votes]:
        told = []
        store, cache = (reads[f"{self.name}.{part}"] for part in ("store", "cache"))
        for at in range(first, len(ids)):
            slots, near = store.slots[0, at - 1].cpu(), cache.slots[0, at - 1].cpu()
            tokens = torch.cat([self.store.records.columns_at(slots.clamp(min=0))[:, 0].cpu(), ids[near + 1]])
            weights = torch.cat([store.weights[0, at - 1], cache.weights[0, at - 1]]).float().cpu()
            weights = weights.masked_fill(torch.cat([slots, near]) < 0, 0)
            agrees = tokens == ids[at]
            best = [i for i in weights.argsort(descending=True, stable=True)[:most].tolist() if weights[i] > 0]
            found = []
            for i in best:
                if i < len(slots):
                    source = self.store.sources(slots[i : i + 1])[0]
                else:
                    source = self._of_text(ids, int(near[i - len(slots)]))
                found.append(Vote(float(weights[i]), bool(agrees[i]), source))
            told.append(Votes(float(weights[agrees].sum()), float(weights.sum()), found))
        return told

    def _of_text(self, ids: Tensor, at: int, tokens: int = 12) -> Source:
        """Where an entry of the cache stands, in the text itself."""
        decode = self.store.tokenizer.decode
        text = decode(ids[max(0, at + 2 - tokens) : at + 2].tolist())
        return Source(
            "", at, text, decode(ids[at + 1 : at + 2].tolist()), decode(ids[at + 2 : at + 2 + tokens].tolist())
        )

    def save_parts(self, folder: Path) -> None:
        self.store.save(folder / "store")

    def load_parts(self, folder: Path) -> None:
        self.store = TokenStore.load(folder / "store")


def _between(there: Tensor, span: Tensor) -> Tensor:
    """How many of ``there [B, N]`` lie in the ranges ``span [T, 2]``: ``[B, T]``."""
    counts = torch.nn.functional.pad(there.long().cumsum(1), (1, 0))
    return counts[:, span[:, 1]] - counts[:, span[:, 0]]


def _rates(text: CacheState, T: int) -> Tensor:
    """How often the nearest entry was right for the tokens before each of the last T: ``[B, T, 2]``; 1 of 4 to begin
    with."""
    N = text.tokens.shape[1]
    if N == 1:
        return torch.full((len(text.tokens), T, 2), 0.25, device=text.tokens.device)
    entry = text.real[:, :-1] & text.real[:, 1:]
    span = causal_range(T, N - 1, window=_RATED, offset=N - T - 1).to(entry.device)
    right = (text.nearest[:, :-1] == text.tokens[:, 1:, None]) & entry[..., None]
    hits = torch.stack([_between(x, span) for x in right.unbind(-1)], -1)
    return (hits + 1) / (_between(entry, span)[..., None] + 4)


def _ids(place: Place, data: Any, tokenizer: Any) -> list[Tensor]:
    """Token ids ``[T]`` of each text, of at least 2."""
    if isinstance(data, str) or (isinstance(data, Tensor) and data.dim() == 1):
        data = [data]
    data = list(data.items()) if isinstance(data, Mapping) else list(data)
    if data and isinstance(data[0], (str, tuple)):
        data = [text for _, text in named(data)]
    found = [token_ids("fit", place, text, tokenizer) for text in data]
    found = [row for row in found if len(row) > 1]
    if not found:
        raise ValueError("fit: data must hold a text of at least 2 tokens, got none")
    return found
