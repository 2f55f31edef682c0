"""selected_scores, selected_read and indexer_search against their equations in plain PyTorch, on every backend."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, N, K, V, k, H = 2, 7, 19, 8, 5, 6, 3


def whole(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


INDICES = whole(-1, N, B, T, k)


def scores_of(query, keys, indices, scale=None, mask=None):
    """Entry by entry. query [T, K], keys [N, K], indices [T, k], mask [N]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    s = query.new_full(indices.shape, -torch.inf)
    for t, row in enumerate(indices.tolist()):
        for j, i in enumerate(row):
            if i >= 0 and (mask is None or mask[i] != -torch.inf):
                s[t, j] = scale * (query[t] @ keys[i]) + (0 if mask is None else mask[i])
    return s


def read_of(query, keys, values, indices, scale=None, mask=None):
    """``read, weights, lse`` of one stream, token by token."""
    s = scores_of(query, keys, indices, scale, mask)
    reads, weights = [], torch.zeros_like(s)
    for t, row in enumerate(indices.tolist()):
        live = [j for j in range(len(row)) if s[t, j] != -torch.inf]
        weights[t, live] = torch.softmax(s[t, live], -1)
        reads.append(sum((weights[t, j] * values[row[j]] for j in live), torch.zeros_like(values[0])))
    return torch.stack(reads), weights, torch.logsumexp(s, -1)


@pytest.mark.parametrize("scale", [None, -0.7])
def test_selected_scores(backend, scale):
    query, keys = randn(B, T, K), randn(B, N, K, seed=1)
    got = mk.selected_scores(query, keys, INDICES, scale=scale, backend=backend)
    close(got, torch.stack([scores_of(query[b], keys[b], INDICES[b], scale) for b in range(B)]))
    assert torch.equal(torch.isneginf(got), INDICES == -1)


def test_selected_scores_are_those_of_the_search(backend):
    query, keys = randn(B, T, K), randn(N, K, seed=1)
    scores, indices = mk.topk_search(query, keys, N + 2, backend=backend)
    close(mk.selected_scores(query, keys, indices, backend=backend), scores)


@pytest.mark.parametrize("masked", ["", "bool", "float"])
def test_selected_read(backend, masked):
    query, keys, values = randn(B, T, K), randn(B, N, K, seed=1), randn(B, N, V, seed=2)
    some = whole(0, 3, N, seed=3) > 0
    mask = {"": None, "bool": some, "float": randn(N, seed=4).masked_fill(~some, -torch.inf)}[masked]
    added = torch.zeros(N).double().masked_fill(~some, -torch.inf) if masked == "bool" else mask
    got = mk.selected_read(
        query, keys, values, INDICES, slot_mask=mask, return_weights=True, return_lse=True, backend=backend
    )
    for b in range(B):
        for x, wanted in zip(got, read_of(query[b], keys[b], values[b], INDICES[b], mask=added)):
            close(x[b], wanted)


def test_flags_choose_the_results(backend):
    tensors = randn(T, K), randn(N, K, seed=1), randn(N, V, seed=2), INDICES[0]
    read, weights, lse = mk.selected_read(*tensors, return_weights=True, return_lse=True, backend=backend)
    assert read.shape == (T, V) and weights.shape == (T, k) and lse.shape == (T,)
    for flags, wanted in (
        ({}, (read,)),
        ({"return_lse": True}, (read, lse)),
        ({"return_weights": True}, (read, weights)),
    ):
        got = mk.selected_read(*tensors, **flags, backend=backend)
        for a, b in zip(got if flags else (got,), wanted, strict=True):
            assert torch.equal(a, b)


def test_every_slot_named_once_is_the_whole_read(backend):
    query, keys, values = randn(B, T, K), randn(N, K, seed=1), randn(N, V, seed=2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5)).expand(T, N)
    got = mk.selected_read(query, keys, values, order, return_lse=True, backend=backend)
    for a, b in zip(got, mk.softmax_read(query, keys, values, return_lse=True, backend="reference")):
        close(a, b)


