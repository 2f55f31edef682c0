"""Turns the declaration of an op into torch operators, once per backend: schema, fake kernel, autograd, double
backward.

For op ``f`` and backend ``b`` there are the operators

- ``memkernels_b::f(args, params) -> results``,
- ``memkernels_b::f_backward(args, saved results, gradients of results, params, wants) -> gradients of args``,
- ``memkernels_b::f_(args, params)`` where the op has an in-place twin.

A backend only adds kernels to them. The derivative of ``f_backward`` is that of the reference formula, so every op is
twice differentiable on every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import spec
from .backends import BACKENDS, FEW, NAMES, note_kernels, requested, select
from .spec import Op

OPS: dict[str, Op] = {}
# A backend that is not here has no operators: defining them is most of the time that the import takes.
_libraries = {b: torch.library.Library(b.namespace, "DEF") for b in BACKENDS if b.missing() is None}
_recorded: dict[str, Callable[..., Any]] = {}  # qualified name -> the op as one node of the autograd graph
_plans: dict[tuple, Callable[..., Any]] = {}
_PLAN_LIMIT = 4096


def _tensor(name: str, optional: bool) -> str:
    return f"Tensor{'?' if optional else ''} {name}"


def _schemas(op: Op) -> tuple[str, str]:
    args = [_tensor(a.name, a.optional) for a in op.args]
    params = [f"{kind} {name}" for name, kind in op.params]
    saved = [_tensor(name, False) for name in op.saved]
    grads = [_tensor(f"d_{o.name}", True) for o in op.outputs if o.grad]
    results = ", ".join("Tensor" for _ in op.outputs)
    d_args = ", ".join("Tensor" for _ in op.differentiable)
    forward = f"({', '.join(args + params)}) -> ({results})"
    backward = f"({', '.join(args + saved + grads + params)}, bool[] wants) -> ({d_args})"
    return forward, backward


def register(op: Op) -> Op:
    """Define ``op`` for every backend that is here. Called once, at the foot of the op's module."""
    OPS[op.name] = op
    for backend, library in _libraries.items():
        _define(op, backend.namespace, library)
        for suffix in ("", "_backward", "_") if op.inplace else ("", "_backward"):
            note_kernels(f"{backend.namespace}::{op.name}{suffix}")
    return op


