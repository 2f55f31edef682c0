"""Sizes that depend on data (``keys[chosen]`` with a bool ``chosen``) compile without graph breaks and export."""

from __future__ import annotations

import pytest
import torch
from support import close, randn
from test_gradients import CASES as EVERY_OP

import memkernels as mk
from memkernels.spec import several

B, T, N, K, V, k = 4, 6, 9, 4, 5, 3
QUERY, KEYS, VALUES, MASK, WRITE = randn(T, K), randn(N, K), randn(N, V), randn(N), randn(T, V)
STREAMS = [randn(B, *x.shape, seed=20) for x in (QUERY, KEYS, VALUES, MASK, WRITE)]
INDICES = torch.randint(-1, 3, (T, k), generator=torch.Generator().manual_seed(1))
SHARES, WEIGHTS, GATE = (torch.sigmoid(randn(*shape)) for shape in ((T, k), (T, N), (T, V)))
LOGITS, CACHE, WORDS, MIX = randn(T, 11), randn(T, N), torch.arange(T * N).view(T, N) % 11, torch.sigmoid(randn(T))
KEYS8, ROW = (20 * KEYS).to(torch.int8), torch.sigmoid(randn(N))
SUBKEYS, LIST, TABLE, PARTS = randn(2, 3, 2), randn(9, 2), randn(9, V), randn(9, T, V)
PAGES, FOUND = torch.arange(N).flip(0), 100 + torch.arange(T * k).view(T, k)
WEIGHT = torch.ones(K, dtype=torch.float64)
CELL, RECURRENT = randn(T, 6), randn(6, 2)
HEADS, HEAD_WEIGHTS, SINK = randn(T, 2, K, seed=2), randn(T, 2, seed=3), randn(T, seed=4)
TABLE8, RANGES = (20 * TABLE).to(torch.int8), mk.causal_range(T, N, window=4, offset=2)
TOKENS, TARGETS = torch.arange(T) % 3 > 0, torch.arange(T)

