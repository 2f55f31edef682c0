"""Derivatives beyond the second, and those that mix modes: right on every backend, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from support import close, randn
from test_gradients import CASES, leaves
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import memkernels as mk
from memkernels.spec import several

QUERY, KEYS, VALUES = randn(2, 3, 4), randn(2, 5, 4, seed=1), randn(2, 5, 3, seed=2)


def results(function, backend, inputs):
    return [r for r in several(function(backend, *inputs)) if r.requires_grad]


def chain(function, backend, tensors, order: int):
    """The gradients of a number, of a number made of those gradients, and so on, ``order`` times."""
    inputs = leaves(*tensors)
    float_inputs = [x for x in inputs if x.requires_grad]
    current, every = results(function, backend, inputs), []
    for n in range(order):
        number = sum((randn(*x.shape, seed=n) * x.square()).sum() for x in current if x.requires_grad)
        if not isinstance(number, torch.Tensor):
            break
        current = torch.autograd.grad(number, float_inputs, create_graph=True, allow_unused=True)
        current = [torch.zeros_like(x) if g is None else g for g, x in zip(current, float_inputs)]
        every.append([g.detach() for g in current])
    return every


@pytest.mark.parametrize("case", CASES)
def test_fourth_derivatives_are_those_of_the_formula(native, case):
    function, tensors = CASES[case]
    got, wanted = (chain(function, b, tensors, 4) for b in (native, "reference"))
    assert len(got) == len(wanted) and len(got) > 1
    for ours, theirs in zip(got, wanted):
        for one, other in zip(ours, theirs):
            close(one, other, 1e-7)


def test_the_third_derivative_of_a_small_read(backend):
    """(read)^2 of two slots 0 and 1 is sigmoid(q)^2, whose derivatives have a closed form."""
    q = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    slots = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    y = mk.softmax_read(q, slots, slots, scale=1.0, backend=backend).square().sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y, q, create_graph=True)
    p = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    third = 8 * p**2 - 38 * p**3 + 54 * p**4 - 24 * p**5
    close(y.reshape(()), third)


def test_finite_differences_of_a_gradient_of_gradients(backend):
    def second(q, keys, values):
        read = mk.softmax_read(q, keys, values, backend=backend).square().sum()
        first = torch.autograd.grad(read, (q, keys, values), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, keys, values), create_graph=True)

    assert torch.autograd.gradcheck(second, leaves(QUERY[:1, :2], KEYS[:1, :3], VALUES[:1, :3, :2]))


def test_gradients_of_the_gradient_of_a_result(backend):
    """A vector-Jacobian product is linear in its vector; its derivative by the vector has derivatives of its own."""

    def run(name):
        q, v = QUERY.clone().requires_grad_(), randn(2, 3, 3, seed=5).requires_grad_()
        read = mk.softmax_read(q, KEYS, VALUES, backend=name)
        (first,) = torch.autograd.grad(read, q, v, create_graph=True)
        (by_v,) = torch.autograd.grad(first.square().sum(), v, create_graph=True)
        return torch.autograd.grad(by_v.pow(3).sum(), (q, v))

    for one, other in zip(run(backend), run("reference")):
        close(one, other)


def test_forward_over_reverse(backend):
    """A tangent through the gradient of a result recorded earlier, and through the input itself."""

    def outside(name):
        q = QUERY.clone().requires_grad_()
        read = mk.softmax_read(q, KEYS, VALUES, backend=name)
        with forward_ad.dual_level():
            d_read = forward_ad.make_dual(torch.ones_like(read), randn(*read.shape, seed=7))
            (first,) = torch.autograd.grad(read, q, d_read)
            return forward_ad.unpack_dual(first).tangent

    def inside(name):
        with forward_ad.dual_level():
            q = forward_ad.make_dual(QUERY.clone().requires_grad_(), randn(*QUERY.shape, seed=7))
            read = mk.softmax_read(q, KEYS, VALUES, backend=name)
            (first,) = torch.autograd.grad(read.square().sum(), q)
            return forward_ad.unpack_dual(first).tangent

    for run in (outside, inside):
        assert run(backend) is not None
        close(run(backend), run("reference"))


@pytest.mark.parametrize("case", [c for c in CASES if "," not in c])
def test_three_times_under_torch_func(case, native):
    function, tensors = CASES[case]

    def number(name):
        def run(x):
            found = several(function(name, x, *tensors[1:]))
            return sum(r.square().sum() for r in found if r.is_floating_point())

        return run

    def third(name):
        nested = number(name)
        for _ in range(2):
            once = torch.func.grad(nested)
            nested = lambda x, once=once: once(x).square().sum()  # noqa: E731
        return torch.func.grad(nested)(tensors[0])

    close(third(native), third("reference"), 1e-9)


@pytest.mark.parametrize("vectorize", [False, True])
def test_hessians_that_can_be_differentiated(backend, vectorize):
    def run(name):
        q = QUERY[:1].clone().requires_grad_()

        def loss(x):
            return mk.softmax_read(x, KEYS[:1], VALUES[:1], backend=name).square().sum()

        hessian = torch.autograd.functional.hessian(loss, q, create_graph=True, vectorize=vectorize)
        return hessian, *torch.autograd.grad(hessian.square().sum(), q)

    for one, other in zip(run(backend), run("reference")):
        close(one, other)


def test_checkpoints_and_hooks_keep_the_third_derivative(backend):
    seen = []

    def run(name, wrap):
        q = QUERY.clone().requires_grad_()
        q.register_hook(lambda g: seen.append(g.shape))
        read = wrap(lambda x: mk.softmax_read(x, KEYS, VALUES, backend=name), q)
        (first,) = torch.autograd.grad(read.square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
        return torch.autograd.grad(second.square().sum(), q)[0]

    def saved(function, x):
        with torch.autograd.graph.save_on_cpu():
            return function(x)

    wanted = run("reference", lambda function, x: function(x))
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False), saved):
        close(run(backend, wrap), wanted)
    assert len(seen) == 12


def test_a_gradient_through_a_memory_that_is_then_written_in_place(native):
    """The write is seen by autograd: a derivative of any order would be that of other values."""
    values = VALUES.clone().float()
    q = QUERY.float().requires_grad_()
    read = mk.softmax_read(q, KEYS.float(), values, backend=native)
    (first,) = torch.autograd.grad(read.square().sum(), q, create_graph=True)
    with torch.no_grad():
        mk.slot_write_(values, torch.rand(2, 1, 5), torch.rand(2, 1, 3), backend=native)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.square().sum(), q)
