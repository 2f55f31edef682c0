"""NgramMemory: hash tables that the last tokens address, mixed into the hidden state by a gate.

    slots[t, m] = ngram_slots(x)[t, m]             M = len(orders) * heads rows per token, x the tokens or their map
    e_t         = [row(slots[t, 1]), ..., row(slots[t, M])]                               M * head_dim numbers
    v_t         = W_v e_t,    k_tb = W_b e_t                                                   for each branch b
    g_tb        = f(<rms(h_tb) * a_b, rms(k_tb) * c_b> / sqrt(D)),   f(g) = sign(g) sqrt(max(|g|, 1e-6))
    u_tb        = sigmoid(g_tb) v_t
    y_tb        = h_tb + u_tb + silu(sum_{j < kernel} w_bj * rms(u_{t - j * dilation, b}) * d_b)

Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup (Engram, arXiv 2601.07372).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import gather_rows, memory_gate, ngram_slots, odd_multipliers, prime_sizes
from ._sizes import check_sizes
from .token_map import TokenMap

if TYPE_CHECKING:
    from ..store import RowTable


class NgramHistory(NamedTuple):
    """What a text in pieces hands on: all that later tokens need of earlier ones. A pytree of tensors.

    tokens: int64 ``[..., max(orders) - 1]``, the last tokens, the last one last; negative where there was none.
    inputs: ``[..., (kernel - 1) * dilation, branches, dim]``, the last inputs of the convolution.
    """

    tokens: Tensor
    inputs: Tensor

    def detach(self) -> NgramHistory:
        """The same content, detached from the graph that made it."""
        return NgramHistory(self.tokens, self.inputs.detach())


class Ticket(Protocol):
    """Rows on their way."""

    def wait(self) -> Tensor:
        """The rows ``[..., T, M, head_dim]``."""


class Table(Protocol):
    """Where rows lie: a :class:`memkernels.store.RowTable`, or whatever else has these methods."""

    def gather(self, slots: Tensor, /) -> Tensor:
        """Rows ``[..., M, head_dim]`` of slots ``[..., M]``; zeros at -1."""

    def prefetch(self, slots: Tensor, /) -> Ticket:
        """Begin to read, and return at once."""


class NgramMemory(nn.Module):
    """A layer that looks the last tokens up in hash tables and adds what it finds to the hidden state.

    ``y_tb = h_tb + u_tb + silu(conv(rms(u_b)))_t`` with ``u_tb = sigmoid(g_tb) W_v e_t``, where ``e_t`` are the rows
    that the n-grams ending at token t name in M hash tables, and ``g_tb`` compares the hidden state with ``W_b e_t``.

    Rows are named by tokens alone, so that they can be read before the layer's input is known: :meth:`prefetch` at the
    beginning of a step, :meth:`forward` with the ticket where the layer comes. A token touches M rows, however many
    there are. The convolution begins as zero: a new layer adds the gated value alone.

    State is functional: ``forward`` takes an :class:`NgramHistory` and returns the next one, so that a text in pieces
    equals the text at once, and ``history.detach()`` is truncated backpropagation. Without one a stream begins.

    Args:
        dim: D, width of the hidden state.
        rows: at least so many rows for each of the ``M = len(orders) * heads`` tables, one number or one per order:
            each table has the next prime that no table before it has (:func:`memkernels.prime_sizes`).
        orders: lengths of the n-grams. heads: tables per order. head_dim: width of a row.
        branches: B, hidden states per token, each with a key and a gate of its own; the value is shared.
        kernel, dilation: of the convolution over time, which reaches ``(kernel - 1) * dilation`` tokens back;
            ``dilation`` is ``max(orders)`` by default.
        eps: of the normalisations. signed_sqrt: False for ``f(g) = g`` (:func:`memkernels.memory_gate`).
        token_map: what stands for each token in the n-grams.
        ignore: ids of tokens that name no rows, such as images and padding; they count as ``pad``.
        pad: stands for what is no token, among the ids after the map.
        seed, layer: choose the hash functions; give each layer of a model its own number.
        table: where the rows lie, instead of the parameter ``weight`` ``[rows, head_dim]``: see :meth:`read_from`.
        sparse_grad: the gradient of ``weight`` is a sparse tensor of the rows that were read, for
            ``torch.optim.SparseAdam``: a step costs what it touched.
        backend: passed to the operations.

    Raises:
        ValueError, TypeError: a size below 1, an argument that :func:`memkernels.ngram_slots` or
            :func:`memkernels.prime_sizes` refuses, a table of another width or with fewer rows.

    Source: Cheng et al. 2026, Conditional Memory via Scalable Lookup, arXiv 2601.07372.
    """

    sizes: Tensor
    multipliers: Tensor
    ignore: Tensor | None
    hidden_weight: nn.Parameter
    key_weight: nn.Parameter
    input_weight: nn.Parameter
    weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        rows: int | Sequence[int],
        *,
        orders: Sequence[int] = (2, 3),
        heads: int = 8,
        head_dim: int = 64,
        branches: int = 1,
        kernel: int = 4,
        dilation: int | None = None,
        eps: float = 1e-6,
        signed_sqrt: bool = True,
        token_map: TokenMap | None = None,
        ignore: Sequence[int] | None = None,
        pad: int = 0,
        seed: int = 0,
        layer: int = 0,
        table: Table | None = None,
        sparse_grad: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.orders = tuple(orders)
        if not self.orders or min(self.orders) < 1:
            raise ValueError(f"{name}: orders must be lengths of at least 1, got {list(self.orders)}")
        if not isinstance(token_map, (TokenMap, type(None))):
            raise TypeError(f"{name}: token_map must be a TokenMap, got {type(token_map).__name__}")
        dilation = max(self.orders) if dilation is None else dilation
        check_sizes(name, dim=dim, heads=heads, head_dim=head_dim, branches=branches, kernel=kernel, dilation=dilation)
        self.dim, self.heads, self.head_dim, self.branches = dim, heads, head_dim, branches
        self.kernel, self.dilation, self.eps, self.signed_sqrt = kernel, dilation, eps, signed_sqrt
        self.pad, self.sparse_grad, self.backend, self.token_map = pad, sparse_grad, backend, token_map
        with torch.device("cpu"):  # these have values even where parameters are made on the meta device
            sizes, multipliers = prime_sizes(rows, self.orders, heads), odd_multipliers(seed, layer, max(self.orders))
            ignored = None if ignore is None else torch.tensor(list(ignore), dtype=torch.int64)
        self.rows = int(sizes.sum())  # of all tables together
        # Part of state_dict: a saved layer finds its rows again whatever the seed was.
        self.register_buffer("sizes", sizes)
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("ignore", ignored)
        width = len(sizes) * head_dim
        self.value = nn.Linear(width, dim, bias=False)
        self.key = nn.Linear(width, branches * dim, bias=False)
        for scale in ("hidden_weight", "key_weight", "input_weight"):  # of the three normalisations
            self.register_parameter(scale, nn.Parameter(torch.empty(branches, dim)))
        self.filter = nn.Parameter(torch.empty(branches * dim, 1, kernel))  # as F.conv1d wants it, the oldest tap first
        self.table: Table | None = None
        self.register_parameter("weight", None)
        if table is None:
            self.weight = nn.Parameter(torch.empty(self.rows, head_dim))
        else:
            self.read_from(table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters: small rows, so that n-grams never seen add little; a convolution of zero."""
        for linear in (self.value, self.key):
            linear.reset_parameters()
        for scale in (self.hidden_weight, self.key_weight, self.input_weight):
            nn.init.ones_(scale)
        nn.init.zeros_(self.filter)
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)

    def initial_history(self, *streams: int) -> NgramHistory:
        """That of streams which have no token yet."""
        tokens, inputs = self._history_shapes(streams)
        return NgramHistory(self.sizes.new_full(tokens, -1), self.filter.new_zeros(inputs))

    def _history_shapes(self, streams: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        reach = (self.kernel - 1) * self.dilation
        return (*streams, max(self.orders) - 1), (*streams, reach, self.branches, self.dim)

    def slots(self, tokens: Tensor, history: NgramHistory | None = None, *, first: Tensor | None = None) -> Tensor:
        """The rows that ``tokens`` ``[..., T]`` name: int64 ``[..., T, M]``; see :meth:`forward`."""
        return ngram_slots(
            tokens,
            self.sizes,
            self.multipliers,
            orders=self.orders,
            heads=self.heads,
            token_map=None if self.token_map is None else self.token_map.map,
            history=None if history is None else self._fitting(history, tokens).tokens,
            first=first,
            ignore=self.ignore,
            pad=self.pad,
            backend=self.backend,
        )

    def prefetch(
        self, tokens: Tensor, history: NgramHistory | None = None, *, first: Tensor | None = None
    ) -> Ticket | None:
        """Begin to read the rows of ``tokens``; returns at once.

        Args:
            tokens, history, first: as :meth:`forward` will get them.

        Returns:
            A ticket for :meth:`forward`; None where the rows are a parameter, which is no work to read.

        Raises:
            ValueError, TypeError: as :func:`memkernels.ngram_slots`. What the table raises.
        """
        return None if self.table is None else self.table.prefetch(self.slots(tokens, history, first=first))

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        history: NgramHistory | None = None,
        *,
        first: Tensor | None = None,
        ticket: Ticket | None = None,
    ) -> tuple[Tensor, NgramHistory]:
        """Look up, gate, convolve, add.

        Args:
            hidden: ``[..., T, dim]``, or ``[..., T, branches, dim]`` with several branches.
            tokens: int64 ``[..., T]``; negative: no token. One that is no token, or is ignored, has a value of zero.
            history: of the tokens before; None: there are none.
            first: int64 ``[..., T]``, the position at which the sequence of each token begins, for several sequences
                packed into one; neither n-grams nor the convolution reach beyond it. Negative: in the history.
            ticket: of :meth:`prefetch` with the same tokens.

        Returns:
            ``(hidden, history)``: ``hidden`` of the shape and dtype that was given, and the history after it,
            differentiable back into the one that was given, which is not modified.

        Raises:
            ValueError, TypeError: a shape or dtype does not fit. RuntimeError: a token outside the map. What the table
                raises.
        """
        history = self._checked(hidden, tokens, history)
        x = hidden if self.branches > 1 else hidden.unsqueeze(-2)  # [..., T, B, D]
        found = self._rows(tokens, history, first, ticket).flatten(-2)  # [..., T, M * head_dim]
        gated = memory_gate(
            x,
            self.key(found).unflatten(-1, (self.branches, self.dim)),
            self.value(found),
            self.hidden_weight,
            self.key_weight,
            eps=self.eps,
            signed_sqrt=self.signed_sqrt,
            backend=self.backend,
        )
        inputs = F.rms_norm(gated, (self.dim,), eps=self.eps) * self.input_weight
        inputs = torch.cat([history.inputs, inputs.to(history.inputs.dtype)], -3)
        added = gated + F.silu(self._convolved(inputs, first))
        result = hidden + added.to(hidden.dtype).view(hidden.shape)
        return result, self._next(tokens, history, inputs)

    def _rows(self, tokens: Tensor, history: NgramHistory, first: Tensor | None, ticket: Ticket | None) -> Tensor:
        """``[..., T, M, head_dim]`` in the dtype of the projections."""
        if self.weight is not None:
            if ticket is not None:
                got = type(ticket).__name__
                raise TypeError(f"NgramMemory: ticket must be None where the rows are a parameter, got {got}")
            slots = self.slots(tokens, history, first=first)
            return gather_rows(self.weight, slots, sparse_grad=self.sparse_grad, backend=self.backend)
        assert self.table is not None  # there is one or the other
        if ticket is None:
            found = self.table.gather(self.slots(tokens, history, first=first))
        else:
            found = ticket.wait()
        wanted = (*tokens.shape, len(self.sizes), self.head_dim)
        if found.shape != wanted:
            what = "table must give" if ticket is None else "ticket must be of these tokens, of"
            raise ValueError(f"NgramMemory: {what} rows {list(wanted)}, got {list(found.shape)}")
        return found.to(self.value.weight.device, self.value.weight.dtype)

    def _convolved(self, inputs: Tensor, first: Tensor | None) -> Tensor:
        """``sum_j w_bj inputs[t - j * dilation]`` ``[..., T, B, D]`` of inputs that begin with those of the history."""
        *lead, length, _, _ = inputs.shape
        reach = (self.kernel - 1) * self.dilation
        if first is None and length > reach:
            flat = inputs.reshape(-1, length, self.branches * self.dim).mT
            out = F.conv1d(flat, self.filter, dilation=self.dilation, groups=flat.shape[-2])
            return out.mT.view(*lead, length - reach, self.branches, self.dim)
        position = torch.arange(length - reach, device=inputs.device)
        first = position.new_full((), -reach) if first is None else first
        out = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        for j in range(self.kernel):
            back = j * self.dilation
            tap = self.filter[:, 0, self.kernel - 1 - j].view(self.branches, self.dim)
            within = (position - back >= first)[..., None, None]
            out = out + (tap * inputs[..., reach - back : length - back, :, :]).masked_fill(~within, 0)
        return out

    def _next(self, tokens: Tensor, history: NgramHistory, inputs: Tensor) -> NgramHistory:
        before, reach = max(self.orders) - 1, (self.kernel - 1) * self.dilation
        seen = torch.cat([history.tokens, tokens.to(history.tokens.dtype)], -1)
        kept = inputs[..., inputs.shape[-3] - reach :, :, :]
        return NgramHistory(seen[..., seen.shape[-1] - before :].clone(), kept.clone())  # not views of a long text

    def _checked(self, hidden: Tensor, tokens: Tensor, history: NgramHistory | None) -> NgramHistory:
        """ValueError unless the shapes fit; the history that was given, or an empty one."""
        tail = (self.dim,) if self.branches == 1 else (self.branches, self.dim)
        if not tokens.dim() or hidden.shape != (*tokens.shape, *tail):
            sizes = f"branches={self.branches}, dim={self.dim}" if self.branches > 1 else f"dim={self.dim}"
            raise ValueError(
                f"NgramMemory: hidden must be [..., T, {sizes}] and tokens [..., T], "
                f"got {list(hidden.shape)} and {list(tokens.shape)}"
            )
        return self.initial_history(*tokens.shape[:-1]) if history is None else self._fitting(history, tokens)

    def _fitting(self, history: NgramHistory, tokens: Tensor) -> NgramHistory:
        """``history`` if it can stand before ``tokens``; TypeError or ValueError otherwise."""
        if not isinstance(history, NgramHistory):
            raise TypeError(f"NgramMemory: history must be an NgramHistory, got {type(history).__name__}")
        for field, given, wanted in zip(history._fields, history, self._history_shapes(tokens.shape[:-1])):
            if given.shape != wanted:
                raise ValueError(f"NgramMemory: history.{field} must be {list(wanted)}, got {list(given.shape)}")
        return history

    def read_from(self, table: Table) -> None:
        """Read rows from ``table`` from now on; the parameter ``weight`` goes, and is no part of ``state_dict``.

        Args:
            table: has ``gather`` and ``prefetch``, such as a :class:`memkernels.store.RowTable`; ``rows`` and ``width``
                of its ``layout``, or of itself, are checked where it has them.

        Raises:
            ValueError: another width, or fewer rows. TypeError: a method is missing.
        """
        for method in ("gather", "prefetch"):
            if not callable(getattr(table, method, None)):
                raise TypeError(f"NgramMemory: table must have {method}(slots), got {type(table).__name__}")
        layout = getattr(table, "layout", table)
        width, rows = getattr(layout, "width", self.head_dim), getattr(layout, "rows", self.rows)
        if width != self.head_dim:
            raise ValueError(f"NgramMemory: table must have rows of head_dim={self.head_dim} numbers, got {width}")
        if rows < self.rows:
            raise ValueError(f"NgramMemory: table must have at least {self.rows} rows, got {rows}")
        self.table, self.weight = table, None

    def save_table(
        self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, scale: str | None = None
    ) -> RowTable:
        """Write the rows to a file that :meth:`RowTable.open <memkernels.store.RowTable.open>` opens.

        Args:
            path: of the file. dtype: of its rows, by default that of ``weight``; an 8-bit one needs ``scale``.
            scale: "row" or "block:32", for example: what has a scale of its own.

        Returns:
            The table, open in RAM. ``layer.read_from(table)`` then does without the parameter.

        Raises:
            RuntimeError: the rows lie in a table already. As ``RowTable.create``.
        """
        if self.weight is None:
            raise RuntimeError("NgramMemory: save_table needs the parameter weight, but the rows lie in a table")
        from ..store import RowTable  # here: the store is not needed by layers, and builds on them

        rows = self.weight.detach()
        return RowTable.create(path, *rows.shape, dtype=dtype or rows.dtype, scale=scale, values=rows)

    def extra_repr(self) -> str:
        where = "weight" if self.table is None else type(self.table).__name__
        return f"dim={self.dim}, rows={self.rows} in {where}, orders={self.orders}, heads={self.heads}"
