"""Equations that softmax_write must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

B, T, N, K, V = 2, 11, 37, 16, 20
ERASE = [1.0, 0.5, 0.0, "tensor"]


def case(*tokens: int, memory: tuple[int, ...] | None = None, t: int = T, n: int = N, dtype=torch.float64):
    """values, keys, query, write."""
    memory = tokens if memory is None else memory
    return (
        randn(*memory, n, V, dtype=dtype),
        randn(*memory, n, K, seed=1, dtype=dtype),
        randn(*tokens, t, K, seed=2, dtype=dtype),
        randn(*tokens, t, V, seed=3, dtype=dtype),
    )


def erase_of(erase, write):
    return torch.sigmoid(randn(*write.shape, seed=9, dtype=write.dtype)) if erase == "tensor" else erase


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize(("t", "n"), [(1, N), (T, N), (130, 2500), (3, 2500)])
def test_equals_the_written_out_definition(backend, erase, t, n):
    values, keys, query, write = case(B, t=t, n=n)
    e, mask = erase_of(erase, write), randn(B, n, seed=5)
    wanted, retained = values, torch.ones(B, n).double()
    for i in range(t):
        s = 0.7 * torch.einsum("bk,bnk->bn", query[:, i], keys) + mask
        a = torch.exp(s) / torch.exp(s).sum(-1, keepdim=True)
        e_t = e[:, None, i] if isinstance(e, torch.Tensor) else e
        wanted = wanted * (1 - a[..., None] * e_t) + a[..., None] * write[:, None, i]
        retained = retained * (1 - a)
    options = {"scale": 0.7, "slot_mask": mask, "erase": e, "return_retained": True, "backend": backend}
    for got, want in zip(mk.softmax_write(values, keys, query, write, **options), (wanted, retained)):
        close(got, want)


@pytest.mark.parametrize("erase", ERASE)
def test_equals_slot_write_by_the_addresses(backend, erase):
    values, keys, query, write = case(B)
    e, mask = erase_of(erase, write), torch.rand(B, N, generator=torch.Generator().manual_seed(4)) > 0.4
    weights = mk.address(query, keys, slot_mask=mask, backend=backend)
    got = mk.softmax_write(values, keys, query, write, erase=e, slot_mask=mask, backend=backend)
    close(got, mk.slot_write(values, weights, write, erase=e, backend=backend))


def test_erase_0_is_the_additive_store(backend):
    """All slots together gain the sum of the writes, because the weights of a token sum to 1."""
    values, keys, query, write = case(B)
    new = mk.softmax_write(values, keys, query, write, erase=0.0, backend=backend)
    close((new - values).sum(-2), write.sum(-2))


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_one_after_the_other_equal_one_call(backend, erase, chunk):
    values, keys, query, write = case(B)
    e = erase_of(erase, write)
    whole = mk.softmax_write(values, keys, query, write, erase=e, backend=backend)
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        e_t = e[:, at] if isinstance(e, torch.Tensor) else e
        values = mk.softmax_write(values, keys, query[:, at], write[:, at], erase=e_t, backend=backend)
    close(values, whole)


def test_slots_may_be_permuted(backend):
    values, keys, query, write = case(B)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    new = mk.softmax_write(values, keys, query, write, backend=backend)
    close(mk.softmax_write(values[:, order], keys[:, order], query, write, backend=backend), new[:, order])


def test_a_shared_memory_is_written_in_row_major_order(backend):
    values, keys, query, write = case(2, 3, memory=())
    got = mk.softmax_write(values, keys, query, write, backend=backend)
    for i in range(2):
        for j in range(3):
            values = mk.softmax_write(values, keys, query[i, j], write[i, j], backend=backend)
    close(got, values)


def test_masked_tokens_and_empty_slots(backend):
    values, keys, query, write = case()
    tokens = torch.rand(T, generator=torch.Generator().manual_seed(4)) > 0.4
    slots = torch.rand(N, generator=torch.Generator().manual_seed(5)) > 0.4
    got, retained = mk.softmax_write(
        values, keys, query, write, slot_mask=slots, token_mask=tokens, return_retained=True, backend=backend
    )
    assert torch.equal(got[~slots], values[~slots]) and (retained[~slots] == 1).all()
    close(got[slots], mk.softmax_write(values[slots], keys[slots], query[tokens], write[tokens], backend=backend))


def test_a_memory_without_open_slots_is_kept(backend):
    values, keys, query, write = (x.requires_grad_() for x in case(B))
    new = mk.softmax_write(values, keys, query, write, slot_mask=torch.zeros(N).bool(), backend=backend)
    assert torch.equal(new, values)
    grads = torch.autograd.grad(new.sum(), (values, keys, query, write), materialize_grads=True)
    assert (grads[0] == 1).all() and not any(g.any() for g in grads[1:])


def test_one_slot_that_takes_all_is_replaced_to_the_bit(backend):
    """A weight of exactly 1 replaces, weights of exactly 0 keep, and every gradient is finite."""
    values, keys, query, write = (x.requires_grad_() for x in case(dtype=torch.float32))
    mask = torch.zeros(N)
    mask[5] = 1e4
    new, retained = mk.softmax_write(values, keys, query, write, slot_mask=mask, return_retained=True, backend=backend)
    others = torch.arange(N) != 5
    assert torch.equal(new[5], write[-1]) and torch.equal(new[others], values[others])
    assert retained[5] == 0 and (retained[others] == 1).all()
    for gradient in torch.autograd.grad(new.sum() + retained.sum(), (values, keys, query, write)):
        assert torch.isfinite(gradient).all()


def test_what_a_dominant_slot_keeps_has_all_its_digits(native):
    """For a weight a near 1, 1 - a is computed as the sum of the other weights: accurate in float32."""
    values, keys, query, write = case(dtype=torch.float32, t=1)
    mask = torch.zeros(N)
    mask[7] = 30.0
    retained = mk.softmax_write(values, keys, query, write, slot_mask=mask, return_retained=True, backend=native)[1]
    s = K**-0.5 * (query.double() @ keys.double().T)[0] + mask
    others = torch.arange(N) != 7
    exact = torch.exp(s[others]).sum() / torch.exp(s).sum()
    assert 0 < exact < 1e-9 and abs(retained[7].double() / exact - 1) < 1e-5


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_gives_the_same_bits_in_the_same_memory(backend, erase, dtype):
    values, keys, query, write = case(B, dtype=dtype)
    e = erase_of(erase, write)
    wanted = mk.softmax_write(values, keys, query, write, erase=e, return_retained=True, backend=backend)
    address = values.data_ptr()
    got = mk.softmax_write_(values, keys, query, write, erase=e, return_retained=True, backend=backend)
    assert got[0] is values and values.data_ptr() == address
    assert bits(values) == bits(wanted[0]) and bits(got[1]) == bits(wanted[1])


def test_in_place_refuses_what_has_a_gradient(backend):
    values, keys, query, write = case()
    with pytest.raises(
        RuntimeError, match="softmax_write_: no argument may require a gradient, got one; use softmax_write, or"
    ):
        mk.softmax_write_(values, keys.requires_grad_(), query, write, backend=backend)