# name -> (function(chosen, backend, *leaves), leaves); the chosen are slots (N), tokens (T), streams (B), parts (S),
# or half keys (n).
CASES = {
    "softmax_read N": (
        lambda c, b, q, x, v, m: mk.softmax_read(q, x[c], v[c], slot_mask=m[c], return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "softmax_read N, bool mask": (
        lambda c, b, q, x, v: mk.softmax_read(q, x[c], v[c], slot_mask=(MASK > -1)[c], backend=b),
        (QUERY, KEYS, VALUES),
    ),
    "softmax_read N, stretched mask": (
        lambda c, b, q, x, v, m: mk.softmax_read(q, x[c], v[c], slot_mask=m, backend=b),
        (QUERY, KEYS, VALUES, MASK[:1]),
    ),
    "softmax_read N, shared by streams": (
        lambda c, b, q, x, v, m: mk.softmax_read(q, x[c], v[c], slot_mask=m[c], backend=b),
        (STREAMS[0], KEYS, VALUES, MASK),
    ),
    "softmax_read T": (
        lambda c, b, q, x, v, m: mk.softmax_read(q[c], x, v, slot_mask=m, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "softmax_read T, ranges": (
        lambda c, b, q, x, v: mk.softmax_read(q[c], x, v, slot_range=RANGES[c], return_lse=True, backend=b),
        (QUERY, KEYS, VALUES),
    ),
    "softmax_read B": (
        lambda c, b, q, x, v, m: mk.softmax_read(q[c], x[c], v[c], slot_mask=m[c], backend=b),
        STREAMS[:4],
    ),
    "softmax_read B, shared memory": (
        lambda c, b, q, x, v: mk.softmax_read(q[c], x, v, backend=b),
        (STREAMS[0], KEYS, VALUES),
    ),
    "softmax_read_compressed N": (
        lambda c, b, q: mk.softmax_read(q, KEYS8[c], KEYS8[c], key_scale=ROW[c], value_scale=ROW[c], backend=b),
        (QUERY,),
    ),
    "address N": (lambda c, b, q, x, m: mk.address(q, x[c], slot_mask=m[c], backend=b), (QUERY, KEYS, MASK)),
    "address T": (lambda c, b, q, x: mk.address(q[c], x, gate="sigmoid", backend=b), (QUERY, KEYS)),
    "additive_read N": (
        lambda c, b, q, x, v, m: mk.additive_read(q, x[c], v[c], q[0], slot_mask=m[c], return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "additive_read T": (
        lambda c, b, q, x, v: mk.additive_read(q[c], x, v, x[0], backend=b),
        (QUERY, KEYS, VALUES),
    ),
    "slot_usage N": (
        lambda c, b, q, x, m: mk.slot_usage(q, x[c], q[:, 0] + 3, slot_mask=m[c], backend=b),
        (QUERY, KEYS, MASK),
    ),
    "slot_usage T": (lambda c, b, q, x: mk.slot_usage(q[c], x, q[c][:, 0] + 3, backend=b), (QUERY, KEYS)),
    "slot_usage B": (lambda c, b, q, x: mk.slot_usage(q[c], x, q[c][..., 0] + 3, backend=b), (STREAMS[0], KEYS)),
    "topk_search N": (
        lambda c, b, q, x, m: mk.topk_search(q, x[c], k, slot_mask=m[c], backend=b),
        (QUERY, KEYS, MASK),
    ),
    "topk_search T": (lambda c, b, q, x: mk.topk_search(q[c], x, k, backend=b), (QUERY, KEYS)),
    "topk_search_compressed N": (
        lambda c, b, q: mk.topk_search(q, KEYS8[c], k, key_scale=ROW[c], backend=b),
        (QUERY,),
    ),
    "topk_read N": (
        lambda c, b, q, x, v, m: mk.topk_read(q, x[c], v[c], k, slot_mask=m[c], return_slots=True, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "topk_read T": (lambda c, b, q, x, v: mk.topk_read(q[c], x, v, k, backend=b), (QUERY, KEYS, VALUES)),
    "topk_read T, sink": (
        lambda c, b, q, x, v, s: mk.topk_read(q[c], x, v, k, sink=s[c], return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, SINK),
    ),
    "topk_read_compressed N": (
        lambda c, b, q: mk.topk_read(q, KEYS8[c], VALUES[c], k, key_scale=ROW[c], backend=b),
        (QUERY,),
    ),
    "sparse_read N": (lambda c, b, v, a: mk.sparse_read(v[c], INDICES.clamp(max=0), a, backend=b), (VALUES, SHARES)),
    "sparse_read T": (lambda c, b, v, a: mk.sparse_read(v, INDICES[c], a[c], backend=b), (VALUES, SHARES)),
    "sparse_read_compressed T": (
        lambda c, b, a: mk.sparse_read(KEYS8, INDICES[c], a[c], value_scale=ROW, backend=b),
        (SHARES,),
    ),
    "selected_scores N": (
        lambda c, b, q, x: mk.selected_scores(q, x[c], INDICES.clamp(max=0), backend=b),
        (QUERY, KEYS),
    ),
    "selected_scores T": (lambda c, b, q, x: mk.selected_scores(q[c], x, INDICES[c], backend=b), (QUERY, KEYS)),
    "selected_scores_compressed T": (
        lambda c, b, q: mk.selected_scores(q[c], KEYS8, INDICES[c], key_scale=ROW, backend=b),
        (QUERY,),
    ),
    "selected_read N": (
        lambda c, b, q, x, v, m: mk.selected_read(
            q, x[c], v[c], INDICES.clamp(max=0), slot_mask=m[c], return_weights=True, backend=b
        ),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "selected_read T": (
        lambda c, b, q, x, v, m: mk.selected_read(q[c], x, v, INDICES[c], slot_mask=m, return_lse=True, backend=b),
        (QUERY, KEYS, VALUES, MASK),
    ),
    "selected_read_compressed T": (
        lambda c, b, q: mk.selected_read(
            q[c], KEYS8, KEYS8, INDICES[c], key_scale=ROW, value_scale=ROW, return_weights=True, backend=b
        ),
        (QUERY,),
    ),
    "indexer_search N": (
        lambda c, b, q, w, x, m: mk.indexer_search(q, w, x[c], k, slot_mask=m[c], backend=b),
        (HEADS, HEAD_WEIGHTS, KEYS, MASK),
    ),
    "indexer_search T": (
        lambda c, b, q, w, x: mk.indexer_search(q[c], w[c], x, k, slot_range=RANGES[c], backend=b),
        (HEADS, HEAD_WEIGHTS, KEYS),
    ),
    "paged_topk_search F": (
        lambda c, b, q, x, m: mk.paged_topk_search(q, x[c], PAGES[c], k, slot_mask=m[c], backend=b),
        (QUERY, randn(N, 2, K), randn(N, 2)),
    ),
    "paged_topk_search T": (
        lambda c, b, q, x, s: mk.paged_topk_search(
            q[c], x, PAGES[:2], k, best_scores=s[c], best_slots=FOUND[c], backend=b
        ),
        (QUERY, randn(2, 3, K), randn(T, k)),
    ),
    "paged_topk_search_compressed F": (
        lambda c, b, q: mk.paged_topk_search(
            q, KEYS8.view(N, 1, K)[c], PAGES[c], k, key_scale=ROW.view(N, 1)[c], backend=b
        ),
        (QUERY,),
    ),
    "gather_rows N": (lambda c, b, v: mk.gather_rows(v[c], INDICES.clamp(max=0), backend=b), (VALUES,)),
    "gather_rows T": (lambda c, b, v: mk.gather_rows(v, INDICES[c], backend=b), (VALUES,)),
    "memory_gate T": (
        lambda c, b, h, x, v: mk.memory_gate(h[c], x[c], v[c], WEIGHT, WEIGHT, eps=1e-3, backend=b),
        (randn(T, 2, K), 3 * randn(T, 2, K, seed=1), randn(T, K)),
    ),
    "product_key_search T": (lambda c, b, q, x: mk.product_key_search(q[c], x, k, backend=b), (QUERY, SUBKEYS)),
    "product_key_search n": (
        lambda c, b, q, x: mk.product_key_search(q, x[c].expand(2, -1, -1), k, backend=b),
        (QUERY, LIST),
    ),
    "product_key_read T": (
        lambda c, b, q, x, v: mk.product_key_read(q[c], x, v, k, backend=b),
        (QUERY, SUBKEYS, TABLE),
    ),
    "product_key_read_compressed T": (
        lambda c, b, q, x: mk.product_key_read(
            q[c], x, TABLE8, k, value_scale=ROW, return_slots=True, return_lse=True, backend=b
        ),
        (QUERY, SUBKEYS),
    ),
    "gated_write N": (
        lambda c, b, v, x, q, w, m: mk.gated_write(v[c], x[c], q, w, slot_mask=m[c], return_retained=True, backend=b),
        (VALUES, KEYS, QUERY, WRITE, MASK),
    ),
    "gated_write T": (
        lambda c, b, v, x, q, w: mk.gated_write(v, x, q[c], w[c], token_mask=TOKENS[c], erase=GATE[c], backend=b),
        (VALUES, KEYS, QUERY, WRITE),
    ),
    "gated_write B": (
        lambda c, b, q, x, v, m, w: mk.gated_write(v[c], x[c], q[c], w[c], slot_mask=m[c], backend=b),
        STREAMS,
    ),
    "gated_write B, shared memory": (
        lambda c, b, v, x, q, w: mk.gated_write(v, x, q[c], w[c], backend=b),
        (VALUES, KEYS, STREAMS[0], STREAMS[4]),
    ),
    "softmax_write N": (
        lambda c, b, v, x, q, w, m: mk.softmax_write(v[c], x[c], q, w, slot_mask=m[c], backend=b),
        (VALUES, KEYS, QUERY, WRITE, MASK),
    ),
    "softmax_write T": (
        lambda c, b, v, x, q, w: mk.softmax_write(v, x, q[c], w[c], token_mask=TOKENS[c], backend=b),
        (VALUES, KEYS, QUERY, WRITE),
    ),
    "slot_write N": (lambda c, b, v, a, w: mk.slot_write(v[c], a[:, c], w, backend=b), (VALUES, WEIGHTS, WRITE)),
    "slot_write T": (lambda c, b, v, a, w: mk.slot_write(v, a[c], w[c], backend=b), (VALUES, WEIGHTS, WRITE)),
    "sparse_write N": (
        lambda c, b, v, a, w: mk.sparse_write(v[c], INDICES.clamp(max=0), a, w, backend=b),
        (VALUES, SHARES, WRITE),
    ),
    "sparse_write T": (
        lambda c, b, v, a, w: mk.sparse_write(v, INDICES[c], a[c], w[c], backend=b),
        (VALUES, SHARES, WRITE),
    ),
    "sparse_write T, token mask": (
        lambda c, b, v, a, w: mk.sparse_write(v, INDICES[c], a[c], w[c], token_mask=TOKENS[c], backend=b),
        (VALUES, SHARES, WRITE),
    ),
    "memory_scan N": (
        lambda c, b, v, x, q, w, m: mk.memory_scan(v[c], x[c], q, q + 1, w, slot_mask=m[c], backend=b),
        (VALUES, KEYS, QUERY, WRITE, MASK),
    ),
    "memory_scan T": (
        lambda c, b, v, x, q, w: mk.memory_scan(v, x, q[c], q[c] + 1, w[c], token_mask=TOKENS[c], backend=b),
        (VALUES, KEYS, QUERY, WRITE),
    ),
    "gated_scan T": (lambda c, b, f, u: mk.gated_scan(f[c], u[c], u[0], backend=b), (GATE, WRITE)),
    "cell_scan T": (lambda c, b, x, w: mk.cell_scan(x[c], w, backend=b), (CELL, RECURRENT)),
    "merge_reads T": (
        lambda c, b, r, x: mk.merge_reads([r[c], r[c] + 1], [x[c][:, 0], x[c][:, 1]], backend=b),
        (WRITE, QUERY),
    ),
    "merge_reads S": (lambda c, b, r: mk.merge_reads(r[c], r[c][..., 0], backend=b), (PARTS,)),
    "cache_logprobs T": (
        lambda c, b, z, s, m: mk.cache_logprobs(z[c], s[c], WORDS[c], m[c], backend=b),
        (LOGITS, CACHE, MIX),
    ),
    "cache_logprobs N": (
        lambda c, b, z, s: mk.cache_logprobs(z, s[:, c], WORDS[0, c], 0.3, backend=b),
        (LOGITS, CACHE),
    ),
    "cache_nll T": (
        lambda c, b, z, s: mk.cache_nll(z[c], TARGETS[c], s[c], WORDS[c], 0.3, backend=b),
        (LOGITS, CACHE),
    ),
    "cache_nll N": (
        lambda c, b, z, s, m: mk.cache_nll(z, TARGETS, s[:, c], WORDS[:, c], m, backend=b),
        (LOGITS, CACHE, MIX),
    ),
}
COUNT = {"N": N, "T": T, "B": B, "S": 9, "n": 9, "F": N}
# Their formula loops over the tokens. The compiler unrolls the loop, so the number of tokens must be known.
LOOPS = ("write T", "write B, shared", "scan T")


def chosen(case: str, few: bool = False) -> torch.Tensor:
    count = COUNT[case.split()[1].strip(",")]
    return torch.arange(count) % 4 != 1 if not few else torch.arange(count) == 2


@pytest.fixture(autouse=True)
def sizes_from_data():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_compiled_as_eager(backend, case):
    if backend == "reference" and any(loop in case for loop in LOOPS):
        pytest.skip("an unrolled loop")
    function, tensors = CASES[case]
    compiled = torch.compile(lambda c, *x: function(c, backend, *x), fullgraph=True, backend="aot_eager")
    for few in (False, True):  # the other size is 1, which a guard would have excluded
        wanted = several(function(chosen(case, few), "reference", *tensors))
        for got, want in zip(several(compiled(chosen(case, few), *tensors)), wanted):
            close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_compiled_code(native, case):
    function, tensors = CASES[case]

    def gradients(run):
        leaves = [x.clone().requires_grad_() for x in tensors]
        found = [torch.nan_to_num(r, neginf=0.0) for r in several(run(*leaves)) if r.requires_grad]
        return torch.autograd.grad(sum((r * torch.cos(r.detach())).sum() for r in found), leaves)

    compiled = torch.compile(lambda *x: function(chosen(case), native, *x), fullgraph=True, backend="aot_eager")
    wanted = gradients(lambda *x: function(chosen(case), "reference", *x))
    for got, want in zip(gradients(compiled), wanted):
        close(got, want)


@pytest.mark.parametrize("case", ["softmax_read N", "gated_write N", "topk_read T", "cache_nll T"])
def test_inductor(native, case):
    function, tensors = CASES[case]
    compiled = torch.compile(lambda *x: function(chosen(case), native, *x), fullgraph=True)
    for got, want in zip(several(compiled(*tensors)), several(function(chosen(case), "reference", *tensors))):
        close(got, want)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", ["softmax_read N", "softmax_read N, stretched mask", "gated_write N", "topk_read T"])
def test_export(native, case, strict):
    function, tensors = CASES[case]

    class Model(torch.nn.Module):
        def forward(self, c, *x):
            return function(c, native, *x)

    program = torch.export.export(Model(), (chosen(case), *tensors), strict=strict)
    assert any("memkernels" in str(node.target) for node in program.graph.nodes)
    for few in (False, True):
        wanted = several(function(chosen(case, few), "reference", *tensors))
        for got, want in zip(several(program.module()(chosen(case, few), *tensors)), wanted):
            close(got, want)


def test_writes_in_place(native):
    def step(values, c):
        mk.sparse_write_(values, INDICES[c], SHARES[c], WRITE[c], backend=native)
        mk.gated_write_(values, KEYS, QUERY[c], WRITE[c], slot_mask=MASK, backend=native)

    one, other = VALUES.clone(), VALUES.clone()
    torch.compile(step, fullgraph=True, backend="aot_eager")(one, chosen("write T"))
    step(other, chosen("write T"))
    close(one, other)


def test_shapes_that_cannot_fit_are_still_errors(native):
    compiled = torch.compile(
        lambda c: mk.softmax_read(QUERY, KEYS[c], VALUES[c][..., None], backend=native), backend="aot_eager"
    )
    with pytest.raises(Exception, match="softmax_read: .*values must be"):
        compiled(chosen("softmax_read N"))


def test_every_op_is_here():
    assert {case.split()[0] for case in CASES} == {case.split(",")[0].split()[0] for case in EVERY_OP}
