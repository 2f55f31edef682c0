"""Errors are sentences that name op, argument, wanted and got; a refused call changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from support import randn

import memkernels as mk
from memkernels.spec import Arg, Op, Out, check

Q, KEYS, VALUES = randn(2, 5, 8).float(), randn(2, 9, 8).float(), randn(2, 9, 6).float()
WRITE, LSE = randn(2, 5, 6).float(), randn(2, 5).float()
SHARES = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(0))
PAGES = torch.arange(2)
SUBKEYS, LOGITS = randn(2, 3, 4).float(), randn(2, 5, 11).float()
CACHE, WORDS = randn(2, 5, 7).float(), torch.zeros(2, 5, 7, dtype=torch.int64)
INDICES, WEIGHTS = torch.zeros(2, 5, 3, dtype=torch.int64), randn(2, 5, 3).float()

WRONG = [
    (lambda b: mk.softmax_read(Q, KEYS[..., :4], VALUES, backend=b), ValueError,
     "softmax_read: keys must be [..., N=9, K=8], got [2, 9, 4]"),
    (lambda b: mk.softmax_read(Q, KEYS, VALUES[:, :5], backend=b), ValueError,
     "softmax_read: values must be [..., N=9, V], got [2, 5, 6]"),
    (lambda b: mk.softmax_read(Q[0, 0], KEYS, VALUES, backend=b), ValueError,
     "softmax_read: query must be [..., T, K], got [8]"),
    (lambda b: mk.softmax_read(Q, KEYS.double(), VALUES, backend=b), TypeError,
     "softmax_read: keys must be float32, got float64"),
    (lambda b: mk.softmax_read(Q.int(), KEYS, VALUES, backend=b), TypeError,
     "softmax_read: query must be float32 or bfloat16 or float16 or float64, got torch.int32"),
    (lambda b: mk.softmax_read(Q, KEYS, VALUES.bfloat16(), backend=b), TypeError,
     "softmax_read: values must be float32, got bfloat16"),
    (lambda b: mk.softmax_read(Q, KEYS[:1].expand(3, 9, 8), VALUES, backend=b), ValueError,
     "softmax_read: leading dimensions of keys must broadcast to [2], got [3]"),
    (lambda b: mk.softmax_read(Q, KEYS, "values", backend=b), TypeError,
     "softmax_read: values must be a tensor, got str"),
    (lambda b: mk.softmax_read(Q, KEYS, VALUES, slot_mask=torch.ones(8, dtype=torch.bool), backend=b), ValueError,
     "softmax_read: slot_mask must be [..., N=9], got [8]"),
    (lambda b: mk.softmax_read(Q, KEYS, VALUES, slot_mask=torch.ones(9, dtype=torch.int64), backend=b), TypeError,
     "softmax_read: slot_mask must be bool or float32, got int64"),
    (lambda b: mk.softmax_read(Q, KEYS.to("meta"), VALUES, backend=b), ValueError,
     "softmax_read: keys must be on cpu, got meta"),
    (lambda b: mk.address(Q, KEYS, gate="hard", backend=b), ValueError,
     "address: gate must be one of softmax, sigmoid, got 'hard'"),
    (lambda b: mk.topk_search(Q, KEYS, 0, backend=b), ValueError, "topk_search: k must be at least 1, got 0"),
    (lambda b: mk.topk_search(Q, KEYS, 2.0, backend=b), TypeError, "topk_search: k must be an int, got float"),
    (lambda b: mk.topk_read(Q, KEYS, VALUES, True, backend=b), TypeError, "topk_read: k must be an int, got bool"),
    (lambda b: mk.topk_read(Q, KEYS, VALUES[..., :5, :], 2, backend=b), ValueError,
     "topk_read: values must be [..., N=9, V], got [2, 5, 6]"),
    (lambda b: mk.slot_usage(Q, KEYS, LSE[:, :4], backend=b), ValueError,
     "slot_usage: lse must be [..., T=5], got [2, 4]"),
    (lambda b: mk.slot_usage(Q, KEYS, LSE.double(), backend=b), TypeError,
     "slot_usage: lse must be float32, got float64"),
    (lambda b: mk.sparse_read(VALUES, INDICES.short(), WEIGHTS, backend=b), TypeError,
     "sparse_read: indices must be int64 or int32, got torch.int16"),
    (lambda b: mk.sparse_read(VALUES, INDICES[..., :2], WEIGHTS, backend=b), ValueError,
     "sparse_read: weights must be [..., T=5, k=2], got [2, 5, 3]"),
    (lambda b: mk.selected_read(Q, KEYS, VALUES, INDICES.short(), backend=b), TypeError,
     "selected_read: indices must be int64 or int32, got torch.int16"),
    (lambda b: mk.selected_scores(Q, KEYS, INDICES[:, :4], backend=b), ValueError,
     "selected_scores: indices must be [..., T=5, k], got [2, 4, 3]"),
    (lambda b: mk.indexer_search(Q.unsqueeze(-2), Q, KEYS, 2, backend=b), ValueError,
     "indexer_search: head_weights must be [..., T=5, H=1], got [2, 5, 8]"),
    (lambda b: mk.indexer_search(Q.unsqueeze(-2), Q[..., :1], KEYS, 0, backend=b), ValueError,
     "indexer_search: k must be at least 1, got 0"),
    (lambda b: mk.merge_reads([], [], backend=b), ValueError,
     "merge_reads: reads must hold at least one tensor, got none"),
    (lambda b: mk.merge_reads([WRITE, WRITE[:1]], [LSE, LSE], backend=b), ValueError,
     "merge_reads: reads must all be like the first, [2, 5, 6] torch.float32, got [1, 5, 6] torch.float32"),
    (lambda b: mk.merge_reads([WRITE, WRITE], [LSE], backend=b), ValueError,
     "merge_reads: lses must be [..., S=2, T=5], got [2, 1, 5]"),
    (lambda b: mk.gated_write(VALUES, KEYS, Q, WRITE[..., :5], backend=b), ValueError,
     "gated_write: write must be [..., T=5, V=6], got [2, 5, 5]"),
    (lambda b: mk.gated_write(VALUES, KEYS, Q, WRITE, erase=1.5, backend=b), ValueError,
     "gated_write: erase must be in [0, 1], got 1.5"),
    (lambda b: mk.gated_write(VALUES, KEYS, Q, WRITE, erase="all", backend=b), TypeError,
     "gated_write: erase must be a number or a tensor [..., T, V], got str"),
    (lambda b: mk.gated_write(VALUES, KEYS, Q, WRITE, erase=WRITE[..., :1], backend=b), ValueError,
     "gated_write: erase must be [..., T=5, V=6], got [2, 5, 1]"),
    (lambda b: mk.gated_write(VALUES, KEYS, Q, WRITE, token_mask=torch.ones(2, 5), backend=b), TypeError,
     "gated_write: token_mask must be bool, got float32"),
    (lambda b: mk.sparse_write(VALUES, INDICES.short(), WEIGHTS, WRITE, backend=b), TypeError,
     "sparse_write: indices must be int64 or int32, got torch.int16"),
    (lambda b: mk.sparse_write(VALUES, INDICES, WEIGHTS[..., :2], WRITE, backend=b), ValueError,
     "sparse_write: weights must be [..., T=5, k=3], got [2, 5, 2]"),
    (lambda b: mk.sparse_write(VALUES, INDICES, WEIGHTS, WRITE[..., :5], backend=b), ValueError,
     "sparse_write: write must be [..., T=5, V=6], got [2, 5, 5]"),
    (lambda b: mk.sparse_write(VALUES, INDICES, WEIGHTS, WRITE, token_mask=torch.ones(7, 2, 5) > 0, backend=b),
     ValueError, "sparse_write: leading dimensions of token_mask must broadcast to [2], those of the other arguments, "
     "got [7, 2]"),
    (lambda b: mk.sparse_write_(VALUES, INDICES, WEIGHTS, WRITE, token_mask=torch.ones(5), backend=b), TypeError,
     "sparse_write: token_mask must be bool, got float32"),
    (lambda b: mk.product_key_read(Q, SUBKEYS, VALUES.to(torch.int8), 2, backend=b), TypeError,
     "product_key_read: value_scale must be a tensor, got None beside values in int8"),
    (lambda b: mk.sparse_write_(VALUES, INDICES, WEIGHTS, WRITE, erase="no", backend=b), TypeError,
     "sparse_write_: erase must be a number or a tensor [..., T, V], got str"),
    (lambda b: mk.softmax_write(VALUES, KEYS[:, :4], Q, WRITE, backend=b), ValueError,
     "softmax_write: keys must be [..., N=9, K=8], got [2, 4, 8]"),
    (lambda b: mk.softmax_write_(VALUES, KEYS, Q, WRITE, erase=2, backend=b), ValueError,
     "softmax_write_: erase must be in [0, 1], got 2.0"),
    (lambda b: mk.softmax_write_(VALUES[0], KEYS, Q, WRITE, backend=b), ValueError,
     "softmax_write_: values must have the leading dimensions of keys, [2], got []"),
    (lambda b: mk.slot_write(VALUES, WEIGHTS, WRITE, backend=b), ValueError,
     "slot_write: weights must be [..., T=5, N=9], got [2, 5, 3]"),
    (lambda b: mk.slot_write(VALUES, SHARES, WRITE[:, :4], backend=b), ValueError,
     "slot_write: write must be [..., T=5, V=6], got [2, 4, 6]"),
    (lambda b: mk.slot_write(VALUES, SHARES, WRITE.double(), backend=b), TypeError,
     "slot_write: write must be float32, got float64"),
    (lambda b: mk.slot_write(VALUES, SHARES, WRITE, erase=-1, backend=b), ValueError,
     "slot_write: erase must be in [0, 1], got -1.0"),
    (lambda b: mk.slot_write_(VALUES, SHARES, WRITE, erase=WRITE[..., :1], backend=b), ValueError,
     "slot_write: erase must be [..., T=5, V=6], got [2, 5, 1]"),
    (lambda b: mk.gated_scan(WRITE, WRITE[:, :4], backend=b), ValueError,
     "gated_scan: update must be [..., T=5, D=6], got [2, 4, 6]"),
    (lambda b: mk.gated_scan(WRITE, WRITE, WRITE[0], backend=b), ValueError,
     "gated_scan: leading dimensions of initial must broadcast to [2], got [5]"),
    (lambda b: mk.cell_scan(WRITE, torch.zeros(6, 3), backend=b), ValueError,
     "cell_scan: weight must be [..., 3D=6, D=2], got [6, 3]"),
    (lambda b: mk.cell_scan(WRITE, torch.zeros(6, 2).double(), backend=b), TypeError,
     "cell_scan: weight must be float32, got float64"),
    (lambda b: mk.memory_scan(VALUES, KEYS, Q, Q[:, :4], WRITE, backend=b), ValueError,
     "memory_scan: write_query must be [..., T=5, K=8], got [2, 4, 8]"),
    (lambda b: mk.memory_scan(VALUES, KEYS, Q, Q, WRITE, read_first=1, backend=b), TypeError,
     "memory_scan: read_first must be a bool, got int"),
    (lambda b: mk.gated_write_(VALUES[0], KEYS, Q, WRITE, backend=b), ValueError,
     "gated_write_: values must have the leading dimensions of keys, [2], got []"),
    (lambda b: mk.product_key_search(Q, SUBKEYS[..., :3], 2, backend=b), ValueError,
     "product_key_search: subkeys must be [..., 2, n, h=4], got [2, 3, 3]"),
    (lambda b: mk.product_key_search(Q, SUBKEYS[:1], 2, backend=b), ValueError,
     "product_key_search: subkeys must be [..., 2, n, h=4], got [1, 3, 4]"),
    (lambda b: mk.paged_topk_search(Q, KEYS, PAGES, 0, backend=b), ValueError,
     "paged_topk_search: k must be at least 1, got 0"),
    (lambda b: mk.paged_topk_search(Q, KEYS, PAGES[:1], 2, backend=b), ValueError,
     "paged_topk_search: pages must be [..., F=2], got [1]"),
    (lambda b: mk.paged_topk_search(Q, KEYS, PAGES.short(), 2, backend=b), TypeError,
     "paged_topk_search: pages must be int64 or int32, got torch.int16"),
    (lambda b: mk.product_key_search(Q, SUBKEYS, 0, backend=b), ValueError,
     "product_key_search: k must be at least 1, got 0"),
    (lambda b: mk.product_key_read(Q, SUBKEYS, VALUES[..., :5, :], 2, backend=b), ValueError,
     "product_key_read: values must be [..., nn=9, V], got [2, 5, 6]"),
    (lambda b: mk.product_key_read(Q, SUBKEYS, VALUES.double(), 2, backend=b), TypeError,
     "product_key_read: values must be float32, got float64"),
    (lambda b: mk.product_key_read(Q, SUBKEYS, VALUES, 2.0, backend=b), TypeError,
     "product_key_read: k must be an int, got float"),
    (lambda b: mk.additive_read(Q, KEYS, VALUES, Q[0, 0, :7], backend=b), ValueError,
     "additive_read: score_vector must be [..., K=8], got [7]"),
    (lambda b: mk.additive_read(Q, KEYS, VALUES, Q[0, 0].double(), backend=b), TypeError,
     "additive_read: score_vector must be float32, got float64"),
    (lambda b: mk.cache_logprobs(LOGITS, CACHE, WORDS[..., :6], 0.5, backend=b), ValueError,
     "cache_logprobs: cache_tokens must be [..., T=5, N=7], got [2, 5, 6]"),
    (lambda b: mk.cache_logprobs(LOGITS, CACHE, WORDS.short(), 0.5, backend=b), TypeError,
     "cache_logprobs: cache_tokens must be int64 or int32, got torch.int16"),
    (lambda b: mk.cache_logprobs(LOGITS, CACHE, WORDS, 1.5, backend=b), ValueError,
     "cache_logprobs: mix must be in [0, 1], got 1.5"),
    (lambda b: mk.cache_logprobs(LOGITS, CACHE, WORDS, "half", backend=b), TypeError,
     "cache_logprobs: mix must be a number or a tensor [..., T], got str"),
    (lambda b: mk.cache_nll(LOGITS, WORDS[..., 0], CACHE, WORDS, LSE[:, :3], backend=b), ValueError,
     "cache_nll: mix must be [..., T=5], got [2, 3]"),
    (lambda b: mk.cache_nll(LOGITS, WORDS[:, :4, 0], CACHE, WORDS, 0.5, backend=b), ValueError,
     "cache_nll: targets must be [..., T=5], got [2, 4]"),
    (lambda b: mk.cache_nll(LOGITS, WORDS[..., 0], CACHE, WORDS, float("nan"), backend=b), ValueError,
     "cache_nll: mix must be in [0, 1], got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "sentence"), WRONG, ids=[w[2][:60] for w in WRONG])
def test_a_call_that_does_not_fit_says_so(backend, call, kind, sentence):
    inputs = (Q, KEYS, VALUES, WRITE, LSE, INDICES, WEIGHTS, SUBKEYS, LOGITS, CACHE, WORDS)
    before = [x.clone() for x in inputs]
    with pytest.raises(kind) as caught:
        call(backend)
    assert str(caught.value) == sentence
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("wild", [9, -2, 2**40, -(2**63)])
def test_an_index_out_of_range_is_refused(backend, wild):
    indices = INDICES.clone()
    indices[1, 4, 2] = wild
    with pytest.raises((RuntimeError, IndexError)) as caught:
        mk.sparse_read(VALUES, indices, WEIGHTS, backend=backend)
    if backend == "cpu":
        assert str(caught.value) == f"sparse_read: indices must be in [-1, {VALUES.shape[-2]}), got {wild}"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, triton, cuda, got 'tpu'"):
        mk.softmax_read(Q, KEYS, VALUES, backend="tpu")


def test_a_backend_that_cannot_run_says_why_in_one_sentence(monkeypatch):
    from memkernels import backends

    gone = backends.Backend("cpu", ("cpu",), lambda: "its native library is not built")
    monkeypatch.setattr(backends, "BACKENDS", (gone,))
    monkeypatch.setattr(backends, "_BY_NAME", {"cpu": gone})
    with pytest.raises(NotImplementedError) as caught:
        mk.softmax_read(Q[:, :3], KEYS, VALUES, backend="cpu")
    assert str(caught.value) == "softmax_read: backend 'cpu' is not available: its native library is not built"
    mk.softmax_read(Q[:, :3], KEYS, VALUES, backend="auto")


def test_the_same_wrong_call_is_refused_every_time(backend):
    for _ in range(3):
        with pytest.raises(ValueError, match="keys must be"):
            mk.softmax_read(Q, KEYS[..., :4], VALUES, backend=backend)


TWO_HALVES = Op(
    name="halves",
    args=(Arg("query", "T 2h", "tokens", "lead"), Arg("subkeys", "2 n h", "memory")),
    outputs=(Out("halves", "T 2h"),),
    reference=lambda query, subkeys: (query,),
)


@pytest.mark.parametrize(
    "query, subkeys, sentence",
    [
        ((7, 9), (2, 3, 4), "halves: query must be [..., T, 2h=8], got [7, 9]"),
        ((7, 8), (3, 3, 4), "halves: subkeys must be [..., 2, n, h=4], got [3, 3, 4]"),
        ((7, 8), (2, 3, 5), "halves: subkeys must be [..., 2, n, h=4], got [2, 3, 5]"),
    ],
)
def test_axes_that_are_numbers_or_multiples_are_checked(query, subkeys, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check(TWO_HALVES, [torch.randn(query), torch.randn(subkeys)])
    layout = check(TWO_HALVES, [torch.randn(5, 7, 8), torch.randn(2, 3, 4)])
    assert layout.shape(TWO_HALVES, TWO_HALVES.outputs[0], ()) == ((5, 7, 8), torch.float32)
