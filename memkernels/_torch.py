"""Every use of undocumented PyTorch, each with a substitute for versions of torch that lack it.

Nothing else in the package names ``torch._...`` (tests/test_private_torch.py). ``make test-torch VERSION=2.10.0`` runs
the core of the tests under another torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

BelowAutograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
_functorch_active: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_has_kernel: Any = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)

# The numbers of c10::ScalarType, which files of saved tensors hold too; an operator takes them for its dtypes.
CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}

# Without these probes a call goes through the autograd layer of torch.library: slower, and an error under a transform.
HAS_PROBES = None not in (BelowAutograd, _functorch_active) and hasattr(forward_ad, "_current_level")


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function`` a constant to torch.compile: it runs while tracing, and only its result is in the graph.

    As torch.compiler.assume_constant_result does, which would import the compiler here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_graphs(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, where torch.compile traces behind a break of its graph.

    As a function decorated with torch.compiler.disable, which would import the compiler here.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(*arguments)
    return function(*arguments)


def bare(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``operator`` without the Python method around it, which takes 2% of the time of a small call."""
    return getattr(operator, "_op", operator)


def below_autograd(operator: Any) -> Callable[..., Any]:
    """``operator`` without its autograd layer, which in eager mode costs more than a small call.

    Its overload ``direct``, where the backend gives it a kernel, is the same without such a layer. It saves the context
    manager that shuts the layer out, a twentieth of a small call. Modes that watch operators see the operator itself.
    """
    below, modes, default = BelowAutograd, _modes, bare(operator)
    if below is None:
        return default
    packet = getattr(getattr(torch.ops, operator.namespace), operator.name().partition("::")[2])
    name, direct = f"{operator.name()}.direct", None
    has = modes is not None and "direct" in packet.overloads()
    if has and (has_kernel(name, "CPU") or has_kernel(name, "CUDA")):
        direct = bare(packet.direct)

    def run(*inputs):
        if direct is not None and not modes():
            return direct(*inputs)
        with below():
            return default(*inputs)

    return run


def node(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where no transform of torch.func is active: without looking for one, a fifth of its time."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def forward_mode() -> bool:
    """Is a level of forward-mode differentiation open? A tensor may then carry a tangent."""
    return forward_ad._current_level >= 0


def transforms_active() -> bool:
    """Is a transform of torch.func, or forward-mode differentiation, active?"""
    return _functorch_active() or forward_ad._current_level >= 0


# torch.compile enters the transforms that it traces, and guards on those around the call.
transforms_active_while_tracing = constant(lambda: HAS_PROBES and transforms_active())


def _any_autocast() -> bool:
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


# Is autocast on for any kind of device?
autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _any_autocast)


def has_kernel(qualified: str, key: str) -> bool:
    """Has the operator ``qualified`` (``"namespace::name"``) a kernel of its own for the dispatch key ``key``?"""
    if _has_kernel is not None:
        return _has_kernel(qualified, key)
    try:
        torch.library.get_kernel(qualified, key)
    except RuntimeError:
        return False
    return True


def known(condition: bool | torch.SymBool) -> bool:
    """``condition`` on sizes; False where a size depends on data, so that no guard is put on it."""
    if not torch.compiler.is_compiling() and isinstance(condition, bool):  # while compiling, a SymBool passes too
        return condition
    from torch.fx.experimental import symbolic_shapes

    if hasattr(symbolic_shapes, "guard_or_false"):
        return symbolic_shapes.guard_or_false(condition)
    return symbolic_shapes.statically_known_true(condition)


def is_dtensor(x: object) -> bool:
    """Is ``x`` a tensor over the ranks of a mesh? Asked by name: DTensor takes long to import."""
    return type(x).__name__ == "DTensor"


def local_part(x: Any) -> torch.Tensor:
    """The part of a DTensor on this rank. ``to_local`` makes a node of the graph, which takes longer than a look-up."""
    part = getattr(x, "_local_tensor", None)
    return x.to_local() if part is None else part


def _guard_tools():
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, CallFunctionNoArgsSource
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return GuardBuilder.EQUALS_MATCH, install_guard, AttrSource, CallFunctionNoArgsSource, InstructionTranslator


@constant
def can_guard() -> bool:
    """Can :func:`guarded` be used? Asked while torch.compile traces."""
    try:
        return all(_guard_tools())
    except (ImportError, AttributeError):
        return False


@constant
def guarded(module: str, function: str) -> str:
    """``function()`` of ``module`` while torch.compile traces, with a guard: another result recompiles the code."""
    equal, install_guard, attribute, called, translator = _guard_tools()
    source = called(attribute(translator.current_tx().import_source(module), function))
    install_guard(source.make_guard(equal))
    return getattr(importlib.import_module(module), function)()
