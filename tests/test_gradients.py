"""First and second derivatives against finite differences, in float64, for every op on every backend."""

from __future__ import annotations

import pytest
import torch
from support import bits, operator, randn, subject
from torch.autograd import gradcheck, gradgradcheck

import memkernels as mk

B, T, N, K, V, k = 2, 4, 7, 3, 5, 3


def leaves(*tensors):
    return tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors)


def some(*shape: int):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3


def empty(mask):
    """A float mask in which some slots are empty, and all slots of the last stream."""
    holes = ~some(*mask.shape)
    holes[-1] = True
    return mask, holes


QUERY, KEYS, VALUES, WRITE = randn(B, T, K), randn(B, N, K, seed=1), randn(B, N, V, seed=2), randn(B, T, V, seed=3)
MASK, ERASE = randn(B, N, seed=4), torch.sigmoid(randn(B, T, V, seed=5))
WEIGHTS = torch.sigmoid(randn(B, T, N, seed=6))
LSE = torch.logsumexp(K**-0.5 * QUERY @ KEYS.mT + 0.1, -1)
INDICES = torch.tensor([[-1, 2, 2], [0, 6, 1], [3, 3, 3], [-1, -1, -1]])
SHARES = torch.sigmoid(randn(B, T, k, seed=7))
BOOL, TOKENS = some(B, N), some(B, T)

