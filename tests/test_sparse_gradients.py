"""sparse_grad=True of reads: the dense gradient's rows, of the touched slots alone, to the second derivative."""

from __future__ import annotations

import re

import pytest
import torch
from support import close, randn

import memkernels as mk

N, T, K, V, k = 40, 6, 5, 7, 4
INDICES = torch.randint(-1, N, (2, T, k), generator=torch.Generator().manual_seed(0))
MASK = randn(N).masked_fill(torch.arange(N) % 5 == 0, -torch.inf)


def mixed(read, _, weights, lse):
    """A result that depends on all three."""
    return read * (weights.square().sum(-1) + lse.sin()).unsqueeze(-1)


READS = {
    "sparse_read": (
        lambda b, s, v, w: mk.sparse_read(v, INDICES, w, sparse_grad=s, backend=b),
        (randn(N, V), randn(2, T, k, seed=1)),
        (0,),
    ),
    "topk_read": (
        lambda b, s, q, x, v, m: mk.topk_read(q, x, v, k, slot_mask=m, sparse_grad=s, backend=b),
        (randn(2, T, K), randn(N, K, seed=1), randn(N, V, seed=2), MASK),
        (1, 2),
    ),
    "topk_read, lse": (
        lambda b, s, q, x, v: mk.topk_read(q, x, v, k, return_lse=True, sparse_grad=s, backend=b)[1].sin(),
        (randn(2, T, K), randn(N, K, seed=1), randn(N, V, seed=2)),
        (1, 2),
    ),
    "product_key_read": (
        lambda b, s, q, x, v: mk.product_key_read(q, x, v, k, sparse_grad=s, backend=b),
        (randn(2, T, 6), randn(2, 7, 3, seed=1), randn(49, V, seed=2)),
        (2,),
    ),
    "product_key_read, two heads": (
        lambda b, s, q, x, v: mk.product_key_read(q, x, v, k, sparse_grad=s, backend=b),
        (randn(2, T, 6), randn(2, 2, 5, 3, seed=1), randn(25, V, seed=2)),
        (2,),
    ),
    "product_key_read, read, weights and lse": (
        lambda b, s, q, x, v: mixed(
            *mk.product_key_read(q, x, v, k, return_slots=True, return_lse=True, sparse_grad=s, backend=b)
        ),
        (randn(2, T, 6), randn(2, 7, 3, seed=1), randn(49, V, seed=2)),
        (2,),
    ),
    "topk_read, slots": (
        lambda b, s, q, x, v: mk.topk_read(q, x, v, k, return_slots=True, sparse_grad=s, backend=b)[2].sin(),
        (randn(2, T, K), randn(N, K, seed=1), randn(N, V, seed=2)),
        (1, 2),
    ),
    "selected_scores": (
        lambda b, s, q, x: mk.selected_scores(q, x, INDICES.abs(), sparse_grad=s, backend=b),
        (randn(2, T, K), randn(N, K, seed=1)),
        (1,),
    ),
    "selected_read": (
        lambda b, s, q, x, v, m: mk.selected_read(q, x, v, INDICES, slot_mask=m, sparse_grad=s, backend=b),
        (randn(2, T, K), randn(N, K, seed=1), randn(N, V, seed=2), MASK),
        (1, 2),
    ),
}


def given(tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", READS)
def test_the_rows_of_the_dense_gradient(backend, name):
    run, tensors, tables = READS[name]
    dense, sparse = (given(tensors) for _ in range(2))
    results = [run(backend, s, *t) for s, t in ((False, dense), (True, sparse))]
    assert torch.equal(*results)
    cotangent = randn(*results[0].shape, seed=5).to(results[0].dtype)
    wanted, got = (torch.autograd.grad(r, t, cotangent, allow_unused=True) for r, t in zip(results, (dense, sparse)))
    for i, (a, b, t) in enumerate(zip(wanted, got, dense)):
        a = torch.zeros_like(t) if a is None else a  # of a result that does not depend on it
        if b is None:
            b = torch.zeros_like(t)
        else:
            assert (b.layout == torch.sparse_coo) == (i in tables)
        if b.layout == torch.sparse_coo:
            slots = b.indices()[0]
            assert b.is_coalesced() and torch.equal(slots, slots.unique()) and len(slots) < len(t)
            b = b.to_dense()
        close(b.double(), a.double(), 1e-13)


@pytest.mark.parametrize("name", READS)
def test_second_derivatives(backend, name):
    run, tensors, tables = READS[name]

    def twice(sparse: bool):
        leaves = given(tensors)
        result = run(backend, sparse, *leaves)
        some = [leaves[i] for i in tables]
        firsts = torch.autograd.grad(result.square().sum(), some, create_graph=True, allow_unused=True)
        firsts = [f.coalesce().to_dense() if sparse else f for f in firsts if f is not None]
        found = torch.autograd.grad(sum(f.square().sum() for f in firsts), leaves, allow_unused=True)
        return [torch.zeros_like(t) if x is None else x.to_dense() for x, t in zip(found, leaves)]

    for got, wanted in zip(twice(True), twice(False)):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize("name", ["sparse_read", "topk_read", "gather_rows"])
def test_compiled_code_breaks_its_graph_and_has_the_same_gradient(native, name):
    reads = {
        **READS,
        "gather_rows": (lambda b, s, v: mk.gather_rows(v, INDICES, sparse_grad=s, backend=b), (randn(N, V),)),
    }
    run, tensors = reads[name][:2]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: run(native, True, *x).sin(), backend="aot_eager")

    def gradients(function):
        leaves = given(tensors)
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    for got, wanted in zip(gradients(compiled), gradients(lambda *x: run(native, True, *x).sin())):
        assert got.layout == wanted.layout
        close(got.to_dense().double(), wanted.to_dense().double(), 1e-12)


def test_a_memory_of_many_slots_costs_what_it_touched(native):
    """A dense gradient would take 4 GiB; the table is one row, expanded."""
    table = torch.zeros(1, 64).expand(1 << 24, 64).requires_grad_()
    slots = torch.tensor([[0, (1 << 24) - 1, 5, -1]])
    mk.sparse_read(table, slots, torch.ones(1, 4), sparse_grad=True, backend=native).sum().backward()
    gradient = table.grad.coalesce()  # accumulating into .grad forgets that it is coalesced
    assert gradient.indices().tolist() == [[0, 5, (1 << 24) - 1]]
    assert torch.equal(gradient.values(), torch.ones(3, 64))


def test_what_is_refused(backend):
    tables = torch.zeros(2, N, V, requires_grad=True)
    weights = torch.zeros(2, T, k)
    sentence = r"sparse_read: values must be [N, V] with sparse_grad, got [2, 40, 7]"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        mk.sparse_read(tables, INDICES, weights, sparse_grad=True, backend=backend)
    with pytest.raises(TypeError, match="^sparse_read: sparse_grad must be a bool, got str$"):
        mk.sparse_read(tables[0], INDICES, weights, sparse_grad="yes", backend=backend)
    query, keys = torch.zeros(T, K).bfloat16(), torch.zeros(N, K).bfloat16().requires_grad_()
    sentence = "topk_read: scale must be a number with sparse_grad and 16-bit keys, got a tensor"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        mk.topk_read(query, keys, keys, k, scale=torch.ones(T), sparse_grad=True, backend=backend)