def test_the_best_slots_are_those_of_topk_read(backend):
    query, keys, values = randn(B, T, K), randn(N, K, seed=1), randn(N, V, seed=2)
    read, slots, weights = mk.topk_read(query, keys, values, k, return_slots=True, backend="reference")
    got = mk.selected_read(query, keys, values, slots, return_weights=True, backend=backend)
    close(got[0], read), close(got[1], weights)


def test_parts_merge_and_entries_may_be_permuted(backend):
    query, keys, values = randn(B, T, K), randn(B, N, K, seed=1), randn(B, N, V, seed=2)
    flags = {"return_lse": True, "backend": backend}
    all_at_once = mk.selected_read(query, keys, values, INDICES, **flags)
    parts = [mk.selected_read(query, keys, values, INDICES[..., p], **flags) for p in ([1, 4], [5, 0, 2], [3])]
    merged = mk.merge_reads([read for read, _ in parts], [lse for _, lse in parts])
    for a, b in zip(merged, all_at_once):
        close(a, b)
    for a, b in zip(mk.selected_read(query, keys, values, INDICES.flip(-1), **flags), all_at_once):
        close(a, b)


def test_heads_share_their_indices(backend):
    """A dimension of size 1 gives the results and gradients of repeated indices, with one memory or several."""
    for memory in ((B, 1), (B, H), ()):
        leaves = [randn(B, H, T, K), randn(*memory, N, K, seed=1), randn(*memory, N, V, seed=2)]
        leaves = [x.requires_grad_() for x in leaves]
        shared = mk.selected_read(*leaves, INDICES.unsqueeze(1), backend=backend)
        apart = mk.selected_read(*leaves, INDICES.unsqueeze(1).repeat(1, H, 1, 1), backend="reference")
        close(shared.detach(), apart.detach())
        cotangent = randn(*shared.shape, seed=3)
        for a, b in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (shared, apart))):
            close(a, b)


def test_nothing_named_reads_nothing(backend):
    leaves = [randn(T, K), randn(N, K, seed=1), randn(N, V, seed=2)]
    leaves = [x.requires_grad_() for x in leaves]
    indices = torch.full((T, k), -1)
    indices[::2, 1] = 4
    mask = torch.ones(N).bool()
    mask[4] = False
    read, weights, lse = mk.selected_read(
        *leaves, indices, slot_mask=mask, return_weights=True, return_lse=True, backend=backend
    )
    assert not read.any() and not weights.any() and torch.isneginf(lse).all()
    for gradient in torch.autograd.grad(read.sum() + lse.exp().sum(), leaves):
        assert not gradient.any()


def test_rows_that_are_not_named_and_empty_slots_are_not_looked_at(backend):
    """NaN in them changes no bit, forward and backward."""
    mask = torch.ones(N).bool()
    mask[INDICES[0, 0, 0].clamp(min=0)] = False
    unread = ~torch.isin(torch.arange(N), INDICES[0]) | ~mask

    def run(poison: bool):
        keys, values = randn(N, K, seed=1), randn(N, V, seed=2)
        if poison:
            keys[unread] = values[unread] = torch.nan
        leaves = [x.requires_grad_() for x in (randn(T, K), keys, values)]
        results = mk.selected_read(
            *leaves, INDICES[0], slot_mask=mask, return_weights=True, return_lse=True, backend=backend
        )
        loss = sum((r * randn(*r.shape, seed=6)).masked_fill(torch.isneginf(r), 0).sum() for r in results)
        return [*results, *torch.autograd.grad(loss, leaves)]

    for a, b in zip(run(True), run(False)):
        assert torch.equal(a, b)


def test_a_nan_query_stays_with_its_token(backend):
    query = randn(T, K)
    query[2, 1] = torch.nan
    read = mk.selected_read(query, randn(N, K, seed=1), randn(N, V, seed=2), INDICES[0], backend=backend)
    assert read[2].isnan().all() and not read[torch.arange(T) != 2].isnan().any()


@pytest.mark.parametrize("wild", [N, -2, 2**40])
def test_an_index_out_of_range_is_refused(native, wild):
    indices = INDICES[0].clone()
    indices[3, 2] = wild
    query, keys, values = randn(T, K), randn(N, K, seed=1), randn(N, V, seed=2)
    with pytest.raises(RuntimeError, match=rf"^selected_scores: indices must be in \[-1, {N}\), got {wild}$"):
        mk.selected_scores(query, keys, indices, backend=native)
    with pytest.raises(RuntimeError, match=rf"^selected_read: indices must be in \[-1, {N}\), got {wild}$"):
        mk.selected_read(query, keys, values, indices, backend=native)


