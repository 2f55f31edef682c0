"""The gate before the clock: is what a variant computes right? Against the float64 reference, on all or on a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memkernels.registration import OPS
from memkernels.testing.compare import distance, norms, special_values, table

from .case import Case
from .variants import function_of, prepare, results

# A peer is right when it computes the same thing, even with more rounding than the library allows itself.
PEER_SLACK = 20


class Exact:
    """The float64 results of a case on one input set, or on a sample of its tokens or slots.

    A sampled result that depends on all of them (the gradient of the keys, in a sample of tokens) is not compared.
    """

    def __init__(self, case: Case, inputs: Mapping[str, Tensor], d_out: Tensor | None) -> None:
        self.case, self.inputs, self.d_out = case, inputs, d_out
        if case.check is not None:
            return
        op = OPS[case.op]
        axes = {arg.name: arg.axes.split() for arg in op.args}
        result = op.outputs[0].axes.split()
        self.axes = [axes[name] for name in case.grads] if case.direction == "backward" else [result]
        self.letter, self.sample = "", None
        if case.sample is not None:
            self.letter, count = case.sample
            name = next(name for name in inputs if self.letter in axes[name])
            total = inputs[name].shape[axes[name].index(self.letter) - len(axes[name])]
            self.sample = torch.arange(0, total, max(1, total // count), device=inputs[name].device)
        self.sub = {name: self._sampled(t, axes[name]) for name, t in inputs.items()}
        self.d_sub = None if d_out is None else self._sampled(d_out, result)
        self.wanted = self._reference(torch.float64)
        self.norms = norms([w for w in self.wanted if w is not None])

    def _sampled(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        if self.sample is None or self.letter not in axes:
            return tensor
        return tensor.index_select(axes.index(self.letter) - len(axes), self.sample)

    def _reference(self, dtype: torch.dtype) -> list[Tensor | None]:
        """What the reference finds when everything is in ``dtype``; None where the sample says nothing."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        inputs = {name: cast(t) for name, t in self.sub.items()}
        d_out = None if self.d_sub is None else cast(self.d_sub)
        function = function_of(self.case.op)
        run = prepare(self.case, lambda **kw: lambda: function(**kw, backend="reference"), inputs, d_out)
        found = results(self.case, run)
        if self.sample is None:
            return found
        return [t if self.letter in axes else None for t, axes in zip(found, self.axes)]

    def error(self, got: Sequence[Tensor]) -> float:
        """Largest error of the results, relative to their size; infinity for a NaN or a wrong shape."""
        if self.case.check is not None:
            error = self.case.check(self.inputs, self.d_out, got)
            return error if math.isfinite(error) else math.inf
        return self._compare([self._sampled(t, axes) for t, axes in zip(got, self.axes)])

    def _compare(self, got: Sequence[Tensor | None]) -> float:
        pairs = [(g, w) for g, w in zip(got, self.wanted) if w is not None]
        if any(g.shape != w.shape or special_values(g, w, nan_must_stay=True) for g, w in pairs):
            return math.inf
        return max(distance(g, w, norm) for (g, w), norm in zip(pairs, self.norms))

    def limit(self) -> float:
        """The largest error allowed: that of the tolerance table, or twice that of the formula in plain PyTorch."""
        dtype = self.case.torch_dtype
        limit = table(dtype, dtype)
        if self.case.check is not None or limit == table(torch.float64, torch.float64):
            return limit
        return max(limit, 2 * self._compare(self._reference(dtype)))
