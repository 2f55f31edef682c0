"""First and second derivatives against finite differences, in float64, for every op on every backend."""

from __future__ import annotations

import pytest
import torch
from promised import PROMISED
from support import READY, bits, operator, randn, subject
from torch.autograd import gradcheck, gradgradcheck

import memkernels as mk
from memkernels.registration import OPS
from memkernels.spec import several

B, T, N, K, V, k = 2, 4, 7, 3, 5, 3


def leaves(*tensors):
    return tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors)


def some(*shape: int):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3


def empty(mask):
    """A float mask with some empty slots; all slots of the last stream are empty."""
    holes = ~some(*mask.shape)
    holes[-1] = True
    return mask, holes


QUERY, KEYS, VALUES, WRITE = randn(B, T, K), randn(B, N, K, seed=1), randn(B, N, V, seed=2), randn(B, T, V, seed=3)
MASK, ERASE = randn(B, N, seed=4), torch.sigmoid(randn(B, T, V, seed=5))
WEIGHTS = torch.sigmoid(randn(B, T, N, seed=6))
LSE = torch.logsumexp(K**-0.5 * QUERY @ KEYS.mT + 0.1, -1)
INDICES = torch.tensor([[-1, 2, 2], [0, 6, 1], [3, 3, 3], [-1, -1, -1]])
NAMED = torch.tensor([[-1, 2, 2], [0, 6, 1], [3, 3, 3], [5, -1, 4]])
HEADS = randn(B, T, 2, K, seed=18)
SHARES = torch.sigmoid(randn(B, T, k, seed=7))
KEYS8, VALUES8 = (20 * KEYS).to(torch.int8), (20 * VALUES).to(torch.float8_e4m3fn)
ROW = torch.rand(B, N, generator=torch.Generator().manual_seed(8), dtype=torch.float64) / 10
BOOL, TOKENS = some(B, N), some(B, T)
FORGET, INPUTS = torch.sigmoid(randn(B, T, V, seed=8)), randn(B, T, 3 * V, seed=9)
WEIGHT, INITIAL = 0.5 * randn(3 * V, V, seed=10), randn(B, V, seed=11)
SCAN = (VALUES, KEYS, QUERY, randn(B, T, K, seed=12), WRITE)

VECTOR, SUBKEYS, TABLE = randn(K, seed=8), randn(2, 4, 2, seed=9), randn(16, V, seed=13)
TABLE8, ROW8 = (20 * TABLE).to(torch.int8), randn(16, seed=14).abs()
LOGITS, CACHE, MIX = randn(B, T, 6, seed=10), randn(B, T, N, seed=11), torch.sigmoid(randn(B, T, seed=12))
PAGED, PAGES, FOUND = randn(B, 3, 2, K, seed=14), torch.tensor([4, -1, 2]), 100 + torch.arange(k).expand(T, k)
WORDS = torch.randint(-1, 6, (B, T, N), generator=torch.Generator().manual_seed(4))
TARGETS = torch.tensor([[5, 1, 0, 2], [-1, 3, 3, 4]])

