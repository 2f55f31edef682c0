"""Neighbours: a frozen model reads what followed similar tokens, in a store of documents and in the text so far.

    p(w) = m_0 softmax(logits)[w] + m_1 p_store(w) + m_2 p_cache(w),    p_s(w) = sum_{j: token_sj = w} softmax_j(-d_sj / T_s)

over the k records of the store, and the k of the last ``cache`` tokens, whose keys lie nearest to that of the token.

Source: Khandelwal et al. 2020, Generalization through Memorization: Nearest Neighbor Language Models; Grave et al. 2017,
Improving Neural Language Models with a Continuous Cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops import causal_range, topk_search
from .encoding import bar, named
from .fitting import alone
from .memory import Memory, Mixture, Read, Step
from .mixing import Found, Mixing, Recorded, learn
from .place import Place
from .token_store import Source, TokenStore, check_model, check_tokenizer
from .windows import windows

if TYPE_CHECKING:
    from .attachment import Attachment

_SLACK = 256  # tokens that a crop may take back once the cache is full


class CacheState(NamedTuple):
    """The last tokens of a text and their keys: ``keys [B, M, dim]``, ``tokens [B, M]``, ``real [B, M]`` (False:
    padding), and ``first [B]``, the position of the oldest."""

    keys: Tensor
    tokens: Tensor
    real: Tensor
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
        """Search for the positions that get logits; keep the keys of all."""
        if step.input_ids is None:
            raise ValueError("Neighbours: the model must be given input_ids, got embeddings")
        keys = self.store.project(step.input_of(self, "key").detach())  # [B, T, dim]
        query = step.with_logits(keys)
        distances, tokens, slots = self.store.search(query, self.k)
        store = Found(distances, tokens)
        cache, entries, at = self._cached(step, keys, query)
        found = (store, cache)
        if self._recorded is not None:
            assert self._targets is not None
            unknown = keys.new_empty(0)
            parts = [Found(*(x.flatten(0, 1) for x in source)) for source in found]
            self._recorded.append(Recorded(*parts, entries.flatten(), self._targets.flatten(), unknown))
            return
        mixture = Mixture(*self.mixing.mixture(found, entries))
        self._mixture = (step, mixture)
        with torch.no_grad():
            weights = torch.softmax(mixture.scores.masked_fill(mixture.tokens < 0, -1e30), -1) * mixture.mix[..., None]
            of_store, of_cache = weights.split([self.k, weights.shape[-1] - self.k], -1)
            step.record(self, "store", slots, of_store)
            step.record(self, "cache", at, of_cache)

    def _cached(self, step: Step, keys: Tensor, query: Tensor) -> tuple[Found, Tensor, Tensor]:
        """What the cache holds for each query: entries, how many it has ``[B, S]``, positions in the text."""
        B, T = keys.shape[:2]
        if self.cache_size == 0:
            none = query.new_full((B, query.shape[1], 1), torch.inf)
            empty = torch.full_like(none, -1, dtype=torch.int64)
            return Found(none, empty), torch.zeros_like(empty[..., 0]), empty
        ids: Tensor = step.input_ids  # type: ignore[assignment]
        real = torch.ones_like(ids, dtype=torch.bool) if step.token_mask is None else step.token_mask
        old = step.state(self)
        first = ids.new_zeros(B) if old is None else old.first
        M = 0 if old is None else old.keys.shape[1]
        if old is not None:
            keys, ids = torch.cat([old.keys, keys], 1), torch.cat([old.tokens, ids], 1)
            real = torch.cat([old.real, real], 1)
        drop = max(0, M + T - self.cache_size - 1 - _SLACK)
        step.keep(self, "", CacheState(keys[:, drop:], ids[:, drop:], real[:, drop:], first + drop))

        # Entry i is the key of token i, and token i + 1: the last token has none.
        entry = real[:, :-1] & real[:, 1:]
        span = causal_range(T, M + T - 1, window=self.cache_size, offset=M - 1).to(keys.device)
        span = step.with_logits(span[None])  # [1, S, 2]
        counts = torch.nn.functional.pad(entry.long().cumsum(1), (1, 0))
        entries = counts[:, span[0, :, 1]] - counts[:, span[0, :, 0]]
        held = keys[:, :-1]
        mask = (-held.square().sum(-1)).masked_fill(~entry, -torch.inf)
        k = min(self.k, self.cache_size)
        scores, at = topk_search(query, held, k, scale=2.0, slot_mask=mask, slot_range=span.expand(B, -1, -1))
        distances = (query.square().sum(-1, keepdim=True) - scores).clamp(min=0).masked_fill(at < 0, torch.inf)
        if M + T > 1:
            following = ids[:, 1:, None].expand(-1, -1, k)
            tokens = following.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)
        else:
            tokens = torch.full_like(at, -1)
        return Found(distances, tokens), entries, (at + first[:, None, None]).masked_fill(at < 0, -1)

    def mixture(self, step: Step, logits: Tensor) -> Mixture | None:
        if self._recorded is not None:
            last = self._recorded[-1]
            own = torch.log_softmax(logits.float(), -1).flatten(0, 1).gather(-1, last.targets[:, None])[:, 0]
            self._recorded[-1] = last._replace(own=own)
            return None
        found, self._mixture = self._mixture, None
        return None if found is None or found[0] is not step else found[1]

    def crop(self, state: Any, tokens: int) -> Any:
        M = state.keys.shape[1]
        if bool((state.first > 0).any()) and tokens > _SLACK:
            raise NotImplementedError(f"Neighbours: crop must remove at most {_SLACK} tokens, got {tokens}")
        keep = max(M - tokens, 0)
        return CacheState(*(x[:, :keep] for x in state[:3]), state.first)

    # --- learning, and what was read ---

    def fit(
        self,
        attachment: Attachment,
        data: Any,
        tokenizer: Any = None,
        *,
        steps: int = 300,
        lr: float = 2e-2,
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
        texts = _ids(data, tokenizer)
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
        sources = [Found(*(torch.cat(x) for x in zip(*column))) for column in list(zip(*parts))[:2]]
        return Recorded(*sources, *(torch.cat(x) for x in list(zip(*parts))[2:]))

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

    def save_parts(self, folder: Path) -> None:
        self.store.save(folder / "store")

    def load_parts(self, folder: Path) -> None:
        self.store = TokenStore.load(folder / "store")


def _ids(data: Any, tokenizer: Any) -> list[Tensor]:
    """Token ids ``[T]`` of each text, of at least 2."""
    if isinstance(data, Tensor):
        found = [data] if data.dim() == 1 else list(data)
    else:
        data = [data] if isinstance(data, str) else data
        data = list(data.items()) if isinstance(data, Mapping) else list(data)
        if data and not isinstance(data[0], (str, tuple)):
            found = [torch.as_tensor(row, dtype=torch.int64) for row in data]
        elif tokenizer is None:
            raise TypeError("Neighbours: tokenizer must be given with texts, got None")
        else:
            texts = [text for _, text in named(data)]
            rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
            found = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    found = [row for row in found if len(row) > 1]
    if not found:
        raise ValueError("fit: data must hold a text of at least 2 tokens, got none")
    return found
