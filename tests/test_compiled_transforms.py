"""Transforms of torch.func and forward mode, inside compiled code and around it: as in eager mode, for every op."""

from __future__ import annotations

import pytest
import torch
from support import close, randn
from test_gradients import CASES
from torch import func
from torch.autograd import forward_ad

import memkernels as mk
from memkernels.spec import several

OPS = [case for case in CASES if "," not in case]


def number(case: str, backend: str):
    """The op as a function from its first tensor to one number."""
    function, tensors = CASES[case]

    def run(x):
        found = several(function(backend, x, *tensors[1:]))
        return sum(r.square().sum() for r in found if r.is_floating_point())

    return run


def tangent(run, x):
    return func.jvp(run, (x,), (x.sin(),))[1]


TRANSFORMS = {
    "jvp": tangent,
    "grad": lambda run, x: func.grad(run)(x),
    "vjp": lambda run, x: func.vjp(run, x)[1](x.new_ones(()))[0],
    "vmap": lambda run, x: func.vmap(run)(torch.stack([x, x + 1])),
    "jacfwd": lambda run, x: func.jacfwd(run)(x),
    "jacrev": lambda run, x: func.jacrev(run)(x),
    "hessian": lambda run, x: func.hessian(run)(x),
}
# One forward-mode and one reverse-mode transform per op; the others, which do not depend on the op, for one op.
PLACES = [(t, case) for t in TRANSFORMS for case in OPS if t in ("jvp", "grad") or case == "softmax_read"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("transform, case", PLACES)
def test_a_transform_inside_compiled_code(native, transform, case):
    x, apply = CASES[case][1][0], TRANSFORMS[transform]
    compiled = torch.compile(lambda x: apply(number(case, native), x), fullgraph=True, backend="aot_eager")
    close(compiled(x), apply(number(case, "reference"), x), 1e-9)


def test_the_kernel_runs_again_beside_a_transform(native):
    """In one graph: the transformed call runs the formula, the other one the kernel."""
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def both(x):
        return func.grad(number("softmax_read", native))(x), number("softmax_read", native)(x)

    x = CASES["softmax_read"][1][0]
    for one, other in zip(torch.compile(both, fullgraph=True, backend=look)(x), both(x)):
        close(one, other)
    assert seen.count(f"memkernels_{native}.softmax_read.default") == 1


def test_forward_mode_inside_compiled_code(native):
    def run(x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(number("softmax_read", native)(dual)).tangent

    x = CASES["softmax_read"][1][0]
    close(
        torch.compile(run, backend="aot_eager")(x), func.jvp(number("softmax_read", "reference"), (x,), (x * 0 + 1,))[1]
    )


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_transform_around_compiled_code(native, transform):
    """Either right or an error of torch. The code was compiled before without the transform."""
    x, apply = CASES["softmax_read"][1][0], TRANSFORMS[transform]
    compiled = torch.compile(number("softmax_read", native), backend="aot_eager")
    compiled(x)
    try:
        got = apply(compiled, x)
    except Exception as error:
        pytest.skip(f"torch refuses it: {str(error)[:100]}")
    close(got, apply(number("softmax_read", "reference"), x))


def test_vmap_of_a_write_in_place_inside_compiled_code(native):
    values, weights, write = randn(3, 2, 7, 4), randn(3, 2, 5, 7), randn(3, 2, 5, 4)

    def step(values):
        return func.vmap(lambda v, a, w: mk.slot_write_(v, a, w, erase=0.5, backend=native))(values, weights, write)

    got = values.clone()
    torch.compile(step, fullgraph=True, backend="aot_eager")(got)
    close(got, mk.slot_write(values, weights, write, erase=0.5, backend="reference"))
