"""paged_topk_search: pages in any order, in one call or in many, are one memory."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, F, S, K, k = 2, 9, 7, 12, 5, 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # one integer holds score and slot, or two do


def memory(pages, whole):
    """The frames that hold ``pages`` of ``whole [.., N, K]``; NaN where a frame holds none."""
    rows = whole.unflatten(-2, (-1, S))[..., pages.clamp(min=0), :, :]
    return rows.masked_fill((pages < 0)[:, None, None], torch.nan)


def shuffled(pages, seed=0):
    return torch.randperm(pages, generator=torch.Generator().manual_seed(seed))


def carried(scores, slots):
    return {"best_scores": scores, "best_slots": slots}


@pytest.mark.parametrize("tokens", [1, 9, 40, 150])
@pytest.mark.parametrize("rounded", [False, True])
@DTYPES
def test_the_order_of_pages_does_not_matter(backend, tokens, rounded, dtype):
    """Also where most scores are equal: the smaller slot number wins, not the earlier frame."""
    query, whole = randn(B, tokens, K).to(dtype), randn(B, F * S, K, seed=1).to(dtype)
    if rounded:
        query, whole = query.round(), whole.round()
    wanted = mk.topk_search(query.double(), whole.double(), k, scale=1.0, backend="reference")
    for seed in range(4):
        pages = shuffled(F, seed)
        scores, slots = mk.paged_topk_search(query, memory(pages, whole), pages, k, scale=1.0, backend=backend)
        assert torch.equal(slots, wanted[1])
        close(scores.double(), wanted[0], TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 9, 150])
@pytest.mark.parametrize("run", [1, 2, 5])
@pytest.mark.parametrize("rounded", [False, True])
@DTYPES
def test_runs_that_carry_what_was_found_are_one_search(backend, tokens, run, rounded, dtype):
    query, whole = randn(B, tokens, K).to(dtype), randn(B, F * S, K, seed=1).to(dtype)
    if rounded:
        query, whole = query.round(), whole.round()
    pages, best = shuffled(F), {}
    for first in range(0, F, run):
        part = pages[first : first + run]
        found = mk.paged_topk_search(query, memory(part, whole), part, 20, scale=1.0, **best, backend=backend)
        best = carried(*found)
    scores, slots = found
    wanted = mk.topk_search(query.double(), whole.double(), 20, scale=1.0, backend="reference")
    assert torch.equal(slots, wanted[1])
    close(scores.double(), wanted[0], TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 40])
@DTYPES
def test_fewer_than_k_found_before_set_no_threshold(backend, tokens, dtype):
    """Every new slot is worse than what was found, and still among the best k."""
    query, keys = torch.ones(tokens, 1, dtype=dtype), -torch.arange(2 * S, dtype=dtype).view(2, S, 1)
    first = mk.paged_topk_search(query, keys[:1], torch.tensor([0]), 20, scale=1.0, backend=backend)
    assert int((first[1] >= 0).sum()) == S * tokens
    _, slots = mk.paged_topk_search(
        query, keys[1:], torch.tensor([1]), 20, scale=1.0, **carried(*first), backend=backend
    )
    assert torch.equal(slots, torch.arange(20).expand(tokens, -1))


def test_frames_without_a_page_are_not_read(backend):
    query, whole = randn(B, T, K), randn(B, F * S, K, seed=1)
    pages = torch.tensor([3, -1, 0, -1, 6])
    scores, slots = mk.paged_topk_search(query, memory(pages, whole), pages, 40, backend=backend)
    mask = torch.zeros(F, S, dtype=torch.bool)
    mask[[3, 0, 6]] = True
    wanted = mk.topk_search(query, whole, 40, slot_mask=mask.flatten(), backend="reference")
    assert torch.equal(slots, wanted[1]) and (slots[..., -4:] == -1).all()
    close(scores, wanted[0])


@pytest.mark.parametrize("page", [2**20, 2**32, 2**50])
@pytest.mark.parametrize("tokens", [1, 30])
@DTYPES
def test_slot_numbers_of_a_large_memory(backend, page, tokens, dtype):
    """Slot numbers beyond 32 bits, on both sides of that border."""
    query, whole = randn(tokens, K).round().to(dtype), randn(F * S, K, seed=1).round().to(dtype)
    pages = shuffled(F)
    near = page // S - 3 + pages
    found = mk.paged_topk_search(query, memory(pages, whole), near, k, scale=1.0, backend=backend)
    wanted = mk.topk_search(query, whole, k, scale=1.0, backend="reference")
    assert torch.equal(found[1], wanted[1] + (page // S - 3) * S) and torch.equal(found[0], wanted[0])
    again = mk.paged_topk_search(
        query, memory(pages[:1], whole), pages[:1], k, scale=1.0, **carried(*found), backend=backend
    )
    assert (again[0] >= found[0]).all()


def test_numbers_of_infinity_and_nan(backend):
    """NaN ranks first, an infinite score before finite ones, in what was found before too; -inf is nothing."""
    query, keys = torch.ones(1, 1), torch.tensor([[1.0], [torch.inf], [2.0], [torch.nan]]).view(2, 2, 1)
    best = torch.tensor([[torch.nan, 3.0, -torch.inf, 9.0, 0.0]]), torch.tensor([[100, 101, 102, -1, 103]])
    scores, slots = mk.paged_topk_search(
        query, keys, torch.tensor([5, 3]), 5, scale=1.0, **carried(*best), backend=backend
    )
    assert slots.tolist() == [[7, 100, 11, 101, 6]]
    assert scores[0, :2].isnan().all() and scores[0, 2:].tolist() == [torch.inf, 3.0, 2.0]


def test_a_page_that_is_named_twice_ends(backend):
    """It is against the contract; the result is some slots of the memory, and the call returns."""
    query, keys = randn(70, K), randn(1, S, K, seed=1).expand(300, S, K)
    pages = torch.zeros(300, dtype=torch.int64)
    scores, slots = mk.paged_topk_search(query, keys, pages, 20, backend=backend)
    assert ((slots >= 0) & (slots < S)).all() and scores.isfinite().all()


def test_the_gradient_reaches_chosen_rows_and_earlier_scores(backend):
    """As if both were one memory, searched at once."""
    whole = randn(F * S, K, seed=1, dtype=torch.float64)
    pages, cut = shuffled(F), 4
    query = randn(T, K, dtype=torch.float64).requires_grad_()
    keys = memory(pages, whole).requires_grad_()
    first = mk.paged_topk_search(query, keys[:cut], pages[:cut], k, backend=backend)
    scores, slots = mk.paged_topk_search(query, keys[cut:], pages[cut:], k, **carried(*first), backend=backend)
    weights = randn(T, k, seed=3, dtype=torch.float64)
    got = torch.autograd.grad((scores * weights).sum(), [query, keys])
    once, at = mk.paged_topk_search(query, keys, pages, k, backend="reference")
    assert torch.equal(slots, at)
    for g, w in zip(got, torch.autograd.grad((once * weights).sum(), [query, keys])):
        close(g, w)


def test_best_must_be_whole(backend):
    query, keys, pages = randn(T, K).float(), randn(F, S, K).float(), torch.arange(F)
    with pytest.raises(ValueError, match=r"^paged_topk_search: best_slots must be \[..., T=9, k=6\], got \[9, 3\]$"):
        best = carried(torch.zeros(T, k), torch.zeros(T, 3, dtype=torch.int64))
        mk.paged_topk_search(query, keys, pages, k, **best, backend=backend)
    with pytest.raises(TypeError, match="^paged_topk_search: best_scores and best_slots must come together, got None "):
        mk.paged_topk_search(query, keys, pages, k, best_scores=torch.zeros(T, k), backend=backend)


@pytest.mark.parametrize("wrong", [-2, 2**62 // S, 2**63 - 1, -(2**63)])
def test_page_numbers_that_are_none_are_refused_by_the_kernel(wrong):
    query, keys, pages = randn(T, K).float(), randn(F, S, K).float(), torch.arange(F)
    pages[3] = wrong
    with pytest.raises(RuntimeError, match="^paged_topk_search: pages must be in"):
        mk.paged_topk_search(query, keys, pages, k, backend="cpu")


def test_slots_found_before_that_are_none_are_refused_by_the_kernel():
    query, keys, pages = randn(T, K).float(), randn(F, S, K).float(), torch.arange(F)
    best = carried(torch.zeros(T, k), torch.full((T, k), -2))
    with pytest.raises(RuntimeError, match="^paged_topk_search: the slots of best must be in"):
        mk.paged_topk_search(query, keys, pages, k, **best, backend="cpu")
