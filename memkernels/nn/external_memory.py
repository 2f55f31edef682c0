"""ExternalMemory: N slots with learned keys; values are read by a softmax and written through sigmoid gates.

    q_t = W_q x_t,   w_t = W_w x_t,   s[t, i] = scale * <q_t, k_i>
    read:  r_t = sum_i softmax_i(s[t, i]) v_i
    write: g[t, i] = sigmoid(s[t, i] + gate_bias),   v_i <- g[t, i] w_t + (1 - g[t, i]) v_i,   k_i <- k_i

Sources: Sukhbaatar et al. 2015, End-To-End Memory Networks (the read); Graves et al. 2014, Neural Turing Machines
(content addressing, writing by interpolation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import gated_write, gated_write_, softmax_read
from ._sizes import check_sizes


class MemoryState(NamedTuple):
    """What a memory holds at one moment. A pytree of tensors: it can be detached, saved, moved and compiled over.

    values: ``[..., N, V]``; leading dimensions are the streams that have a memory of their own.
    """

    values: Tensor

    def detach(self) -> MemoryState:
        """The same content, detached from the graph that wrote it."""
        return MemoryState(self.values.detach())

    def clone(self) -> MemoryState:
        """A copy that may be written in place."""
        return MemoryState(self.values.clone())


class ExternalMemory(nn.Module):
    """A memory of ``mem_size`` slots whose keys are learned and whose values are state.

    With ``s[t, i] = scale * <W_q x_t, k_i>``: a read is ``r_t = sum_i softmax_i(s[t, i]) v_i``; a write is
    ``v_i <- g w_t + (1 - g) v_i`` with ``g = sigmoid(s[t, i] + gate_bias)`` and ``w_t = W_w x_t``, for every token in
    order. Keys do not change by writing; they are trained.

    State is functional: ``read`` and ``write`` take a :class:`MemoryState` and ``write`` returns a new one,
    differentiable back to every token that wrote; ``state.detach()`` cuts it. The memory that outlives a step is the
    buffer ``values`` ``[N, V]``, part of ``state_dict``: a new stream starts from it (:meth:`initial_state`),
    :meth:`keep` replaces it. It starts empty (zero), and an empty memory reads exactly zero.

    Args:
        mem_size: N, slots. mem_dim: width of keys and values. model_dim: width of ``x``.
        scaled: True for ``scale = mem_dim ** -0.5``, False for ``scale = 1``.
        gate_bias: added to the score inside the write gate. 0 is the plain equation, where a token that matches nothing
            overwrites half of every slot. With a negative bias, slots that do not match keep their content.
        backend: passed to every operation; None means what :func:`memkernels.use_backend` says.

    Raises:
        ValueError: a size below 1.

    Source: Sukhbaatar et al. 2015, End-To-End Memory Networks; Graves et al. 2014, Neural Turing Machines.
    """

    values: Tensor

    def __init__(
        self,
        mem_size: int,
        mem_dim: int,
        model_dim: int,
        *,
        scaled: bool = True,
        gate_bias: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        check_sizes("ExternalMemory", mem_size=mem_size, mem_dim=mem_dim, model_dim=model_dim)
        self.scale = mem_dim**-0.5 if scaled else 1.0
        self.gate_bias = gate_bias
        self.backend = backend
        self.keys = nn.Parameter(torch.empty(mem_size, mem_dim))
        self.query_projection = nn.Linear(model_dim, mem_dim, bias=False)
        self.write_projection = nn.Linear(model_dim, mem_dim, bias=False)
        self.register_buffer("values", torch.zeros(mem_size, mem_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters, empty the memory. Orthogonal projections keep writes distinct even before training."""
        nn.init.normal_(self.keys)
        nn.init.orthogonal_(self.query_projection.weight)
        nn.init.orthogonal_(self.write_projection.weight)
        nn.init.zeros_(self.values)

    def initial_state(self, *streams: int) -> MemoryState:
        """The kept memory, once for every stream: ``[*streams, N, V]``; no ``streams``: one memory shared by all."""
        return MemoryState(self.values.expand(*streams, *self.values.shape).clone())

    def keep(self, state: MemoryState) -> None:
        """Make ``state`` ``[N, V]`` the memory that ``state_dict`` saves and new streams start from.

        Raises:
            ValueError: a state with leading dimensions. Choose one of its streams, or take their mean, first.
        """
        if state.values.shape != self.values.shape:
            raise ValueError(
                f"ExternalMemory.keep: state.values must be {list(self.values.shape)}, got {list(state.values.shape)}"
            )
        with torch.no_grad():
            self.values.copy_(state.values)

    def read(self, x: Tensor, state: MemoryState) -> Tensor:
        """x ``[..., T, model_dim]`` -> reads ``[..., T, mem_dim]``, in the dtype of ``x`` or of autocast.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not fit.
        """
        return softmax_read(self.query_projection(x), self.keys, state.values, scale=self.scale, backend=self.backend)

    def write(
        self, x: Tensor, state: MemoryState, *, address: Tensor | None = None, token_mask: Tensor | None = None
    ) -> MemoryState:
        """The state after the tokens of ``x`` wrote themselves, in order.

        Args:
            x: ``[..., T, model_dim]``, what is written. Leading dimensions that the state lacks are written in
                row-major order.
            state: values ``[..., N, mem_dim]``; not modified.
            address: ``[..., T, model_dim]``, what decides where; default ``x``.
            token_mask: bool ``[..., T]``; a token at False writes nothing.

        Returns:
            values ``[..., N, mem_dim]`` in their own dtype.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not fit.
        """
        return MemoryState(gated_write(*self._write_arguments(x, state, address), **self._options(token_mask)))

    def write_(
        self, x: Tensor, state: MemoryState, *, address: Tensor | None = None, token_mask: Tensor | None = None
    ) -> MemoryState:
        """:meth:`write` into ``state`` itself, for inference. Returns ``state``.

        Raises:
            RuntimeError: a gradient is required. ValueError, TypeError: a shape, dtype or device does not fit.
        """
        gated_write_(*self._write_arguments(x, state, address), **self._options(token_mask))
        return state

    def _write_arguments(self, x: Tensor, state: MemoryState, address: Tensor | None) -> tuple[Tensor, ...]:
        query = self.query_projection(x if address is None else address)
        return state.values, self.keys, query, self.write_projection(x).to(state.values.dtype)

    def _options(self, token_mask: Tensor | None) -> dict:
        bias = None
        if self.gate_bias:
            bias = torch.full((1,), self.gate_bias, dtype=self.keys.dtype, device=self.keys.device)
        return {"scale": self.scale, "slot_mask": bias, "token_mask": token_mask, "backend": self.backend}

    def extra_repr(self) -> str:
        slots, width = self.keys.shape
        return f"mem_size={slots}, mem_dim={width}, scale={self.scale:g}, gate_bias={self.gate_bias:g}"
