"""Indices of every op may be int32: the same bits as with int64, results, gradients and under torch.compile."""

from __future__ import annotations

import pytest
import torch
from support import CASE, bits, has

from memkernels.registration import OPS, call
from memkernels.spec import several
from memkernels.testing import Subject

FULL = CASE["map, history, packed and ignored"]
INDEXED = [op for op in OPS.values() if any(a.dtype == "index" for a in op.args)]


def small(op, tensors: list) -> list[int]:
    """The arguments whose numbers int32 holds."""
    found = [i for i, a in enumerate(op.args) if a.dtype == "index" and tensors[i] is not None]
    return [i for i in found if bool((tensors[i].int() == tensors[i]).all())]


@pytest.mark.parametrize("op", INDEXED, ids=lambda op: op.name)
def test_int32_gives_the_bits_of_int64(backend, op):
    if not all(has(op.name, backend, d) for d in op.directions):
        pytest.skip("no kernel")
    s = Subject(op, FULL if FULL.fits(op) else CASE["usual"], torch.float32, "cpu")
    narrow = small(op, s.inputs.tensors)
    assert narrow

    def results(tensors: list) -> list[bytes]:
        tensors = [t if t is None else t.detach().clone() for t in tensors]
        leaves = [tensors[i].requires_grad_() for i in s.wanting]
        found = several(call(op, tensors, tuple(s.inputs.params), backend))
        assert all(r.dtype != torch.int32 for r in found)
        pairs = [(found[i], d) for i, d in s.cotangents(list(found)).items()]
        gradients = torch.autograd.grad([r for r, _ in pairs], leaves, [d for _, d in pairs]) if leaves else ()
        return [bits(x) for x in (*found, *gradients)]

    wide = list(s.inputs.tensors)
    every = [t.int() if i in narrow else t for i, t in enumerate(wide)]
    assert results(every) == results(wide)
    for one in narrow:
        assert results([t.int() if i == one else t for i, t in enumerate(wide)]) == results(wide)


@pytest.mark.parametrize("name", ["sparse_read", "cache_nll", "ngram_slots"])
def test_compiled(native, name):
    op = OPS[name]
    s = Subject(op, CASE["usual"], torch.float32, "cpu")
    tensors = [t.int() if i in small(op, s.inputs.tensors) else t for i, t in enumerate(s.inputs.tensors)]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: call(op, list(x), tuple(s.inputs.params), native), fullgraph=True, backend="aot_eager"
    )
    wanted = several(call(op, list(s.inputs.tensors), tuple(s.inputs.params), native))
    assert [bits(x) for x in several(compiled(*tensors))] == [bits(x) for x in wanted]
