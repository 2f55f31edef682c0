"""Turns the declaration of an op into torch operators, once per backend: schemas, fake kernels, derivatives.

For op ``f`` and backend ``b`` there are the operators

- ``memkernels_b::f(args, params) -> results``,
- ``memkernels_b::f_backward(args, saved results, gradients of results, params, wants) -> gradients of args``,
- ``memkernels_b::f_(args, params)`` where the op has an in-place twin.

A backend only adds kernels to them. The derivative of ``f_backward`` is that of the reference formula, in plain
PyTorch (``_derivatives.py``), so every op has derivatives of any order on every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _torch, spec
from ._derivatives import Derivatives
from ._flops import count_operator
from .backends import BACKENDS, FEW, NAMES, Backend, note_kernels, requested, select
from .spec import Op, bare, several

OPS: dict[str, Op] = {}
# Only available backends get operators, because defining them takes most of the import time.
_libraries = {b: torch.library.Library(b.namespace, "DEF") for b in BACKENDS if b.missing() is None}
_recorded: dict[str, Callable[..., Any]] = {}  # qualified name -> the op as one node of the autograd graph
_plans: dict[tuple, Callable[..., Any]] = {}
_PLAN_LIMIT = 4096


def _tensor(name: str, optional: bool) -> str:
    return f"Tensor{'?' if optional else ''} {name}"


def _schemas(op: Op) -> dict[str, str]:
    """Suffix of an operator's name -> its schema: ``""``, and ``"_backward"`` and ``"_"`` where ``op`` has those."""
    args = [_tensor(a.name, a.optional) for a in op.args]
    params = [f"{kind} {name}" for name, kind in op.params]
    saved = [_tensor(name, False) for name in op.saved]
    grads = [_tensor(f"d_{o.name}", True) for o in op.outputs if o.grad]
    schemas = {"": _schema(args + params, len(op.outputs))}
    if op.differentiable:
        schemas["_backward"] = _schema([*args, *saved, *grads, *params, "bool[] wants"], len(op.differentiable))
    if op.inplace:
        args[op.index(op.inplace)] = f"Tensor(a!) {op.inplace}"
        schemas["_"] = _schema(args + params, len(op.outputs) - 1)
    return schemas


def _schema(inputs: list[str], results: int) -> str:
    return f"({', '.join(inputs)}) -> ({', '.join(['Tensor'] * results)})"


def register(op: Op) -> Op:
    """Define ``op`` for every available backend. Each op's module calls it once."""
    OPS[op.name] = op
    for backend, library in _libraries.items():
        _define(op, backend.namespace, library)
        for suffix in op.suffixes:
            note_kernels(f"{backend.namespace}::{op.name}{suffix}")
            count_operator(op, backend.namespace, suffix)
    return op


def _define(op: Op, namespace: str, library: torch.library.Library) -> None:
    """The operators of ``op`` in one namespace."""
    qualified = f"{namespace}::{op.name}"
    _define_schemas(op, library)
    _define_fakes(op, qualified, library)
    _define_derivatives(op, qualified, library)


def _define_schemas(op: Op, library: torch.library.Library) -> None:
    for suffix, schema in _schemas(op).items():
        library.define(f"{op.name}{suffix}{schema}")
        if suffix in _recorded_suffixes(op):
            library.define(f"{op.name}{suffix}.direct{schema}")


def _define_fakes(op: Op, qualified: str, library: torch.library.Library) -> None:
    """Shapes and dtypes of the results of each operator."""
    fakes = {"": _fake, "_backward": _fake_backward, "_": _fake_inplace}
    for suffix in op.suffixes:
        fake = fakes[suffix](op)
        torch.library.register_fake(qualified + suffix, fake, lib=library)
        if suffix in _recorded_suffixes(op):
            torch.library.register_fake(f"{qualified}{suffix}.direct", fake, lib=library)


def _define_derivatives(op: Op, qualified: str, library: torch.library.Library) -> None:
    if not op.differentiable:
        return
    namespace, name = qualified.split("::")
    derivatives = Derivatives(op, getattr(getattr(torch.ops, namespace), f"{name}_backward").default)
    _recorded[qualified] = derivatives.recorded()
    once, twice = derivatives.setup_context, derivatives.setup_context_twice
    torch.library.register_autograd(qualified, derivatives.backward, setup_context=once, lib=library)
    torch.library.register_autograd(
        f"{qualified}_backward", derivatives.backward_twice, setup_context=twice, lib=library
    )


def _recorded_suffixes(op: Op) -> tuple[str, ...]:
    """The operators that get an autograd layer, and an overload ``direct`` without it (``_torch.below_autograd``)."""
    return ("", "_backward") if op.differentiable else ()


