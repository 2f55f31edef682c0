"""Equations that slot_write must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

B, T, N, K, V = 2, 11, 37, 16, 20
ERASE = [1.0, 0.5, 0.0, "tensor"]


def case(*tokens: int, memory: tuple[int, ...] | None = None, t: int = T, dtype=torch.float64):
    """values, weights, write."""
    memory = tokens if memory is None else memory
    return (
        randn(*memory, N, V, dtype=dtype),
        torch.sigmoid(randn(*tokens, t, N, seed=1)).to(dtype),
        randn(*tokens, t, V, seed=2, dtype=dtype),
    )


def erase_of(erase, write):
    return torch.sigmoid(randn(*write.shape, seed=9, dtype=write.dtype)) if erase == "tensor" else erase


def part(erase, at):
    return erase[..., at, :] if isinstance(erase, torch.Tensor) else erase


@pytest.mark.parametrize("erase", ERASE)
def test_equals_the_written_out_definition(backend, erase):
    values, weights, write = case(B)
    e = erase_of(erase, write)
    got = mk.slot_write(values, weights, write, erase=e, backend=backend)
    wanted = values.clone()
    for b in range(B):
        for t in range(T):
            for i in range(N):
                a, e_t = weights[b, t, i], e[b, t] if isinstance(e, torch.Tensor) else e
                wanted[b, i] = wanted[b, i] * (1 - a * e_t) + a * write[b, t]
    close(got, wanted)


@pytest.mark.parametrize("erase", ERASE)
def test_sigmoid_weights_give_the_gated_write(backend, erase):
    values, _, write = case(B)
    query, keys = randn(B, T, K, seed=4), randn(B, N, K, seed=5)
    gates = mk.address(query, keys, gate="sigmoid", backend=backend)
    e = erase_of(erase, write)
    wanted = mk.gated_write(values, keys, query, write, erase=e, backend=backend)
    close(mk.slot_write(values, gates, write, erase=e, backend=backend), wanted)


@pytest.mark.parametrize("number", [0.0, 0.25, 1.0])
def test_a_constant_erase_tensor_equals_the_number(backend, number):
    values, weights, write = case(B)
    wanted = mk.slot_write(values, weights, write, erase=number, backend=backend)
    close(mk.slot_write(values, weights, write, erase=torch.full_like(write, number), backend=backend), wanted)


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_chunks_one_after_the_other_equal_one_call(backend, erase, chunk):
    values, weights, write = case(B)
    e = erase_of(erase, write)
    whole = mk.slot_write(values, weights, write, erase=e, backend=backend)
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        values = mk.slot_write(values, weights[:, at], write[:, at], erase=part(e, at), backend=backend)
    close(values, whole)


@pytest.mark.parametrize("erase", ERASE)
def test_masked_tokens_are_as_if_absent(backend, erase):
    values, weights, write = case(t=300)
    e = erase_of(erase, write)
    mask = torch.rand(300, generator=torch.Generator().manual_seed(4)) > 0.4
    got = mk.slot_write(values, weights, write, erase=e, token_mask=mask, backend=backend)
    close(got, mk.slot_write(values, weights[mask], write[mask], erase=part(e, mask), backend=backend))


@pytest.mark.parametrize("erase", ERASE)
def test_a_shared_memory_is_written_in_row_major_order(backend, erase):
    values, weights, write = case(2, 3, memory=())
    e = erase_of(erase, write)
    got = mk.slot_write(values, weights, write, erase=e, backend=backend)
    for i in range(2):
        for j in range(3):
            one = e[i, j] if isinstance(e, torch.Tensor) else e
            values = mk.slot_write(values, weights[i, j], write[i, j], erase=one, backend=backend)
    close(got, values)


@pytest.mark.parametrize("erase", ERASE)
def test_slots_may_be_permuted(backend, erase):
    values, weights, write = case(B)
    order, e = torch.randperm(N, generator=torch.Generator().manual_seed(0)), erase_of(erase, write)
    new = mk.slot_write(values, weights, write, erase=e, backend=backend)
    close(mk.slot_write(values[:, order], weights[..., order], write, erase=e, backend=backend), new[:, order])


def test_weights_of_one_replace_and_of_zero_keep(backend):
    values, weights, write = case(dtype=torch.float32)
    weights[:, :10], weights[-1, 10:20], weights[:, 20:30] = 0, 1, 0
    weights[2, 20:30] = 1
    new = mk.slot_write(values, weights, write, backend=backend)
    assert torch.equal(new[:10], values[:10]) and torch.equal(new[10:20], write[-1:].expand(10, V))
    assert torch.equal(new[20:30], write[2:3].expand(10, V))


@pytest.mark.parametrize("erase", [1.0, "tensor"])
def test_gates_saturated_for_thousands_of_tokens_stay_exact(backend, erase):
    """In bfloat16 with float32 content: finite, and a slot holds what was last written with weight 1."""
    t = 3000
    weights = (torch.rand(t, N, generator=torch.Generator().manual_seed(0)) > 0.5).bfloat16()
    values, write = randn(N, V, dtype=torch.float32), randn(t, V, dtype=torch.float32)
    e = torch.ones(t, V) if erase == "tensor" else 1.0
    got = mk.slot_write(values, weights, write, erase=e, backend=backend)
    last = torch.where(weights > 0, torch.arange(t).unsqueeze(-1), -1).amax(0)
    close(got, write[last], 1e-6)


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_gives_the_same_bits_in_the_same_memory(backend, erase, dtype):
    values, weights, write = case(B, dtype=dtype)
    e = erase_of(erase, write)
    wanted = mk.slot_write(values, weights, write, erase=e, backend=backend)
    address, version = values.data_ptr(), values._version
    assert mk.slot_write_(values, weights, write, erase=e, backend=backend) is values
    assert values.data_ptr() == address and values._version > version and bits(values) == bits(wanted)


def test_in_place_writes_views_alone(backend):
    whole = randn(B, N + 4, 2 * V)
    before, (_, weights, write) = whole.clone(), case(B)
    values = whole[:, 2:-2, ::2]
    wanted = mk.slot_write(values, weights, write, backend=backend)
    mk.slot_write_(values, weights, write, backend=backend)
    close(values, wanted)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[:, 2:-2, ::2] = True
    assert torch.equal(whole[~inside], before[~inside])


def test_in_place_refuses_what_has_a_gradient_or_overlaps_itself(backend):
    values, weights, write = case(B)
    with pytest.raises(
        RuntimeError, match="slot_write_: no argument may require a gradient, got one; use slot_write, or"
    ):
        mk.slot_write_(values, weights.requires_grad_(), write, backend=backend)
    with pytest.raises((RuntimeError, ValueError)):
        mk.slot_write_(values[:1].expand(B, N, V), weights.detach(), write, backend=backend)