# name -> (function of the tensors, tensors)
CASES = {
    "address": (lambda b, q, x: mk.address(q, x, backend=b), (QUERY, KEYS)),
    "address, float mask": (lambda b, q, x, m: mk.address(q, x, slot_mask=m, backend=b), (QUERY, KEYS, MASK)),
    "address, sigmoid": (
        lambda b, q, x, m: mk.address(q, x, gate="sigmoid", slot_mask=m, backend=b),
        (QUERY, KEYS, MASK),
    ),
    "softmax_read": (lambda b, *x: mk.softmax_read(*x, return_lse=True, backend=b), (QUERY, KEYS, VALUES)),
    "softmax_read without lse": (lambda b, *x: mk.softmax_read(*x, backend=b), (QUERY, KEYS, VALUES)),
    "softmax_read, bool mask": (
        lambda b, *x: mk.softmax_read(*x, slot_mask=BOOL, return_lse=True, backend=b),
        (QUERY, KEYS, VALUES),
    ),
    "softmax_read, float mask": (
        lambda b, q, x, v, m: mk.softmax_read(q, x, v, slot_mask=m, scale=0.8, return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "softmax_read, empty slots": (
        lambda b, q, x, v, m: mk.softmax_read(q, x, v, slot_mask=m.masked_fill(empty(MASK)[1], -torch.inf), backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "softmax_read, shared memory": (
        lambda b, *x: mk.softmax_read(*x, return_lse=True, backend=b),
        (QUERY, KEYS[0], VALUES[:1]),
    ),
    "merge_reads": (
        lambda b, r, x: mk.merge_reads(r, x, backend=b),
        (randn(3, B, T, V), randn(3, B, T)),
    ),
    "merge_reads, an empty part": (
        lambda b, r, x: mk.merge_reads(r, torch.cat([x, torch.full((1, B, T), -torch.inf).double()]), backend=b),
        (randn(3, B, T, V), randn(2, B, T)),
    ),
    "slot_usage": (
        lambda b, q, x, s, m: mk.slot_usage(q, x, s, slot_mask=m, backend=b),
        (QUERY, KEYS, LSE, MASK),
    ),
    "slot_usage, shared memory": (lambda b, *x: mk.slot_usage(*x, slot_mask=BOOL[0], backend=b), (QUERY, KEYS[0], LSE)),
    "topk_search": (lambda b, q, x: mk.topk_search(q, x, k, backend=b)[0], (QUERY, KEYS)),
    "topk_search, float mask": (
        lambda b, q, x, m: mk.topk_search(q, x, k, slot_mask=m, backend=b)[0],
        (QUERY, KEYS, MASK),
    ),
    "topk_search, few open slots": (
        lambda b, q, x: torch.nan_to_num(mk.topk_search(q, x, 6, slot_mask=BOOL, backend=b)[0], neginf=0.0),
        (QUERY, KEYS),
    ),
    "topk_read": (lambda b, *x: mk.topk_read(*x, k, backend=b), (QUERY, KEYS, VALUES)),
    "topk_read with its weights": (
        lambda b, q, x, v, m: mk.topk_read(q, x, v, k, slot_mask=m, return_slots=True, backend=b)[::2],
        (QUERY, KEYS, VALUES, MASK),
    ),
    "topk_read, more than all": (
        lambda b, *x: mk.topk_read(*x, N + 2, slot_mask=BOOL, backend=b),
        (QUERY, KEYS, VALUES),
    ),
    "sparse_read": (
        lambda b, v, w: mk.sparse_read(v, INDICES.expand(B, T, k), w, backend=b),
        (VALUES, randn(B, T, k)),
    ),
    "sparse_read, shared memory": (
        lambda b, v, w: mk.sparse_read(v, INDICES, w, backend=b),
        (VALUES[0], randn(B, T, k)),
    ),
    "softmax_write": (
        lambda b, *x: mk.softmax_write(*x, return_retained=True, backend=b),
        (VALUES, KEYS, QUERY, WRITE),
    ),
    "softmax_write, erase 0": (lambda b, *x: mk.softmax_write(*x, erase=0.0, backend=b), (VALUES, KEYS, QUERY, WRITE)),
    "softmax_write, erase 0.5 and masks": (
        lambda b, v, x, q, w, m: mk.softmax_write(
            v, x, q, w, erase=0.5, slot_mask=m, token_mask=TOKENS, return_retained=True, backend=b
        ),
        (VALUES, KEYS, QUERY, WRITE, MASK),
    ),
    "softmax_write, empty slots": (
        lambda b, v, x, q, w, m: mk.softmax_write(
            v, x, q, w, slot_mask=m.masked_fill(empty(MASK)[1], -torch.inf), return_retained=True, backend=b
        ),
        (VALUES, KEYS, QUERY, WRITE, MASK),
    ),
    "softmax_write, erase tensor and all masks": (
        lambda b, v, x, q, w, e, m: mk.softmax_write(
            v, x, q, w, erase=e, slot_mask=m, token_mask=TOKENS, return_retained=True, backend=b
        ),
        (VALUES, KEYS, QUERY, WRITE, ERASE, MASK),
    ),
    "softmax_write, shared memory": (
        lambda b, *x: mk.softmax_write(*x, slot_mask=BOOL[0], return_retained=True, backend=b),
        (VALUES[0], KEYS[0], QUERY, WRITE),
    ),
    "sparse_write": (
        lambda b, v, a, w: mk.sparse_write(v, INDICES.expand(B, T, k), a, w, backend=b),
        (VALUES, SHARES, WRITE),
    ),
    "sparse_write, erase 0.5": (
        lambda b, v, a, w: mk.sparse_write(v, INDICES.expand(B, T, k), a, w, erase=0.5, backend=b),
        (VALUES, SHARES, WRITE),
    ),
    "sparse_write, erase tensor": (
        lambda b, v, a, w, e: mk.sparse_write(v, INDICES.expand(B, T, k), a, w, erase=e, backend=b),
        (VALUES, SHARES, WRITE, ERASE),
    ),
    "sparse_write, shared memory": (
        lambda b, v, a, w: mk.sparse_write(v, INDICES, a, w, backend=b),
        (VALUES[0], SHARES, WRITE),
    ),
    "sparse_write, shared weights": (
        lambda b, v, a, w: mk.sparse_write(v, INDICES.expand(B, T, k), a, w, backend=b),
        (VALUES, SHARES[0], WRITE),
    ),
    "slot_write": (lambda b, *x: mk.slot_write(*x, backend=b), (VALUES, WEIGHTS, WRITE)),
    "slot_write, erase 0.5 and a token mask": (
        lambda b, *x: mk.slot_write(*x, erase=0.5, token_mask=TOKENS, backend=b),
        (VALUES, WEIGHTS, WRITE),
    ),
    "slot_write, erase tensor": (
        lambda b, v, a, w, e: mk.slot_write(v, a, w, erase=e, token_mask=TOKENS, backend=b),
        (VALUES, WEIGHTS, WRITE, ERASE),
    ),
    "slot_write, shared memory": (lambda b, *x: mk.slot_write(*x, backend=b), (VALUES[0], WEIGHTS, WRITE)),
    "slot_write, shared weights": (lambda b, *x: mk.slot_write(*x, backend=b), (VALUES, WEIGHTS[0], WRITE)),
    "gated_write": (
        lambda b, *x: mk.gated_write(*x, return_retained=True, backend=b),
        (VALUES, KEYS, QUERY, WRITE),
    ),
    "gated_write, erase 0": (lambda b, *x: mk.gated_write(*x, erase=0.0, backend=b), (VALUES, KEYS, QUERY, WRITE)),
    "gated_write, erase 0.5": (
        lambda b, *x: mk.gated_write(*x, erase=0.5, return_retained=True, backend=b),
        (VALUES, KEYS, QUERY, WRITE),
    ),
    "gated_write, erase tensor": (
        lambda b, v, x, q, w, e: mk.gated_write(v, x, q, w, erase=e, return_retained=True, backend=b),
        (VALUES, KEYS, QUERY, WRITE, ERASE),
    ),
    "gated_write, all masks": (
        lambda b, v, x, q, w, e, m: mk.gated_write(
            v, x, q, w, erase=e, slot_mask=m, token_mask=TOKENS, return_retained=True, backend=b
        ),
        (VALUES, KEYS, QUERY, WRITE, ERASE, MASK),
    ),
    "gated_write, erase 1 and masks": (
        lambda b, v, x, q, w, m: mk.gated_write(
            v, x, q, w, slot_mask=m, token_mask=TOKENS, return_retained=True, backend=b
        ),
        (VALUES, KEYS, QUERY, WRITE, MASK),
    ),
    "gated_write, shared memory": (
        lambda b, *x: mk.gated_write(*x, slot_mask=BOOL[0], return_retained=True, backend=b),
        (VALUES[0], KEYS[0], QUERY, WRITE),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_first_derivative(backend, name):
    function, tensors = CASES[name]
    assert gradcheck(lambda *x: function(backend, *x), leaves(*tensors), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_second_derivative(backend, name):
    function, tensors = CASES[name]
    assert gradgradcheck(lambda *x: function(backend, *x), leaves(*tensors), atol=1e-6, rtol=1e-4)


def test_every_op_is_here():
    assert {name.split(",")[0].split(" ")[0] for name in CASES} == set(mk.registration.OPS)


@pytest.mark.parametrize("op", mk.registration.OPS)
def test_gradients_are_not_computed_where_none_is_wanted(native, op):
    """A frozen argument gets no gradient, and freezing it changes no other gradient."""
    s = subject(op, "usual", torch.float32)
    run = operator(native, op)

    def gradients(wanting):
        tensors = [t if t is None else t.clone() for t in s.inputs.tensors]
        for i in wanting:
            tensors[i].requires_grad_()
        results = run(*tensors, *s.inputs.params)
        results = results if isinstance(results, (tuple, list)) else (results,)
        sum(r.double().sum() for r in results if r.requires_grad).backward()
        return {i: None if tensors[i] is None else tensors[i].grad for i in range(len(tensors))}

    every = gradients(s.wanting)
    for i in s.wanting:
        one = gradients([i])
        assert bits(one[i]) == bits(every[i]), s.op.args[i].name
        assert all(g is None for j, g in one.items() if j != i)
