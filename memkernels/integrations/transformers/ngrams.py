"""Ngrams: tables that the last tokens address by hashing, mixed into the hidden states of chosen blocks.

    y_t = h_t + u_t + silu(conv(rms(u)))_t,      u_t = sigmoid(g_t) W_v e_t

where ``e_t`` are the rows that the n-grams ending at token t name (:class:`memkernels.nn.NgramMemory`). ``W_v``
starts at 0.

Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup (Engram, arXiv 2601.07372).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import NgramMemory, TokenMap
from .memory import Memory, Step
from .place import Place


class Ngrams(Memory):
    """Hashed n-gram tables after chosen blocks: what the last tokens look up is gated by the hidden state and added.

    ``y_t = h_t + u_t + silu(conv(rms(u)))_t`` with ``u_t = sigmoid(g_t) W_v e_t``; see
    :class:`memkernels.nn.NgramMemory`. Each layer has hash functions and a table of its own.

    Args:
        layers: blocks; negative numbers count from the end. rows: at least so many for each of the
            ``len(orders) * heads`` tables of a layer, one number or one per order.
        orders: lengths of the n-grams. heads: tables per order. head_dim: width of a row. kernel: of the convolution.
        seed: of the hash functions. token_map: what stands for each token in the n-grams.
        tables: paths of files that :meth:`RowTable.open <memkernels.store.RowTable.open>` opens, or open tables, one
            per layer, instead of parameters. Rows are prefetched when a pass begins. Only paths can be saved.
        tier: where the rows of paths lie: "ram", "mmap" or another of ``RowTable.open``.
        sparse_grad: the gradient of the rows is a sparse tensor, for :class:`memkernels.optim.SparseAdam`.

    Raises:
        ValueError: another number of tables than of layers. What :class:`memkernels.nn.NgramMemory` raises, by
            ``attach``. ValueError, in a pass: the model was given embeddings and no tokens.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """

    packed = False

    def __init__(
        self,
        layers: Sequence[int],
        rows: int | Sequence[int],
        *,
        orders: Sequence[int] = (2, 3),
        heads: int = 8,
        head_dim: int = 64,
        kernel: int = 4,
        seed: int = 0,
        token_map: TokenMap | Sequence[int] | None = None,
        tables: Sequence[Any] | None = None,
        tier: str = "ram",
        sparse_grad: bool = False,
    ):
        if tables is not None and len(tables) != len(layers):
            raise ValueError(f"Ngrams: tables must be one per layer, {len(layers)}, got {len(tables)}")
        ids = token_map.map.tolist() if isinstance(token_map, TokenMap) else token_map
        paths = None if tables is None else [os.fspath(t) if isinstance(t, (str, os.PathLike)) else t for t in tables]
        rows = rows if isinstance(rows, int) else list(rows)
        sizes = {"orders": list(orders), "heads": heads, "head_dim": head_dim, "kernel": kernel, "seed": seed}
        more = {"token_map": ids, "tables": paths, "tier": tier, "sparse_grad": sparse_grad}
        super().__init__(layers, {"layers": list(layers), "rows": rows, **sizes, **more})
        self.parts = nn.ModuleDict()

    def build(self, place: Place) -> None:
        options = self.options
        names = ("orders", "heads", "head_dim", "kernel", "seed", "sparse_grad")
        given = {name: options[name] for name in names}
        ids = options["token_map"]
        parts = {}
        for number, layer in enumerate(self.layers):
            table = None if options["tables"] is None else self._table(options["tables"][number])
            known = None if ids is None else TokenMap(torch.tensor(ids))
            part = NgramMemory(place.width, options["rows"], layer=layer, table=table, token_map=known, **given)
            self.zero_(part.value)
            parts[str(layer)] = part.to(**place.factory(layer))
        self.parts = nn.ModuleDict(parts)

    def _table(self, table: Any) -> Any:
        if not isinstance(table, str):
            return table
        from ...store import RowTable

        return RowTable.open(table, tier=self.options["tier"])

    def begin(self, step: Step) -> None:
        if step.input_ids is None:
            raise ValueError("Ngrams: the model must be given input_ids, got embeddings")
        for layer in self.layers:
            part: Any = self.parts[str(layer)]
            if part.table is not None:
                step.started[f"{self.name}.{layer}"] = part.prefetch(self._tokens(step), step.state(self, layer))

    def _tokens(self, step: Step) -> Tensor:
        ids = step.input_ids
        assert ids is not None  # begin has refused
        return ids if step.token_mask is None else ids.masked_fill(~step.token_mask, -1)

    def after_block(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        part: Any = self.parts[str(layer)]
        ticket = step.started.pop(f"{self.name}.{layer}", None)
        x = hidden.to(part.value.weight.dtype)
        y, history = part(x, self._tokens(step), step.state(self, layer), ticket=ticket)
        step.keep(self, layer, history)
        return y.to(hidden.dtype)