# name -> (function of the tensors, tensors)
CASES = {
    "address": (lambda b, q, x: mk.address(q, x, backend=b), (QUERY, KEYS)),
    "address, float mask": (lambda b, q, x, m: mk.address(q, x, slot_mask=m, backend=b), (QUERY, KEYS, MASK)),
    "address, sigmoid": (
        lambda b, q, x, m: mk.address(q, x, gate="sigmoid", slot_mask=m, backend=b),
        (QUERY, KEYS, MASK),
    ),
    "additive_read": (
        lambda b, *x: mk.additive_read(*x, return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, VECTOR),
    ),
    "additive_read, empty slots": (
        lambda b, q, x, v, u, m: mk.additive_read(
            q, x, v, u, slot_mask=m.masked_fill(empty(MASK)[1], -torch.inf), backend=b
        ),
        (QUERY, KEYS, VALUES, VECTOR.expand(B, K), MASK),
    ),
    "additive_read, shared memory": (
        lambda b, *x: mk.additive_read(*x, slot_mask=BOOL[0], return_lse=True, backend=b),
        (QUERY, KEYS[0], VALUES[:1], VECTOR),
    ),
    "cache_logprobs": (
        lambda b, z, c, m: mk.cache_logprobs(z, c, WORDS, m, backend=b),
        (LOGITS, CACHE, MIX),
    ),
    "cache_logprobs, empty entries and a shared mix": (
        lambda b, z, c: mk.cache_logprobs(z, c.masked_fill(empty(CACHE)[1], -torch.inf), WORDS, 0.3, backend=b),
        (LOGITS, CACHE),
    ),
    "cache_nll": (
        lambda b, z, c, m: mk.cache_nll(z, TARGETS, c, WORDS, m, backend=b),
        (LOGITS, CACHE, MIX),
    ),
    "cache_nll, shared logits and cache": (
        lambda b, z, c, m: mk.cache_nll(z, TARGETS, c, WORDS[0], m, backend=b),
        (LOGITS[0], CACHE[:1], MIX),
    ),
    "paged_topk_search": (
        lambda b, q, x: mk.paged_topk_search(q, x, PAGES, k, backend=b)[0],
        (QUERY, PAGED),
    ),
    "paged_topk_search, float mask and what was found before": (
        lambda b, q, x, m, s: mk.paged_topk_search(
            q, x, PAGES, k, slot_mask=m, best_scores=s, best_slots=FOUND, backend=b
        )[0],
        (QUERY, PAGED, randn(B, 3, 2, seed=15), randn(B, T, k, seed=16)),
    ),
    "product_key_search": (
        lambda b, q, x: mk.product_key_search(q, x, k, backend=b)[0],
        (randn(B, T, 4), SUBKEYS),
    ),
    "product_key_search, every pair": (
        lambda b, q, x: mk.product_key_search(q, x, 16, scale=0.7, backend=b)[0],
        (randn(B, T, 4), randn(B, 2, 4, 2)),
    ),
    "product_key_read": (
        lambda b, *x: mk.product_key_read(*x, k, backend=b),
        (randn(B, T, 4), SUBKEYS, TABLE),
    ),
    "product_key_read with its weights": (
        lambda b, *x: mk.product_key_read(*x, k, scale=0.7, return_slots=True, backend=b)[::2],
        (randn(B, T, 4), randn(B, 2, 4, 2), TABLE),
    ),
    "product_key_read with its lse": (
        lambda b, *x: mk.product_key_read(*x, k, return_lse=True, backend=b),
        (randn(B, T, 4), SUBKEYS, TABLE),
    ),
    "product_key_read, every pair": (
        lambda b, *x: mk.product_key_read(*x, 20, backend=b),
        (randn(B, T, 4), SUBKEYS, TABLE.expand(B, -1, -1)),
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
    "selected_scores": (
        lambda b, q, x: torch.nan_to_num(mk.selected_scores(q, x, INDICES, backend=b), neginf=0.0),
        (QUERY, KEYS),
    ),
    "selected_read": (
        lambda b, *x: mk.selected_read(*x, NAMED, return_weights=True, return_lse=True, backend=b),
        (QUERY, KEYS, VALUES),
    ),
    "selected_read, empty slots": (
        lambda b, q, x, v, m: mk.selected_read(
            q, x, v, INDICES, slot_mask=m.masked_fill(empty(MASK)[1], -torch.inf), backend=b
        ),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "selected_read, shared memory": (
        lambda b, *x: mk.selected_read(*x, INDICES, scale=0.7, backend=b),
        (QUERY, KEYS[0], VALUES[:1]),
    ),
    "indexer_search": (
        lambda b, *x: mk.indexer_search(*x, k, backend=b)[0],
        (HEADS, randn(B, T, 2, seed=17), KEYS),
    ),
    "indexer_search, float mask and shared keys": (
        lambda b, q, w, x, m: mk.indexer_search(q, w, x, k, slot_mask=m, scale=0.8, backend=b)[0],
        (HEADS, randn(T, 2, seed=17), KEYS[0], MASK[0]),
    ),
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
    "topk_read with its lse": (
        lambda b, q, x, v, m: mk.topk_read(q, x, v, k, slot_mask=m, return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "topk_read with a sink": (
        lambda b, *x: mk.topk_read(*x[:3], k, sink=x[3], return_slots=True, return_lse=True, backend=b)[::2],
        (QUERY, KEYS, VALUES, randn(T)),
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
    "sparse_write, token mask": (
        lambda b, v, a, w, e: mk.sparse_write(v, INDICES.expand(B, T, k), a, w, erase=e, token_mask=TOKENS, backend=b),
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
    "softmax_read_compressed": (
        lambda b, q, m: mk.softmax_read(
            q, KEYS8, VALUES8, key_scale=ROW, value_scale=ROW, slot_mask=m, return_lse=True, backend=b
        ),
        (QUERY, MASK),
    ),
    "paged_topk_search_compressed": (
        lambda b, q, m, s: mk.paged_topk_search(
            q,
            KEYS8[:, :6].unflatten(1, (3, 2)),
            PAGES,
            3,
            key_scale=ROW[:, :6].unflatten(1, (3, 2)),
            slot_mask=m,
            best_scores=s,
            best_slots=FOUND,
            backend=b,
        )[0],
        (QUERY, randn(B, 3, 2, seed=15), randn(B, T, k, seed=16)),
    ),
    "selected_scores_compressed": (
        lambda b, q: torch.nan_to_num(mk.selected_scores(q, KEYS8, INDICES, key_scale=ROW, backend=b), neginf=0.0),
        (QUERY,),
    ),
    "selected_read_compressed": (
        lambda b, q, m: mk.selected_read(
            q, KEYS8, VALUES8, NAMED, key_scale=ROW, value_scale=ROW, slot_mask=m, return_lse=True, backend=b
        ),
        (QUERY, MASK),
    ),
    "topk_search_compressed": (
        lambda b, q, m: mk.topk_search(q, KEYS8, 3, key_scale=ROW, slot_mask=m, backend=b)[0],
        (QUERY, MASK),
    ),
    "product_key_read_compressed": (
        lambda b, q, x: mk.product_key_read(q, x, TABLE8, 3, value_scale=ROW8, return_lse=True, backend=b),
        (randn(B, T, 4), SUBKEYS),
    ),
    "topk_read_compressed": (
        lambda b, q, m: mk.topk_read(q, KEYS8, VALUES8, 3, key_scale=ROW, value_scale=ROW, slot_mask=m, backend=b),
        (QUERY, MASK),
    ),
    "sparse_read_compressed": (
        lambda b, w: mk.sparse_read(VALUES8, INDICES, w, value_scale=ROW, backend=b),
        (randn(B, T, k),),
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
    "gated_scan": (lambda b, *x: mk.gated_scan(*x, backend=b), (FORGET, WRITE, INITIAL)),
    "gated_scan, no initial state": (lambda b, *x: mk.gated_scan(*x, backend=b), (FORGET, WRITE)),
    "gated_scan, shared arguments": (lambda b, *x: mk.gated_scan(*x, backend=b), (FORGET[0], WRITE, INITIAL[0])),
    "cell_scan": (lambda b, *x: mk.cell_scan(*x, backend=b), (INPUTS, WEIGHT, INITIAL)),
    "cell_scan, no initial state": (lambda b, *x: mk.cell_scan(*x, backend=b), (INPUTS, WEIGHT)),
    "cell_scan, a weight per stream": (
        lambda b, *x: mk.cell_scan(*x, backend=b),
        (INPUTS[0], torch.stack([WEIGHT, -WEIGHT]), INITIAL),
    ),
    "memory_scan": (lambda b, *x: mk.memory_scan(*x, backend=b), SCAN),
    "memory_scan, read first, all masks": (
        lambda b, *x: mk.memory_scan(*x[:5], slot_mask=x[5], token_mask=TOKENS, read_first=True, scale=0.8, backend=b),
        (*SCAN, MASK),
    ),
    "memory_scan, empty slots": (
        lambda b, *x: mk.memory_scan(*x[:5], slot_mask=x[5].masked_fill(empty(MASK)[1], -torch.inf), backend=b),
        (*SCAN, MASK),
    ),
    "memory_scan, shared memory": (
        lambda b, *x: mk.memory_scan(*x, slot_mask=BOOL[0], backend=b),
        (VALUES[0], KEYS[0], *SCAN[2:]),
    ),
    "gather_rows": (lambda b, v: mk.gather_rows(v, INDICES, backend=b), (VALUES[0],)),
    "memory_gate": (
        lambda b, *x: mk.memory_gate(*x, eps=1e-3, backend=b),
        (randn(B, T, 2, K), 3 * randn(B, T, 2, K, seed=1), randn(B, T, K), 1 + randn(2, K) / 4, 1 + randn(K) / 4),
    ),
    "memory_gate, plain": (
        lambda b, *x: mk.memory_gate(*x, eps=1e-3, signed_sqrt=False, backend=b),
        (randn(T, 2, K), randn(B, 1, 2, K), randn(K), randn(K), randn(2, K)),
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
    assert {name.split(",")[0].split(" ")[0] for name in CASES} >= {op for op in PROMISED if OPS[op].differentiable}


@pytest.mark.parametrize("op", [op for op in READY if OPS[op].differentiable])
def test_gradients_are_not_computed_where_none_is_wanted(native, op):
    """A frozen argument gets no gradient, and freezing it changes no other gradient."""
    s = subject(op, "usual", torch.float32)
    run = operator(native, op)

    def gradients(wanting):
        tensors = [t if t is None else t.clone() for t in s.inputs.tensors]
        for i in wanting:
            tensors[i].requires_grad_()
        results = several(run(*tensors, *s.inputs.params))
        sum(r.double().sum() for r in results if r.requires_grad).backward()
        return {i: None if tensors[i] is None else tensors[i].grad for i in range(len(tensors))}

    every = gradients(s.wanting)
    for i in s.wanting:
        one = gradients([i])
        assert bits(one[i]) == bits(every[i]), s.op.args[i].name
        assert all(g is None for j, g in one.items() if j != i)
