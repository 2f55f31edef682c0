"""Equations that gated_write must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

B, T, N, K, V = 2, 11, 37, 16, 20
ERASE = [1.0, 0.5, 0.0, "tensor"]


def case(*tokens: int, memory: tuple[int, ...] | None = None, t: int = T, dtype=torch.float64):
    """values, keys, query, write."""
    memory = tokens if memory is None else memory
    return (
        randn(*memory, N, V, dtype=dtype),
        randn(*memory, N, K, seed=1, dtype=dtype),
        randn(*tokens, t, K, seed=2, dtype=dtype),
        randn(*tokens, t, V, seed=3, dtype=dtype),
    )


def erase_of(erase, write):
    return torch.sigmoid(randn(*write.shape, seed=9, dtype=write.dtype)) if erase == "tensor" else erase


def part(erase, at):
    return erase[..., at, :] if isinstance(erase, torch.Tensor) else erase


def loop(values, keys, query, write, erase, scale=K**-0.5, mask=None):
    """The definition as a loop over the tokens, each slot on its own."""
    values = values.clone()
    retained = torch.ones(values.shape[:-1], dtype=values.dtype)
    for t in range(query.shape[-2]):
        s = scale * torch.einsum("...k,...nk->...n", query[..., t, :], keys) + (0 if mask is None else mask)
        a = 1 / (1 + torch.exp(-s))
        e = erase[..., None, t, :] if isinstance(erase, torch.Tensor) else erase
        values = values * (1 - a[..., None] * e) + a[..., None] * write[..., None, t, :]
        retained = retained * (1 - a)
    return values, retained


@pytest.mark.parametrize("erase", ERASE)
def test_equals_the_written_out_definition(backend, erase):
    values, keys, query, write = case(B)
    e, mask = erase_of(erase, write), randn(B, N, seed=5)
    got = mk.gated_write(
        values, keys, query, write, erase=e, slot_mask=mask, scale=0.7, return_retained=True, backend=backend
    )
    for g, w in zip(got, loop(values, keys, query, write, e, 0.7, mask)):
        close(g, w)


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_one_after_the_other_equal_one_call(backend, erase, chunk):
    values, keys, query, write = case(B)
    e = erase_of(erase, write)
    whole, retained = mk.gated_write(values, keys, query, write, erase=e, return_retained=True, backend=backend)
    product = torch.ones(B, N).double()
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        values, kept = mk.gated_write(
            values, keys, query[:, at], write[:, at], erase=part(e, at), return_retained=True, backend=backend
        )
        product = product * kept
    close(values, whole)
    close(product, retained)


@pytest.mark.parametrize("number", [0.0, 0.25, 1.0])
def test_a_constant_erase_tensor_equals_the_number(backend, number):
    values, keys, query, write = case(B)
    wanted = mk.gated_write(values, keys, query, write, erase=number, return_retained=True, backend=backend)
    tensor = torch.full_like(write, number)
    for got, want in zip(
        mk.gated_write(values, keys, query, write, erase=tensor, return_retained=True, backend=backend), wanted
    ):
        close(got, want)


def test_erase_0_adds_the_gated_sum(backend):
    values, keys, query, write = case(B)
    gates = mk.address(query, keys, gate="sigmoid", backend=backend)
    close(mk.gated_write(values, keys, query, write, erase=0.0, backend=backend), values + gates.mT @ write)


def test_writing_the_same_content_interpolates_towards_it(backend):
    """With erase 1 and one content for all tokens: new = retained * old + (1 - retained) * content."""
    values, keys, query, write = case(B)
    write = write[:, :1].expand(B, T, V)
    new, retained = mk.gated_write(values, keys, query, write, return_retained=True, backend=backend)
    close(new, retained.unsqueeze(-1) * values + (1 - retained).unsqueeze(-1) * write[:, :1])


@pytest.mark.parametrize("erase", ERASE)
def test_retained_is_the_product_of_closed_gates_whatever_erase_is(backend, erase):
    values, keys, query, write = case(B)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) > 0.4
    retained = mk.gated_write(
        values, keys, query, write, erase=erase_of(erase, write), token_mask=mask, return_retained=True, backend=backend
    )[1]
    gates = mk.address(query, keys, gate="sigmoid", backend=backend) * mask.unsqueeze(-1)
    close(retained, (1 - gates).prod(-2))


@pytest.mark.parametrize("erase", ERASE)
def test_masked_tokens_are_as_if_absent(backend, erase):
    values, keys, query, write = case()
    e = erase_of(erase, write)
    mask = torch.rand(T, generator=torch.Generator().manual_seed(4)) > 0.4
    got = mk.gated_write(values, keys, query, write, erase=e, token_mask=mask, backend=backend)
    close(got, mk.gated_write(values, keys, query[mask], write[mask], erase=part(e, mask), backend=backend))


@pytest.mark.parametrize("erase", ERASE)
def test_empty_slots_keep_their_content_to_the_bit(backend, erase):
    values, keys, query, write = case(dtype=torch.float32)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(4)) > 0.4
    got, retained = mk.gated_write(
        values, keys, query, write, erase=erase_of(erase, write), slot_mask=mask, return_retained=True, backend=backend
    )
    assert torch.equal(got[~mask], values[~mask])
    assert (retained[~mask] == 1).all()


@pytest.mark.parametrize("erase", ERASE)
def test_a_shared_memory_is_written_in_row_major_order(backend, erase):
    values, keys, query, write = case(2, 3, memory=())
    e = erase_of(erase, write)
    got = mk.gated_write(values, keys, query, write, erase=e, backend=backend)
    flat = [x.flatten(0, 2) if isinstance(x, torch.Tensor) else x for x in (query, write, e)]
    close(got, mk.gated_write(values, keys, flat[0], flat[1], erase=flat[2], backend=backend))
    for i in range(2):
        for j in range(3):
            one = e[i, j] if isinstance(e, torch.Tensor) else e
            values = mk.gated_write(values, keys, query[i, j], write[i, j], erase=one, backend=backend)
    close(got, values)


def test_a_middle_dimension_may_be_the_shared_one(backend):
    values, keys, query, write = case(2, 3, memory=(2, 1))
    got = mk.gated_write(values, keys, query, write, backend=backend)
    assert got.shape == (2, 1, N, V)
    for i in range(2):
        close(
            got[i, 0],
            mk.gated_write(values[i, 0], keys[i, 0], query[i].flatten(0, 1), write[i].flatten(0, 1), backend=backend),
        )


@pytest.mark.parametrize("erase", [1.0, "tensor of ones"])
def test_open_and_closed_gates_are_exact(backend, erase):
    """A gate of exactly 1 that erases all replaces, of exactly 0 keeps; gradients stay finite."""
    values, keys, query, write = (x.requires_grad_() for x in case(dtype=torch.float32))
    mask = torch.zeros(N)
    mask[:10], mask[10:20] = torch.inf, -torch.inf
    e = torch.ones_like(write) if isinstance(erase, str) else erase
    new, retained = mk.gated_write(
        values, keys, query, write, erase=e, slot_mask=mask, return_retained=True, backend=backend
    )
    assert torch.equal(new[:10], write[-1:].expand(10, V)) and torch.equal(new[10:20], values[10:20])
    assert (retained[:10] == 0).all() and (retained[10:20] == 1).all()
    for gradient in torch.autograd.grad(new.sum() + retained.sum(), (values, keys, query, write)):
        assert torch.isfinite(gradient).all()


def test_no_tokens_change_nothing(backend):
    values, keys, query, write = case(B, t=0)
    new, retained = mk.gated_write(values, keys, query, write, return_retained=True, backend=backend)
    assert torch.equal(new, values) and new.data_ptr() != values.data_ptr()
    assert (retained == 1).all()


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_gives_the_same_bits_in_the_same_memory(backend, erase, dtype):
    values, keys, query, write = case(B, dtype=dtype)
    e = erase_of(erase, write)
    wanted = mk.gated_write(values, keys, query, write, erase=e, return_retained=True, backend=backend)
    address = values.data_ptr()
    got = mk.gated_write_(values, keys, query, write, erase=e, return_retained=True, backend=backend)
    assert got[0] is values and values.data_ptr() == address
    assert bits(values) == bits(wanted[0]) and bits(got[1]) == bits(wanted[1])


def test_in_place_writes_views_and_counts_versions(backend):
    whole = randn(B, N + 4, V + 6)
    before = whole.clone()
    values, keys, query, write = whole[:, 2:-2, 3:-3], *case(B)[1:]
    wanted = mk.gated_write(values, keys, query, write, backend=backend)
    version = whole._version
    mk.gated_write_(values, keys, query, write, backend=backend)
    close(values, wanted)
    assert whole._version > version
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[:, 2:-2, 3:-3] = True
    assert torch.equal(whole[~inside], before[~inside])


def test_in_place_refuses_what_has_a_gradient(backend):
    values, keys, query, write = case()
    with pytest.raises(RuntimeError, match="gated_write_: no argument may require a gradient, got one"):
        mk.gated_write_(values, keys.requires_grad_(), query, write, backend=backend)
    with torch.no_grad():
        mk.gated_write_(values, keys, query, write, backend=backend)
    with torch.inference_mode():
        mk.gated_write_(values.clone(), keys, query, write, backend=backend)


def test_in_place_refuses_memory_that_overlaps_itself(backend):
    values, keys, query, write = case(B)
    with pytest.raises((RuntimeError, ValueError)):
        mk.gated_write_(values[:1].expand(B, N, V), keys, query, write, backend=backend)


@pytest.mark.parametrize("erase", [1.0, 0.6])
@pytest.mark.parametrize("with_retained", [False, True])
def test_gradients_of_slots_that_forget_all_but_the_last_tokens(backend, erase, with_retained):
    """Tokens whose suffix product is zero may be skipped; the first one that is not needs the content before it."""
    tokens, slots = 500, 200
    shapes = [(slots, V), (slots, K), (tokens, K), (tokens, V)]
    inputs = [randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    mask = torch.zeros(slots)
    mask[:64], mask[64:70], mask[150:] = 2, -8, -6  # tiles in which all slots forget, all but six, and none
    mask[5], mask[100] = torch.inf, -torch.inf
    live = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) > 0.2
    d_new, d_retained = randn(slots, V, seed=5), randn(slots, seed=6)

    def gradients(dtype, backend):
        own = [x.to(dtype).requires_grad_() for x in (*inputs, mask)]
        new, retained = mk.gated_write(
            *own[:4], erase=erase, slot_mask=own[4], token_mask=live, return_retained=True, scale=0.5, backend=backend
        )
        loss = (new * d_new.to(dtype)).sum() + (retained * d_retained.to(dtype)).sum() * with_retained
        return torch.autograd.grad(loss, own)

    for got, want in zip(gradients(torch.float32, backend), gradients(torch.float64, "reference")):
        assert torch.isfinite(want).all()
        close(got.double() / want.abs().max(), want / want.abs().max(), 1e-5)


@pytest.mark.parametrize("erase", [1.0, 0.5])
@pytest.mark.parametrize("distance", [20, 64, 100, 192])
def test_a_token_long_ago_is_left_out_only_where_no_digit_of_the_result_shows_it(backend, erase, distance):
    """Gates of 1/2: each later token shrinks what a token wrote; token ``at`` writes so much that it counts."""
    tokens, slots, at = 300, 70, 299 - distance
    values, write = randn(slots, V, dtype=torch.float32), 1 + randn(tokens, V, seed=1, dtype=torch.float32).abs()
    keys, query = randn(slots, K, seed=2, dtype=torch.float32), torch.zeros(tokens, K)
    left = 1 - erase / 2  # share of the content that one token leaves
    share = 0.5 * torch.tensor(left, dtype=torch.float64) ** torch.arange(tokens - 1, -1, -1)
    for size in range(-26, 26):
        now = write.clone()
        now[at] *= 2.0**size / left ** min(distance, 90)
        new = mk.gated_write(values, keys, query, now, erase=erase, backend=backend)
        wanted = (share[:, None] * now.double()).sum(0).expand(slots, V)  # all terms are positive
        torch.testing.assert_close(new.double(), wanted, rtol=3e-6, atol=0)
    for extreme in (torch.nan, torch.inf):
        if left**distance < 2.0**-110:
            continue
        now[at, 3] = extreme
        new = mk.gated_write(values, keys, query, now, erase=erase, backend=backend)
        assert not new[:, 3].isfinite().any() and new[:, 4].isfinite().all()


def test_the_smallest_share_that_is_retained_has_its_digits(backend):
    """Some slots retain 2^-60, others 2^-120; each is compared relative to itself."""
    values, keys, query, write = case(t=100, dtype=torch.float32)
    mask = torch.linspace(-1, 0.3, N)
    _, retained = mk.gated_write(
        values, keys, query, write, slot_mask=mask, scale=0.5 * K**-0.5, return_retained=True, backend=backend
    )
    wanted = loop(*(x.double() for x in (values, keys, query, write)), 1.0, 0.5 * K**-0.5, mask.double())[1]
    assert wanted.min() < 2.0**-110 and wanted.max() > 2.0**-70
    torch.testing.assert_close(retained.double(), wanted, rtol=1e-4, atol=2.0**-125)
