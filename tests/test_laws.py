"""Equations that the operations must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, N, K, V = 2, 11, 37, 16, 20


def memory(*lead: int, seed: int = 0):
    return randn(*lead, N, K, seed=seed), randn(*lead, N, V, seed=seed + 1)


def tokens(*lead: int, seed: int = 10):
    return randn(*lead, T, K, seed=seed), randn(*lead, T, V, seed=seed + 1)


def some(*shape: int, share: float = 0.6, seed: int = 0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


# --- reads ---


def test_address_rows_sum_to_one_and_empty_slots_get_nothing(backend):
    query, (keys, _) = tokens(B)[0], memory(B)
    mask = some(B, N)
    weights = mk.address(query, keys, slot_mask=mask, backend=backend)
    close(weights.sum(-1), torch.ones(B, T).double())
    assert (weights[~mask.unsqueeze(1).expand_as(weights)] == 0).all()
    nothing = mk.address(query, keys, slot_mask=torch.zeros(N, dtype=torch.bool), backend=backend)
    assert (nothing == 0).all()


def test_sigmoid_addresses_of_opposite_queries_sum_to_one(backend):
    query, (keys, _) = tokens(B)[0], memory(B)
    opposite = [mk.address(x, keys, gate="sigmoid", backend=backend) for x in (query, -query)]
    close(sum(opposite), torch.ones(B, T, N).double())


def test_softmax_read_is_address_times_values(backend):
    query, (keys, values) = tokens(B)[0], memory(B)
    mask = randn(B, N).masked_fill(~some(B, N), -torch.inf)
    weights = mk.address(query, keys, slot_mask=mask, scale=0.4, backend=backend)
    close(mk.softmax_read(query, keys, values, slot_mask=mask, scale=0.4, backend=backend), weights @ values)


def test_softmax_read_equals_scaled_dot_product_attention(backend):
    query, (keys, values) = randn(2, 3, T, K), memory(2, 3)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    close(mk.softmax_read(query, keys, values, backend=backend), wanted)


@pytest.mark.parametrize("tokens", [3, 40])
def test_ranges_of_slots_merge_though_one_is_empty_and_one_decides(tokens, backend):
    query, keys, values = randn(tokens, K, seed=1), randn(4200, K, seed=2), randn(4200, V, seed=3)
    keys[3000:] *= 40  # with these scores the weights of all other slots are 0
    query[-1] = torch.nan
    mask = torch.zeros(4200).double()
    mask[:1100] = -torch.inf
    read, lse = mk.softmax_read(query, keys, values, slot_mask=mask, return_lse=True, backend=backend)
    scores = K**-0.5 * query @ keys.T + mask
    close(lse[:-1], scores[:-1].logsumexp(-1))
    close(read[:-1], scores[:-1].softmax(-1) @ values)
    assert lse[-1].isnan() and read[-1].isnan().all()


def test_a_read_of_equal_values_is_that_value(backend):
    query, (keys, _) = tokens(B)[0], memory(B)
    close(
        mk.softmax_read(query, keys, torch.full((B, N, V), 1.5).double(), backend=backend),
        torch.full((B, T, V), 1.5).double(),
    )


def test_a_score_offset_moves_lse_and_nothing_else(backend):
    query, (keys, values) = tokens(B)[0], memory(B)
    mask = randn(B, N)
    read, lse = mk.softmax_read(query, keys, values, slot_mask=mask, return_lse=True, backend=backend)
    moved, moved_lse = mk.softmax_read(query, keys, values, slot_mask=mask + 3.0, return_lse=True, backend=backend)
    close(moved, read)
    close(moved_lse, lse + 3.0)


@pytest.mark.parametrize("op", ["softmax_read", "slot_usage", "topk_read", "gated_write"])
def test_the_order_of_slots_does_not_matter(backend, op):
    (query, write), (keys, values) = tokens(B), memory(B)
    mask, order = randn(B, N), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    k, v, m = keys[:, order], values[:, order], mask[:, order]
    if op == "softmax_read":
        close(
            *(
                mk.softmax_read(query, *x, slot_mask=y, backend=backend)
                for x, y in (((k, v), m), ((keys, values), mask))
            )
        )
    elif op == "topk_read":
        close(
            *(
                mk.topk_read(query, *x, 5, slot_mask=y, backend=backend)
                for x, y in (((k, v), m), ((keys, values), mask))
            )
        )
    elif op == "slot_usage":
        lse = mk.softmax_read(query, keys, values, slot_mask=mask, return_lse=True, backend=backend)[1]
        usage = mk.slot_usage(query, keys, lse, slot_mask=mask, backend=backend)
        close(mk.slot_usage(query, k, lse, slot_mask=m, backend=backend), usage[:, order])
    else:
        new = mk.gated_write(values, keys, query, write, slot_mask=mask, backend=backend)
        close(mk.gated_write(v, k, query, write, slot_mask=m, backend=backend), new[:, order])


@pytest.mark.parametrize("cuts", [(0, 37), (0, 10, 37), (0, 1, 2, 36, 37), (0, 0, 37)])
def test_reads_of_disjoint_parts_merge_into_the_whole(backend, cuts):
    query, (keys, values) = tokens(B)[0], memory(B)
    mask = randn(B, N).masked_fill(~some(B, N), -torch.inf)
    parts = [slice(a, b) for a, b in zip(cuts, cuts[1:])]
    both = [
        mk.softmax_read(query, keys[:, p], values[:, p], slot_mask=mask[:, p], return_lse=True, backend=backend)
        for p in parts
    ]
    read, lse = mk.merge_reads([r for r, _ in both], [x for _, x in both], backend=backend)
    whole, whole_lse = mk.softmax_read(query, keys, values, slot_mask=mask, return_lse=True, backend=backend)
    close(read, whole)
    close(lse, whole_lse)


def test_merging_is_associative_and_a_part_that_is_empty_counts_for_nothing(backend):
    reads, lses = randn(4, B, T, V), randn(4, B, T)
    lses[1] = -torch.inf
    whole = mk.merge_reads(reads, lses, backend=backend)
    left, right = (
        mk.merge_reads(reads[:2], lses[:2], backend=backend),
        mk.merge_reads(reads[2:], lses[2:], backend=backend),
    )
    for got, wanted in zip(mk.merge_reads([left[0], right[0]], [left[1], right[1]], backend=backend), whole):
        close(got, wanted)
    without = mk.merge_reads(reads[[0, 2, 3]], lses[[0, 2, 3]], backend=backend)
    close(without[0], whole[0])


def test_gradients_flow_through_a_merge_as_through_the_whole(backend):
    query, (keys, values) = tokens(B)[0], memory(B)
    cotangent = randn(B, T, V, seed=5)

    def gradients(run):
        leaves = [x.clone().requires_grad_() for x in (query, keys, values)]
        return torch.autograd.grad(run(*leaves), leaves, cotangent)

    def merged(q, k, v):
        parts = [
            mk.softmax_read(q, k[:, a:b], v[:, a:b], return_lse=True, backend=backend)
            for a, b in ((0, 9), (9, 20), (20, N))
        ]
        return mk.merge_reads([r for r, _ in parts], [x for _, x in parts], backend=backend)[0]

    for got, wanted in zip(gradients(merged), gradients(lambda q, k, v: mk.softmax_read(q, k, v, backend=backend))):
        close(got, wanted)


def test_usage_sums_to_the_number_of_tokens(backend):
    query, (keys, values) = tokens(3, B)[0], memory(B)
    lse = mk.softmax_read(query, keys, values, return_lse=True, backend=backend)[1]
    usage = mk.slot_usage(query, keys, lse, backend=backend)
    close(usage.sum(-1), torch.full((B,), 3.0 * T).double())
    close(usage, mk.address(query, keys, backend=backend).sum((0, 2)))


def test_shared_slots_read_like_copies_of_them(backend):
    query, (keys, values) = randn(3, B, T, K), memory(B)
    copies = keys.expand(3, B, N, K).contiguous(), values.expand(3, B, N, V).contiguous()
    close(mk.softmax_read(query, keys, values, backend=backend), mk.softmax_read(query, *copies, backend=backend))


def test_gradients_of_a_shared_memory_are_sums_over_its_users(backend):
    query, (keys, values) = randn(3, B, T, K), memory()
    shared = [keys.clone().requires_grad_(), values.clone().requires_grad_()]
    copies = [x.expand(3, B, *x.shape).clone().requires_grad_() for x in (keys, values)]
    cotangent = randn(3, B, T, V, seed=3)
    got = torch.autograd.grad(mk.softmax_read(query, *shared, backend=backend), shared, cotangent)
    wanted = torch.autograd.grad(mk.softmax_read(query, *copies, backend=backend), copies, cotangent)
    for g, w in zip(got, wanted):
        close(g, w.sum((0, 1)))


# --- the k best slots ---


def test_topk_search_is_the_head_of_the_sorted_scores(backend):
    query, (keys, _) = tokens(B)[0], memory(B)
    scores, indices = mk.topk_search(query, keys, 6, scale=1.0, backend=backend)
    wanted = torch.topk(query @ keys.mT, 6)
    close(scores, wanted.values)
    assert torch.equal(indices, wanted.indices)


def test_topk_read_of_all_slots_is_a_softmax_read(backend):
    query, (keys, values) = tokens(B)[0], memory(B)
    mask = randn(B, N).masked_fill(~some(B, N), -torch.inf)
    for k in (N, N + 7):
        read = mk.topk_read(query, keys, values, k, slot_mask=mask, backend=backend)
        close(read, mk.softmax_read(query, keys, values, slot_mask=mask, backend=backend))


def test_topk_read_is_search_softmax_and_sparse_read(backend):
    query, (keys, values) = tokens(B)[0], memory(B)
    read, indices, weights = mk.topk_read(query, keys, values, 5, return_slots=True, backend=backend)
    scores, found = mk.topk_search(query, keys, 5, backend=backend)
    assert torch.equal(indices, found)
    close(weights, scores.softmax(-1))
    close(read, mk.sparse_read(values, indices, weights, backend=backend))


def test_the_k_best_contain_the_k_minus_one_best(backend):
    query, (keys, _) = tokens(B)[0], memory(B)
    found = [mk.topk_search(query, keys, k, backend=backend)[1] for k in (1, 4, 16, N)]
    for fewer, more in zip(found, found[1:]):
        assert torch.equal(fewer, more[..., : fewer.shape[-1]])


def test_topk_gradients_touch_only_the_chosen_rows(backend):
    query, (keys, values) = tokens()[0][:2], memory()
    leaves = [keys.clone().requires_grad_(), values.clone().requires_grad_()]
    read, indices, _ = mk.topk_read(query, *leaves, 3, return_slots=True, backend=backend)
    d_keys, d_values = torch.autograd.grad(read.sum(), leaves)
    untouched = torch.ones(N, dtype=torch.bool).index_fill(0, indices.flatten(), False)
    assert (d_keys[untouched] == 0).all() and (d_values[untouched] == 0).all()
    assert (d_values[~untouched] != 0).any(-1).all()


def test_fewer_slots_than_k_end_in_minus_one(backend):
    query, (keys, values) = tokens()[0], memory()
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[4, 30]] = True
    scores, indices = mk.topk_search(query, keys, 5, slot_mask=mask, backend=backend)
    assert (indices[:, :2].sort(-1).values == torch.tensor([4, 30])).all() and (indices[:, 2:] == -1).all()
    assert torch.isneginf(scores[:, 2:]).all()
    weights = mk.topk_read(query, keys, values, 5, slot_mask=mask, return_slots=True, backend=backend)[2]
    close(weights.sum(-1), torch.ones(T).double())
    assert (weights[:, 2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("slots", [5, 64, 1000, 9001])
def test_ties_go_to_the_smaller_index_across_blocks(backend, dtype, slots):
    keys = torch.zeros(slots, 8, dtype=dtype)
    keys[slots // 2 :: 3] = 1  # two values: the best k are the first of many equal scores, far from the start
    query = torch.ones(3, 8, dtype=dtype)
    indices = mk.topk_search(query, keys, 4, scale=1.0, backend=backend)[1]
    order = [*range(slots // 2, slots, 3), *(i for i in range(slots) if i < slots // 2 or (i - slots // 2) % 3)]
    assert indices.tolist() == [order[:4]] * 3


@pytest.mark.parametrize("order", ["random", "ascending", "one value"])
@pytest.mark.parametrize("open_slots", [1.0, 0.2])
@pytest.mark.parametrize("k", [1, 7, 64, 200, 600])
@pytest.mark.parametrize("t", [3, 70])
def test_search_is_a_stable_sort_whatever_waits_or_passes_first(t, k, open_slots, order):
    """Integers: scores and their many ties are exact, so the order of all k is known. Sizes around those at which
    scores wait for a first threshold, candidate buffers fill, and rows are sorted together."""
    for n in (95, 97, 700, 2100):
        generator = torch.Generator().manual_seed(n)
        query = torch.randint(-2, 3, (t, 3), generator=generator).float()
        keys = torch.randint(-4, 5, (n, 3), generator=generator).float()
        if order == "ascending":
            query, keys = torch.ones(t, 3), torch.arange(float(n))[:, None].expand(n, 3) / 64
        elif order == "one value":
            keys = keys[:1].expand(n, 3)
        mask = torch.rand(n, generator=generator) < open_slots
        scores = (query @ keys.T).masked_fill(~mask, -torch.inf)
        wanted, at = scores.sort(dim=-1, descending=True, stable=True)
        closed = wanted == -torch.inf
        got, indices = mk.topk_search(query, keys, k, scale=1.0, slot_mask=mask, backend="cpu")
        m = min(k, n)
        assert torch.equal(got[:, :m], wanted[:, :m])
        assert torch.equal(indices[:, :m], at.masked_fill(closed, -1)[:, :m])
        assert (indices[:, m:] == -1).all()


def test_cosine_and_l2_search_are_recipes(backend):
    query, (keys, _) = tokens()[0], memory()
    near = mk.topk_search(query, keys, 4, scale=2.0, slot_mask=-(keys**2).sum(-1), backend=backend)[1]
    assert torch.equal(near, torch.cdist(query, keys).topk(4, largest=False).indices)
    unit = torch.nn.functional.normalize
    alike = mk.topk_search(unit(query, dim=-1), unit(keys, dim=-1), 4, scale=1.0, backend=backend)[1]
    cosine = torch.nn.functional.cosine_similarity(query.unsqueeze(1), keys.unsqueeze(0), dim=-1)
    assert torch.equal(alike, cosine.topk(4).indices)


def test_sparse_read_of_all_indices_is_a_matrix_product(backend):
    values, weights = memory(B)[1], randn(B, T, N)
    indices = torch.arange(N).expand(B, T, N)
    close(mk.sparse_read(values, indices, weights, backend=backend), weights @ values)


def test_sparse_read_counts_duplicates_and_ignores_minus_one(backend):
    values = memory()[1]
    indices = torch.tensor([[3, 3, -1, 5]])
    weights = torch.tensor([[1.0, 2.0, torch.nan, 4.0]]).double()
    close(mk.sparse_read(values, indices, weights, backend=backend), 3 * values[3:4] + 4 * values[5:6])
    leaf = values.clone().requires_grad_()
    mk.sparse_read(leaf, indices, weights, backend=backend).sum().backward()
    assert leaf.grad[:, 0].nonzero().flatten().tolist() == [3, 5]
    close(leaf.grad[[3, 5], 0], torch.tensor([3.0, 4.0]).double())
