"""Adam over the rows of a table that have a gradient, in one pass over them.

    m_i += (1 - b1) (g_i - m_i),    v_i += (1 - b2) (g_i^2 - v_i),
    w_i -= lr sqrt(1 - b2^t) / (1 - b1^t) * m_i / (sqrt(v_i) + eps)           for the rows i of the gradient

Source: Kingma and Ba 2015, Adam: A Method for Stochastic Optimization, in the lazy form of ``torch.optim.SparseAdam``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..ops._options import number
from ..spec import FLOATS, stats_dtype


class SparseAdam(torch.optim.Optimizer):
    """``torch.optim.SparseAdam`` in one pass: the same equation, step by step the same numbers up to rounding.

    The moments of rows without a gradient stay as they are, and so do those rows. torch's own form reads and writes
    each touched row about ten times; on the CPU a kernel reads and writes it once. On other devices, and where the
    native library is missing, its formula runs.

    Args:
        params: tables ``[N, V]``, contiguous floats, with coalesced sparse gradients such as those of
            ``gather_rows(..., sparse_grad=True)``. The moments are float32 beside 16 bits.
        lr, betas, eps: as in ``torch.optim.SparseAdam``.

    Raises:
        ValueError, TypeError: an option or a table is not as above. RuntimeError: a dense gradient.

    Source: Kingma and Ba 2015, Adam: A Method for Stochastic Optimization.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        lr, eps = (number("SparseAdam", name, x, "a number") for name, x in (("lr", lr), ("eps", eps)))
        first, second = (number("SparseAdam", "betas", b, "two numbers in [0, 1)") for b in betas)
        if lr <= 0 or eps <= 0:
            raise ValueError(f"SparseAdam: lr and eps must be above 0, got {lr} and {eps}")
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError(f"SparseAdam: betas must be two numbers in [0, 1), got {first} and {second}")
        super().__init__(params, {"lr": lr, "betas": (first, second), "eps": eps})
        for table in (table for group in self.param_groups for table in group["params"]):
            _check_table(table)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every table that has a gradient. ``closure`` computes the loss again, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(table, group) for group in self.param_groups for table in group["params"] if table.grad is not None]
        for table, _ in found:  # before any table changes
            if table.grad.layout != torch.sparse_coo:
                raise RuntimeError(f"SparseAdam: gradients must be sparse, got one of {table.grad.layout}")
        for table, group in found:
            self._step(table, group)
        return loss

    def _step(self, table: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            exact = stats_dtype(table.dtype)
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(table, dtype=exact)
            state["exp_avg_sq"] = torch.zeros_like(table, dtype=exact)
        state["step"] += 1
        first, second = group["betas"]
        correction = (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
        assert table.grad is not None
        rows = _rows(table.grad)
        moments = state["exp_avg"], state["exp_avg_sq"]
        options = group["lr"] * correction, first, second, group["eps"]
        if table.device.type == "cpu" and _native.missing() is None:
            torch.ops.memkernels_cpu.sparse_adam(table, *moments, *rows, *options)
        else:
            by_formula(table, *moments, *rows, *options)


def _rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Its slots, ascending, each once, and their rows. Accumulating into .grad forgets that a gradient is coalesced."""
    slots = gradient._indices()[0]
    if not gradient.is_coalesced() and bool((slots[1:] <= slots[:-1]).any()):
        gradient = gradient.coalesce()
        slots = gradient._indices()[0]
    return slots.contiguous(), gradient._values().contiguous()


def by_formula(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, slots: Tensor, gradient: Tensor,
    step_size: float, first: float, second: float, eps: float,
) -> None:  # fmt: skip
    """The equation in plain PyTorch, in place."""
    g, m, v = gradient.to(exp_avg.dtype), exp_avg[slots], exp_avg_sq[slots]
    m = m + (1 - first) * (g - m)
    v = v + (1 - second) * (g.square() - v)
    exp_avg[slots], exp_avg_sq[slots] = m, v
    table[slots] = (table[slots].to(m.dtype) - step_size * m / (v.sqrt() + eps)).to(table.dtype)


def _check_table(table: Tensor) -> None:
    if table.dim() != 2 or not table.is_contiguous() or table.dtype not in FLOATS:
        dtype = str(table.dtype).removeprefix("torch.")
        raise ValueError(f"SparseAdam: params must be contiguous floats [N, V], got {dtype} {list(table.shape)}")