def _define(op: Op, namespace: str, library: torch.library.Library) -> None:
    forward, backward = _schemas(op)
    n, n_params = len(op.args), len(op.params)
    n_saved = len(op.saved)
    differentiable = [i for i, a in enumerate(op.args) if a.is_float]
    without_grad = [i for i, o in enumerate(op.outputs) if not o.grad]
    outputs_with_grad = [i for i, o in enumerate(op.outputs) if o.grad]
    saved = [next(i for i, o in enumerate(op.outputs) if o.name == name) for name in op.saved]

    library.define(f"{op.name}{forward}")
    library.define(f"{op.name}_backward{backward}")
    qualified = f"{namespace}::{op.name}"
    backward_op = getattr(getattr(torch.ops, namespace), f"{op.name}_backward").default

    def fake(*inputs):
        tensors = inputs[:n]
        layout = spec.check(op, tensors, inputs[n:])
        results = []
        for out in op.outputs:
            shape, dtype = layout.shape(op, out, tensors)
            results.append(tensors[0].new_empty(shape, dtype=dtype))
        return tuple(results) if len(results) != 1 else results[0]

    def fake_backward(*inputs):
        wants = inputs[-1]
        grads = [
            inputs[i].new_empty(inputs[i].shape if want and inputs[i] is not None else (0,))
            if inputs[i] is not None
            else inputs[0].new_empty((0,))
            for i, want in zip(differentiable, wants)
        ]
        return tuple(grads) if len(grads) != 1 else grads[0]

    def setup_context(ctx, inputs, output):
        output = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(False)
        if without_grad:
            ctx.mark_non_differentiable(*(output[i] for i in without_grad))
        ctx.params = inputs[n:]
        ctx.save_for_backward(*inputs[:n], *(output[i] for i in saved))

    def run_backward(ctx, *d_outputs):
        needs = ctx.needs_input_grad[len(ctx.needs_input_grad) - n - n_params :]  # Recorded has one input more
        wants = [bool(needs[i]) for i in differentiable]
        d_outputs = [d_outputs[i] for i in outputs_with_grad]
        result: list[Tensor | None] = [None] * (n + n_params)
        if not any(wants) or all(d is None for d in d_outputs):
            return tuple(result)
        inputs = (*ctx.saved_tensors, *d_outputs, *ctx.params, wants)
        grads = backward_op(*inputs) if torch.is_grad_enabled() else _below_autograd(backward_op, inputs)
        for i, grad, want in zip(differentiable, grads if isinstance(grads, (tuple, list)) else (grads,), wants):
            result[i] = grad if want else None
        return tuple(result)

    def setup_context_twice(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        n_grads = len(outputs_with_grad)
        ctx.params, ctx.wants = inputs[n + n_saved + n_grads : -1], inputs[-1]
        ctx.save_for_backward(*inputs[: n + n_saved + n_grads])

    def run_backward_twice(ctx, *dd):
        tensors = ctx.saved_tensors
        args, d_outputs = tensors[:n], tensors[n + n_saved :]
        formula = op.reference
        if op.selected is not None:  # the choice that was made: equal scores may rank either way
            chosen = tensors[n + op.saved.index("indices")]
            formula = functools.partial(_with_choice, op.selected, chosen)
        d_args, d_d_outputs = _second_derivative(
            op, formula, args, d_outputs, ctx.params, ctx.wants, dd, differentiable
        )
        return (*d_args, *([None] * n_saved), *d_d_outputs, *([None] * n_params), None)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, operator, *inputs):
            output = _below_autograd(operator, inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *d_outputs):
            return (None, *run_backward(ctx, *d_outputs))

    _recorded[qualified] = Recorded.apply

    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_fake(f"{qualified}_backward", fake_backward, lib=library)
    torch.library.register_autograd(qualified, run_backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(
        f"{qualified}_backward", run_backward_twice, setup_context=setup_context_twice, lib=library
    )
    if op.inplace:
        args = [("Tensor(a!) " + a.name) if a.name == op.inplace else _tensor(a.name, a.optional) for a in op.args]
        params = [f"{kind} {name}" for name, kind in op.params]
        others = [o for o in op.outputs if o.name != op.inplace]
        library.define(f"{op.name}_({', '.join(args + params)}) -> ({', '.join('Tensor' for _ in others)})")

        def fake_inplace(*inputs):
            results = fake(*inputs)
            results = [
                r for r, o in zip(results if isinstance(results, tuple) else (results,), op.outputs) if o in others
            ]
            if not results:
                return None
            return tuple(results) if len(results) != 1 else results[0]

        torch.library.register_fake(f"{qualified}_", fake_inplace, lib=library)


def _with_choice(selected, indices, *inputs):
    return selected(*inputs, indices)


def _second_derivative(op, formula, args, d_outputs, params, wants, dd, differentiable):
    """Differentiate the reference's own first derivative (``formula``); returns gradients of ``args`` and of
    ``d_outputs``."""
    with torch.enable_grad():
        args = [a if a is None else a.detach() for a in args]
        for i in differentiable:
            if args[i] is not None and args[i].is_floating_point():
                args[i].requires_grad_()
        d_outputs = [d if d is None else d.detach().requires_grad_() for d in d_outputs]
        results = formula(*args, *params)
        results = [r for r, o in zip(results, op.outputs) if o.grad]
        pairs = [(r, d) for r, d in zip(results, d_outputs) if d is not None and r.requires_grad]
        asked = [(i, g) for i, w, g in zip(differentiable, wants, dd) if w and g is not None]
        asked = [(i, g) for i, g in asked if args[i] is not None and args[i].requires_grad]
        if not asked or not pairs:
            return [None] * len(args), [None] * len(d_outputs)
        firsts = torch.autograd.grad(
            [r for r, _ in pairs],
            [args[i] for i, _ in asked],
            [d for _, d in pairs],
            create_graph=True,
            allow_unused=True,
        )
        live = [(f, g) for f, (_, g) in zip(firsts, asked) if f is not None and f.requires_grad]
        leaves = [args[i] for i in differentiable if args[i] is not None and args[i].requires_grad]
        leaves += [d for d in d_outputs if d is not None]
        if live:
            seconds = list(torch.autograd.grad([f for f, _ in live], leaves, [g for _, g in live], allow_unused=True))
        else:
            seconds = [None] * len(leaves)
    d_args: list[Tensor | None] = [None] * len(args)
    for i in differentiable:
        if args[i] is not None and args[i].requires_grad:
            d_args[i] = seconds.pop(0)
    return d_args, [seconds.pop(0) if d is not None else None for d in d_outputs]


def autocast(op: Op, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """``tensors`` in dtypes that fit each other, where autocast is on: what plain PyTorch would promote, ``op`` runs.

    Arguments that ``op`` names go to the dtype of autocast. A memory keeps its own: what is written follows it, and so
    do 16-bit queries or weights where the memory is not in float32. Contents that belong to tokens are promoted.
    """
    if not torch._C._is_any_autocast_enabled() or not all(t is None or isinstance(t, Tensor) for t in tensors):
        return tensors
    device = next((t.device.type for t in tensors if t is not None), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    floats = {a.name: t.dtype for a, t in zip(op.args, tensors) if t is not None and t.dtype in spec.FLOATS}
    lead = next((a.name for a in op.args if a.dtype == "lead"), None)
    if lead not in floats:
        return tensors  # the check of the call says what is wrong
    low, cast = torch.get_autocast_dtype(device), [name for name in op.autocast if floats.get(name) != torch.float64]
    dtype = low if lead in cast else floats[lead]
    contents = [a for a in op.args if a.dtype == "content" and a.name in floats and a.name not in cast]
    content = dtype
    if contents:
        content = floats[contents[0].name]
        if contents[0].side == "tokens":
            content = functools.reduce(torch.promote_types, [floats[a.name] for a in contents], dtype)
        if content not in (dtype, spec.stats_dtype(dtype)):
            dtype = content
    exact = spec.stats_dtype(dtype)
    wanted = {"lead": dtype, "same": dtype, "content": content, "stats": exact, "scale": exact, "mask": exact}
    result = []
    for arg, tensor in zip(op.args, tensors):
        if arg.name in floats:
            own = dtype if arg.name in cast and arg.dtype != "slots" else wanted.get(arg.dtype)
            if arg.dtype == "slots" and floats[arg.name] not in (dtype, exact):
                own = dtype
            tensor = tensor if own is None else tensor.to(own)
        result.append(tensor)
    return result


def _below_autograd(operator, inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def _eager(op: Op, operator: Callable[..., Any], recorded: Callable[..., Any], formula: Callable[..., Any]):
    """``operator`` without the autograd layer of torch.library, which in eager mode costs more than a small call.

    Transforms of torch.func and forward-mode derivatives, which that layer refuses or drops, are those of ``formula``.
    """
    n = len(op.args)

    def run(*inputs):
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return formula(*inputs)
        if torch.is_grad_enabled():
            for tensor in inputs[:n]:
                if tensor is not None and tensor.requires_grad:
                    return recorded(operator, *inputs)
        return _below_autograd(operator, inputs)

    return run


def _plan(op: Op, tensors: list[Tensor | None], name: str, inplace: bool) -> Callable[..., Any]:
    layout = spec.check(op, tensors)
    device = next(t.device.type for t in tensors if t is not None)
    few = device == "cuda" and bool(layout.tokens <= FEW)
    backend = select(op.name, device, layout.dtype, name, few)
    formula = _reference_inplace(op) if inplace else op.reference
    if backend is None:
        return formula
    operator = getattr(getattr(torch.ops, backend.namespace), op.name + ("_" if inplace else "")).default
    if torch.compiler.is_compiling():
        return operator
    return _eager(op, operator, _recorded[f"{backend.namespace}::{op.name}"], formula)


def _reference_inplace(op: Op) -> Callable[..., Any]:
    target = op.index(op.inplace)

    def run(*inputs):
        results = dict(zip((o.name for o in op.outputs), op.reference(*inputs)))
        inputs[target].copy_(results.pop(op.inplace))
        rest = tuple(results.values())
        return rest if len(rest) != 1 else rest[0]

    return run


def call(op: Op, tensors: list[Tensor | None], params: tuple, backend: str | None, inplace: bool = False):
    """Check a call, choose its backend and run it. Checks of shapes seen before are not repeated."""
    name = requested() if backend is None else backend
    if backend == "reference":
        spec.check_kinds(op, tensors)  # plain PyTorch computes with some tensors that no kernel takes
    try:
        if torch._C._is_any_autocast_enabled():
            tensors = autocast(op, tensors)
            device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
            with torch.autocast(device, enabled=False):  # a reference chooses its own dtypes
                return _run(op, tensors, params, name, inplace)
        return _run(op, tensors, params, name, inplace)
    except Exception as error:
        # Looked for here, so that a call that succeeds does not pay for it.
        if not isinstance(name, str):
            raise TypeError(f"backend must be one of {', '.join(NAMES)}, got {type(name).__name__}") from error
        if (sentence := spec.unusual(op, tensors)) is not None:
            raise TypeError(sentence) from error
        raise


def _run(op: Op, tensors: list[Tensor | None], params: tuple, name: str, inplace: bool):
    if torch.compiler.is_compiling():
        return _plan(op, tensors, name, inplace)(*tensors, *params)
    try:
        key = (op.name, name, inplace, *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        plan = _plans.get(key)
    except AttributeError:  # not tensors: the check says which
        key = plan = None
    if plan is None:
        plan = _plan(op, tensors, name, inplace)
        if len(_plans) >= _PLAN_LIMIT:
            _plans.clear()
        _plans[key] = plan
    if inplace:  # so that autograd notices when a tensor it saved was overwritten
        torch.autograd.graph.increment_version(tensors[op.index(op.inplace)])
    return plan(*tensors, *params)
