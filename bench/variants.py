"""The calls that are compared: the library's own, and how any of them goes forward or backward on one input set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import memkernels as mk
from memkernels import spec
from memkernels.backends import BACKENDS, FEW, requested, select
from memkernels.registration import OPS

from .case import Case


def own_backend(case: Case, device: str, sizes: Mapping[str, int]) -> tuple[str, str]:
    """The backend that runs the case, and an empty string; or an empty name and the reason why there is none."""
    wanted = requested()
    if wanted == "reference":
        return "reference", ""
    try:
        backend = select(case.op, device, case.torch_dtype, wanted, sizes.get("T", 1) <= FEW)
    except NotImplementedError as error:
        return "", str(error)
    candidates = BACKENDS if backend is None else (backend,)
    gaps = [b.gap(case.op, device, case.torch_dtype, case.direction) for b in candidates]
    if backend is None or gaps[0] is not None:
        return "", gaps[0]
    return backend.name, ""


def own_backends(case: Case, device: str) -> list[str | None]:
    """The backends of the library to time one after the other; None is the one that a call takes by itself."""
    if device == "cpu" or requested() != "auto":
        return [None]
    found = [b.name for b in BACKENDS if b.gap(case.op, device, case.torch_dtype, case.direction) is None]
    return found or [None]


def function_of(op: str) -> Callable:
    """The public function that runs ``op``; one over compressed slots has none of its own."""
    return getattr(mk, OPS[op].twin_of or op)


def own(case: Case) -> Callable:
    """Like a function of a peer: tensors and options in, the call to time out."""
    function = getattr(mk, f"{case.op}_") if case.in_place else function_of(case.op)
    return lambda **arguments: functools.partial(function, **arguments)


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The main result of an op."""
    return spec.several(result)[0]


def d_output(case: Case, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """A fixed gradient of the main result, where the case goes backward."""
    if case.direction == "forward":
        return None
    op = OPS[case.op]
    tensors = [inputs.get(arg.name) for arg in op.args]
    layout = spec.check(op, tensors, [case.options.get(name, 1.0) for name, _ in op.params])
    shape, dtype = layout.shape(op, op.outputs[0], tensors)
    device = next(iter(inputs.values())).device
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device=device).manual_seed(1))


def leaves(case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, requiring a gradient where the case wants one."""
    wanted = case.grads if case.needs_grad else ()
    return {name: t.detach().requires_grad_() if name in wanted else t for name, t in inputs.items()}


def prepare(case: Case, make_run: Callable, inputs: Mapping[str, Tensor], d_out: Tensor | None) -> Callable:
    """The call to time, on one input set: the forward alone, or the backward alone through a graph that is kept."""
    inputs = leaves(case, inputs)
    run = make_run(**inputs, **case.options)
    if case.direction == "forward":
        return run
    with torch.enable_grad():
        output = first(run())
    wanted = [inputs[name] for name in case.grads]
    return lambda: torch.autograd.grad(output, wanted, d_out, retain_graph=True)


def results(case: Case, call: Callable) -> list[Tensor]:
    """What one prepared call computes: the main result, or the gradients."""
    with torch.set_grad_enabled(case.autograd):
        result = call()
    return [t.detach() for t in result] if case.direction == "backward" else [first(result).detach()]