def _fake(op: Op) -> Callable[..., Any]:
    n = len(op.args)

    def fake(*inputs):
        tensors = inputs[:n]
        layout = spec.check(op, tensors, inputs[n:])
        shapes = [layout.shape(op, out, tensors) for out in op.outputs]
        return bare([tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes])

    return fake


def _fake_inplace(op: Op) -> Callable[..., Any]:
    fake = _fake(op)

    def fake_inplace(*inputs):
        return bare([r for r, o in zip(several(fake(*inputs)), op.outputs) if o.name != op.inplace])

    return fake_inplace


def _fake_backward(op: Op) -> Callable[..., Any]:
    differentiable = [i for i, a in enumerate(op.args) if a.is_float]

    def fake_backward(*inputs):
        args = [inputs[i] for i in differentiable]
        return bare(
            [
                inputs[0].new_empty((0,)) if x is None else x.new_empty(x.shape if want else (0,))
                for x, want in zip(args, inputs[-1])
            ]
        )

    return fake_backward


def autocast(op: Op, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """``tensors``, where autocast is on, in dtypes that fit each other: mixtures that plain PyTorch promotes must run.

    Arguments that ``op.autocast`` names are cast to the dtype of autocast. A memory keeps its dtype. What is written is
    cast to it, and so are the queries or weights where it is neither theirs nor float32. Contents that belong to tokens
    are promoted.
    """
    if not _torch.autocast_enabled() or not all(t is None or isinstance(t, Tensor) for t in tensors):
        return tensors
    device = next((t.device.type for t in tensors if t is not None), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    floats = {a.name: t.dtype for a, t in zip(op.args, tensors) if t is not None and t.dtype in spec.FLOATS}
    lead = next((a.name for a in op.args if a.dtype == "lead"), None)
    if lead not in floats:
        return tensors  # the check of the call raises
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
        if tensor is not None and arg.name in floats:
            own = dtype if arg.name in cast and arg.dtype != "slots" else wanted.get(arg.dtype)
            if arg.dtype == "slots" and floats[arg.name] not in (dtype, exact):
                own = dtype
            tensor = tensor if own is None else tensor.to(own)
        result.append(tensor)
    return result


def _eager(
    op: Op,
    operator: Callable[..., Any],
    differentiable: Callable[..., Any],
    formula: Callable[..., Any],
):
    """``operator`` without the autograd layer of torch.library, which in eager mode costs more than a small call.

    Under transforms of torch.func and forward-mode differentiation, which that layer refuses or ignores, ``formula``
    runs. ``differentiable`` runs a call that needs a gradient.
    """
    if not _torch.HAS_PROBES:
        return operator
    n = len(op.args)
    transforms_active = _torch.transforms_active
    operator = _torch.below_autograd(operator)
    if op.typed is not None:
        operator = _coded(operator, n + op.typed)

    def run(*inputs):
        if transforms_active():
            return formula(*inputs)
        if torch.is_grad_enabled():
            for tensor in inputs[:n]:
                if tensor is not None and tensor.requires_grad:
                    return differentiable(*inputs)
        return operator(*inputs)

    return run


def _coded(operator: Callable[..., Any], place: int) -> Callable[..., Any]:
    """``operator``, given the dtype at ``place`` as its number: a dtype is searched for overridden functions first,
    which takes 0.7 us."""
    codes = _torch.CODES
    return lambda *inputs: operator(*inputs[:place], codes[inputs[place]], *inputs[place + 1 :])


def _plan(op: Op, tensors: list[Tensor | None], params: tuple, name: str, inplace: bool) -> Callable[..., Any]:
    """What runs calls with tensors like these. Indices and ranges may be int32; kernels take int64."""
    if any(map(_torch.is_dtensor, tensors)):
        return _sharded(op, tensors, params, name, inplace)
    narrow = [
        i
        for i, (arg, t) in enumerate(zip(op.args, tensors))
        if arg.dtype in spec.INTEGERS and isinstance(t, Tensor) and t.dtype == torch.int32
    ]
    if not narrow:
        return _plan_of_kernels(op, tensors, params, name, inplace)

    def widened(inputs):
        return [x.long() if i in narrow else x for i, x in enumerate(inputs)]

    plan = _plan_of_kernels(op, widened(tensors), params, name, inplace)
    return lambda *inputs: plan(*widened(inputs))


def _sharded(op: Op, tensors: list, params: tuple, name: str, inplace: bool) -> Callable[..., Any]:
    from . import sharding  # at the first DTensor, because it imports torch.distributed.tensor

    return sharding.plan(sharding.Call(op, name, inplace, _run, OPS), tensors, params)


def _plan_of_kernels(
    op: Op, tensors: list[Tensor | None], params: tuple, name: str, inplace: bool
) -> Callable[..., Any]:
    layout = spec.check(op, tensors, () if op.typed is None else params)
    device = next(t.device.type for t in tensors if t is not None)
    few = device == "cuda" and _torch.known(layout.tokens <= FEW)
    formula = _reference_inplace(op) if inplace else op.formula

    def chosen(direction: str) -> Backend | None:
        return select(op.name, device, layout.dtype, name, few, direction)

    if torch.compiler.is_compiling():
        if _torch.transforms_active_while_tracing():
            return formula
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        backend = chosen("in-place" if inplace else "backward" if recorded else "forward")
        return formula if backend is None else _operator(op, backend, inplace)
    backend = chosen("in-place" if inplace else "forward")
    if backend is None:
        return formula
    differentiable = formula if inplace or not op.differentiable else _differentiable(op, chosen)
    return _eager(op, _operator(op, backend, inplace), differentiable, formula)


def _operator(op: Op, backend: Backend, inplace: bool) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, backend.namespace), op.name + ("_" if inplace else "")).default


