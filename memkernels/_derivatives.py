"""The derivatives of an op's operators: the first by its backward kernel, those after it by the reference formula.

For the formula ``y = f(x)`` the operator ``f_backward`` computes ``J(x)^T d_y``. To differentiate ``f_backward``,
autograd computes ``J(x)^T d_y`` again from the formula. That is plain PyTorch and has derivatives of any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .spec import Op, several


def _alias(x: Tensor | None) -> Tensor | None:
    """A view of ``x`` as a leaf of the inner gradient. Derivatives of that gradient pass through the view to ``x``."""
    if x is None or not x.is_floating_point():
        return x
    x = x.view_as(x)
    return x if x.requires_grad else x.requires_grad_()


class Derivatives:
    """The autograd formulas of one op on one backend. ``backward_op`` is its operator ``f_backward``.

    backward, setup_context: of the op. backward_twice, setup_context_twice: of ``f_backward``.
    """

    def __init__(self, op: Op, backward_op: Callable[..., Any]):
        self.op, self.backward_op = op, backward_op
        self.n, self.n_params, self.n_saved = len(op.args), len(op.params), len(op.saved)
        self.differentiable = [i for i, a in enumerate(op.args) if a.is_float]
        self.with_grad = [i for i, o in enumerate(op.outputs) if o.grad]
        self.without_grad = [i for i, o in enumerate(op.outputs) if not o.grad]
        names = [o.name for o in op.outputs]
        self.saved = [names.index(name) for name in op.saved]
        self.none = (None,) * (self.n + self.n_params)

    @functools.cached_property
    def below(self) -> Callable[..., Any]:
        return _torch.below_autograd(self.backward_op)

    def setup_context(self, ctx, inputs, output):
        output = several(output)
        ctx.set_materialize_grads(False)
        if self.without_grad:
            ctx.mark_non_differentiable(*[output[i] for i in self.without_grad])
        ctx.params = inputs[self.n :]
        ctx.save_for_backward(*inputs[: self.n], *[output[i] for i in self.saved])

    def backward(self, ctx, *d_outputs):
        needs = ctx.needs_input_grad
        first = len(needs) - len(self.none)  # Recorded has one input more
        wants = [needs[first + i] for i in self.differentiable]
        given = [d_outputs[i] for i in self.with_grad]
        if True not in wants or all(d is None for d in given):
            return self.none
        grads = self._first(ctx.saved_tensors, given, ctx.params, wants)
        result: list[Tensor | None] = [*self.none]
        for i, grad, want in zip(self.differentiable, grads, wants):
            if want:
                result[i] = grad
        return tuple(result)

    def _first(self, tensors, d_outputs, params, wants) -> Sequence[Tensor | None]:
        inputs = (*tensors, *d_outputs, *params, wants)
        if not _torch.HAS_PROBES:
            grads = self.backward_op(*inputs)
        elif _torch.forward_mode() or (torch.is_grad_enabled() and _torch.transforms_active()):
            # Forward mode or torch.func differentiates this gradient: neither kernel nor autograd layer supports that.
            return self.by_formula(tensors, d_outputs, params, wants)[2]
        elif torch.is_grad_enabled():
            grads = self.backward_op(*inputs)
        else:
            grads = self.below(*inputs)
        return several(grads)

    def setup_context_twice(self, ctx, inputs, output):
        ctx.set_materialize_grads(False)
        count = self.n + self.n_saved + len(self.with_grad)
        ctx.params, ctx.wants = inputs[count:-1], inputs[-1]
        ctx.save_for_backward(*inputs[:count])

    def backward_twice(self, ctx, *dd):
        create_graph = torch.is_grad_enabled()
        tensors, d_outputs = ctx.saved_tensors[: self.n + self.n_saved], ctx.saved_tensors[self.n + self.n_saved :]
        with torch.enable_grad():
            args, d_outputs, firsts = self.by_formula(tensors, d_outputs, ctx.params, ctx.wants)
            live = [(f, g) for f, g in zip(firsts, dd) if f is not None and g is not None and f.requires_grad]
            leaves = [x for x in (*args, *d_outputs) if x is not None and x.requires_grad]
            seconds: Sequence[Tensor | None] = [None] * len(leaves)
            if live:
                seconds = torch.autograd.grad(
                    [f for f, _ in live],
                    leaves,
                    [g for _, g in live],
                    create_graph=create_graph,
                    allow_unused=True,
                )
        by_leaf = {id(leaf): second for leaf, second in zip(leaves, seconds)}
        d_args, d_d_outputs = [[by_leaf.get(id(x)) for x in xs] for xs in (args, d_outputs)]
        return (*d_args, *([None] * self.n_saved), *d_d_outputs, *([None] * self.n_params), None)

    def by_formula(self, tensors, d_outputs, params, wants):
        """``(args, d_outputs, gradients of the differentiable args)``, the last in terms of the first two."""
        formula, selected, choice = self.op.reference, self.op.selected, self.op.choice
        # Equal scores may rank either way: differentiate the choice that the forward pass made.
        if selected is not None and choice is not None:
            chosen = tensors[self.n + self.op.saved.index(choice.name)]
            formula = functools.partial(_with_choice, selected, chosen)
        with torch.enable_grad():
            args = [_alias(x) if a.is_float else x for a, x in zip(self.op.args, tensors)]
            d_outputs = [_alias(d) for d in d_outputs]
            results = formula(*args, *params)
            with_grad = [results[i] for i in self.with_grad]
            pairs = [(r, d) for r, d in zip(with_grad, d_outputs) if d is not None and r.requires_grad]
            leaves = {
                place: x
                for place, (i, want) in enumerate(zip(self.differentiable, wants))
                if want and (x := args[i]) is not None and x.requires_grad
            }
            firsts: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs and leaves:
                firsts = torch.autograd.grad(
                    [r for r, _ in pairs],
                    list(leaves.values()),
                    [d for _, d in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
        by_place = dict(zip(leaves, firsts))
        return args, d_outputs, [by_place.get(place) for place in range(len(self.differentiable))]

    def recorded(self) -> Callable[..., Any]:
        """The op as one node of the autograd graph: called as ``(operator, *tensors, *params)``.

        Python is most of the time of a small training step, so these two functions say again in one frame what
        ``setup_context`` and ``backward`` say in several. That took a quarter of its own time off a step.
        """
        n, saved, without_grad, none = self.n, self.saved, self.without_grad, (None, *self.none)
        with_grad, backward_op = self.with_grad, self.below
        places = [1 + i for i in self.differentiable]  # among the inputs of Recorded; the operator is the first
        one_output, one_place = len(self.op.outputs) == 1, len(places) == 1
        grad_enabled, forward_mode = torch.is_grad_enabled, _torch.forward_mode
        derivatives = self

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx, operator, *inputs):
                output = operator(*inputs)
                outputs = (output,) if one_output else output
                ctx.set_materialize_grads(False)
                if without_grad:
                    ctx.mark_non_differentiable(*[outputs[i] for i in without_grad])
                ctx.params = inputs[n:]
                ctx.save_for_backward(*inputs[:n], *[outputs[i] for i in saved])
                return output

            @staticmethod
            def backward(ctx, *d_outputs):
                if grad_enabled() or forward_mode():
                    return (None, *derivatives.backward(ctx, *d_outputs))
                needs = ctx.needs_input_grad
                wants = [needs[place] for place in places]
                given = [d_outputs[i] for i in with_grad]
                if True not in wants or not [d for d in given if d is not None]:
                    return none
                grads = backward_op(*ctx.saved_tensors, *given, *ctx.params, wants)
                result = [*none]
                for place, grad, want in zip(places, (grads,) if one_place else grads, wants):
                    if want:
                        result[place] = grad
                return tuple(result)

        return _torch.node(Recorded)


def _with_choice(selected, indices, *inputs):
    return selected(*inputs, indices)
