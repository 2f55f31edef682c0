"""The short path of eager calls behaves as the full dispatch for modes, transforms, hooks and subclasses."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support import NATIVE, close, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import memkernels as mk
from memkernels import _torch

QUERY, KEYS, VALUES = randn(2, 5, 8), randn(2, 9, 8), randn(2, 9, 6)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def wanted(*tensors):
    return mk.softmax_read(*tensors, backend="reference")


def test_fake_tensors_give_shapes_without_computing(native):
    mk.softmax_read(QUERY, KEYS, VALUES, backend=native)  # the plan of a call with these shapes is kept
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (QUERY, KEYS, VALUES)]
        read = mk.softmax_read(*fakes, backend=native)
    outside = mk.softmax_read(*fakes, backend=native)
    for found in (read, outside):
        assert type(found).__name__ == "FakeTensor" and found.shape == (2, 5, 6)


def test_a_dispatch_mode_sees_the_operator(native):
    with Seen() as seen:
        mk.softmax_read(QUERY, KEYS, VALUES, backend=native)
    assert f"memkernels_{native}.softmax_read.default" in seen.names


def test_a_plain_call_takes_the_overload_without_autograd(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def counted():
        entered.append(1)
        with torch._C._AutoDispatchBelowAutograd():
            yield

    monkeypatch.setattr(_torch, "BelowAutograd", counted)
    run = _torch.below_autograd(torch.ops.memkernels_cpu.softmax_read.default)
    inputs = (QUERY, KEYS, VALUES, None, None, 8**-0.5)
    close(run(*inputs)[0], wanted(QUERY, KEYS, VALUES))
    assert not entered
    with Seen():
        close(run(*inputs)[0], wanted(QUERY, KEYS, VALUES))
    assert entered


def test_a_subclass_meets_the_overload_without_autograd(native):
    """A subclass that unwraps is served, whichever overload it meets, also where no mode is on."""
    seen = []

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func).partition(".")[0])
            return func(*[x.inner if isinstance(x, Wrapped) else x for x in args], **(kwargs or {}))

    read = mk.softmax_read(Wrapped(QUERY), Wrapped(KEYS), Wrapped(VALUES), backend=native)
    assert seen == [f"memkernels_{native}"]
    close(read, wanted(QUERY, KEYS, VALUES))


def test_gradients_under_torch_func(backend):
    def loss(query):
        return mk.softmax_read(query, KEYS, VALUES, backend=backend).square().sum()

    close(torch.func.grad(loss)(QUERY), torch.func.grad(lambda q: wanted(q, KEYS, VALUES).square().sum())(QUERY))


def test_vmap(backend):
    def run(query):
        return mk.softmax_read(query, KEYS[0], VALUES[0], backend=backend)

    close(torch.func.vmap(run)(QUERY), wanted(QUERY, KEYS[0], VALUES[0]))


def test_forward_mode(backend):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(QUERY, torch.ones_like(QUERY))
        read = mk.softmax_read(dual, KEYS, VALUES, backend=backend)
        tangent = torch.autograd.forward_ad.unpack_dual(read).tangent
    exact = torch.func.jvp(lambda q: wanted(q, KEYS, VALUES), (QUERY,), (torch.ones_like(QUERY),))[1]
    assert tangent is not None
    close(tangent, exact)


def test_checkpointing_recomputes(backend):
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEYS, VALUES)]

    def run(*x):
        return mk.softmax_read(*x, backend=backend)

    again = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    for got, want in zip(*(torch.autograd.grad(r.square().sum(), leaves) for r in (again, run(*leaves)))):
        assert torch.equal(got, want)


def test_a_saved_tensor_that_was_overwritten_is_noticed(native):
    values, leaf = VALUES.clone(), QUERY.clone().requires_grad_()
    read = mk.softmax_read(leaf, KEYS, values, backend=native)
    with torch.no_grad():
        mk.gated_write_(values, KEYS, QUERY, randn(2, 5, 6), backend=native)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


def test_parameters_and_other_subclasses_of_tensor(native):
    keys = torch.nn.Parameter(KEYS)
    read = mk.softmax_read(QUERY, keys, VALUES, backend=native)
    assert read.requires_grad and type(read) is torch.Tensor
    close(read.detach(), wanted(QUERY, KEYS, VALUES))


def test_anomaly_mode_and_hooks(native):
    leaf, seen = QUERY.clone().requires_grad_(), []
    with torch.autograd.detect_anomaly(check_nan=True):
        read = mk.softmax_read(leaf, KEYS, VALUES, backend=native)
        read.register_hook(lambda g: seen.append(g))
        read.sum().backward()
    assert seen and leaf.grad is not None


def test_native_backends_are_here():
    assert NATIVE