def _differentiable(op: Op, chosen: Callable[[str], Backend | None]) -> Callable[..., Any]:
    """What runs a call that needs a gradient: a backend may have the forward kernel and lack the backward one."""
    try:
        backend = chosen("backward")
    except NotImplementedError as error:
        why = str(error)

        def refuse(*inputs):
            raise NotImplementedError(why)

        return refuse
    if backend is None:
        return op.formula
    operator = _torch.below_autograd(_operator(op, backend, False))
    return functools.partial(_recorded[f"{backend.namespace}::{op.name}"], operator)


def resolved(backend: str | None) -> str:
    """The backend that a call names, or the one that calls without a name get now."""
    return requested() if backend is None else backend


def backward_kernel(op: Op, like: Tensor, backend: str) -> Callable[..., Any] | None:
    """The operator ``<op>_backward`` that serves calls of the dtype of ``like``, None where it is the formula's."""
    kernels = select(op.name, like.device.type, like.dtype, backend, direction="backward")
    return None if kernels is None else getattr(getattr(torch.ops, kernels.namespace), f"{op.name}_backward").default


def first_derivative(op: Op, tensors: list, d_outputs: list, params: tuple, wants: list[bool]) -> list[Tensor | None]:
    """Gradients of the differentiable arguments by the formula; ``tensors``: arguments, then saved results."""
    return Derivatives(op, op.formula).by_formula(tensors, d_outputs, params, wants)[2]


def _reference_inplace(op: Op) -> Callable[..., Any]:
    target = op.index(op.inplace)

    def run(*inputs):
        results = dict(zip((o.name for o in op.outputs), op.reference(*inputs)))
        inputs[target].copy_(results.pop(op.args[target].name))
        return bare(tuple(results.values()))

    return run


def call(op: Op, tensors: list[Tensor | None], params: tuple, backend: str | None, inplace: bool = False):
    """Check a call, choose its backend and run it. Checks of shapes seen before are not repeated."""
    name = requested() if backend is None else backend
    if backend == "reference":
        spec.check_kinds(op, tensors)  # plain PyTorch computes with some tensors that no kernel takes
    try:
        if _torch.autocast_enabled():
            tensors = autocast(op, tensors)
            device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
            with torch.autocast(device, enabled=False):  # a reference chooses its own dtypes
                return _run(op, tensors, params, name, inplace)
        return _run(op, tensors, params, name, inplace)
    except Exception as error:
        # Checked after a failure only, so that a call that succeeds does not pay for it.
        if not isinstance(name, str):
            raise TypeError(f"backend must be one of {', '.join(NAMES)}, got {type(name).__name__}") from error
        if (sentence := spec.unusual(op, tensors)) is not None:
            raise TypeError(sentence) from error
        raise


def _run(op: Op, tensors: list[Tensor | None], params: tuple, name: str, inplace: bool):
    if torch.compiler.is_compiling():
        return _plan(op, tensors, params, name, inplace)(*tensors, *params)
    key: tuple | None
    try:
        # `is_cpu` where that is all there is to say: a device is slower to make, hash and compare.
        shapes = [None if t is None else (type(t), t.shape, t.dtype, t.is_cpu or t.device) for t in tensors]
        key = (op.name, name, inplace, None if op.typed is None else params[op.typed], *shapes)
        plan = _plans.get(key)
    except (AttributeError, TypeError):  # not tensors: the check says which; or symbolic sizes, which have no hash
        key = plan = None
    if plan is None:
        plan = _plan(op, tensors, params, name, inplace)
        if len(_plans) >= _PLAN_LIMIT:
            _plans.clear()
        if key is not None:
            _plans[key] = plan
    if inplace:  # so that autograd notices when a tensor it saved was overwritten
        torch.autograd.graph.increment_version(tensors[op.index(op.inplace)])  # type: ignore[arg-type]
    return plan(*tensors, *params)