def indexer_scores(query, weights, keys, scale):
    """query [T, H, K], weights [T, H], keys [N, K] -> [T, N], head by head."""
    s = query.new_zeros(query.shape[0], keys.shape[0])
    for h in range(query.shape[1]):
        s = s + weights[:, h, None] * (scale * query[:, h] @ keys.T).clamp(min=0)
    return s


@pytest.mark.parametrize(("heads", "tokens"), [(H, 1), (H, T), (1, 40), (17, 70), (33, 3)])
def test_indexer_search(backend, heads, tokens):
    query, weights = randn(tokens, heads, K), randn(tokens, heads, seed=1)
    for slots, count in ((N, k), (N, N + 3), (300, 11)):
        keys, mask = randn(slots, K, seed=2), randn(slots, seed=3)
        scores, indices = mk.indexer_search(query, weights, keys, count, slot_mask=mask, backend=backend)
        wanted = indexer_scores(query, weights, keys, K**-0.5) + mask
        best = torch.sort(wanted, dim=-1, descending=True, stable=True)
        found = min(count, slots)
        assert torch.equal(indices[:, :found], best.indices[:, :found]) and (indices[:, found:] == -1).all()
        close(scores[:, :found], best.values[:, :found])
        assert torch.isneginf(scores[:, found:]).all()


def test_one_head_of_weight_one_with_positive_products_is_topk_search(backend):
    query, keys = randn(B, T, K).abs(), randn(N, K, seed=1).abs()
    got = mk.indexer_search(query.unsqueeze(-2), torch.ones(B, T, 1).double(), keys, k, backend=backend)
    wanted = mk.topk_search(query, keys, k, backend="reference")
    assert torch.equal(got[1], wanted[1])
    close(got[0], wanted[0])


def test_equal_scores_go_to_the_smaller_slot(backend):
    """Most products are below zero, so that most scores are 0 and tie."""
    query, keys = randn(60, H, K).abs().round(), -randn(400, K, seed=1).abs().round()
    keys[::50] *= -1
    weights = torch.ones(60, H).double()
    got = mk.indexer_search(query.float(), weights.float(), keys.float(), 40, scale=1.0, backend=backend)
    best = torch.sort(indexer_scores(query, weights, keys, 1.0), dim=-1, descending=True, stable=True)
    assert torch.equal(got[1], best.indices[:, :40]) and torch.equal(got[0].double(), best.values[:, :40])


def test_indexer_gradients(backend):
    """Of the chosen scores, those of the equation; keys shared by streams."""
    leaves = [randn(B, T, H, K), randn(B, T, H, seed=1), randn(N, K, seed=2), randn(N, seed=3)]
    leaves = [x.requires_grad_() for x in leaves]
    query, weights, keys, mask = leaves
    scores, indices = mk.indexer_search(query, weights, keys, k, slot_mask=mask, scale=0.4, backend=backend)
    plain = torch.stack([indexer_scores(query[b], weights[b], keys, 0.4) for b in range(B)]) + mask
    wanted = torch.gather(plain, -1, indices)
    close(scores.detach(), wanted.detach())
    cotangent = randn(B, T, k, seed=4)
    for a, b in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (scores, wanted))):
        close(a, b)


def test_a_sparse_attention_is_trained_by_its_indexer(backend):
    """indexer_search, then selected_read: with every slot chosen it is the whole attention."""
    query, keys, values = randn(B, T, K), randn(B, N, K, seed=1), randn(B, N, V, seed=2)
    small, weights, index_keys = randn(B, T, H, 4, seed=3), randn(B, T, H, seed=4), randn(B, N, 4, seed=5)
    _, chosen = mk.indexer_search(small, weights, index_keys, N, backend=backend)
    read = mk.selected_read(query, keys, values, chosen, backend=backend)
    close(read, mk.softmax_read(query, keys, values, backend="reference"))
