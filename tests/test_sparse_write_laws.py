"""Equations that sparse_write must obey, checked in float64 on every backend."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from support import bits, close, randn

import memkernels as mk

B, T, N, V, k = 2, 11, 37, 20, 5
ERASE = [1.0, 0.5, 0.0, "tensor"]


def case(*tokens: int, memory: tuple[int, ...] | None = None, t: int = T, n: int = N, dtype=torch.float64):
    """values, indices, weights, write."""
    memory = tokens if memory is None else memory
    random = torch.Generator().manual_seed(1)
    return (
        randn(*memory, n, V, dtype=dtype),
        torch.randint(-1, n, (*tokens, t, k), generator=random),
        torch.rand((*tokens, t, k), generator=random, dtype=torch.float64).to(dtype),
        randn(*tokens, t, V, seed=2, dtype=dtype),
    )


def erase_of(erase, write):
    return torch.sigmoid(randn(*write.shape, seed=9, dtype=write.dtype)) if erase == "tensor" else erase


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("t", [T, 900])
def test_equals_the_written_out_definition(native, erase, t):
    """With many tokens each slot has more entries than lie between two checkpoints of the backward pass."""
    values, indices, weights, write = case(B, t=t, n=7)
    e = erase_of(erase, write)
    wanted = values.clone()
    for b in range(B):
        for i in range(t):
            for j in range(k):
                slot, a = int(indices[b, i, j]), weights[b, i, j]
                if slot >= 0:
                    e_t = e[b, i] if isinstance(e, torch.Tensor) else e
                    wanted[b, slot] = wanted[b, slot] * (1 - a * e_t) + a * write[b, i]
    close(mk.sparse_write(values, indices, weights, write, erase=e, backend=native), wanted)


@pytest.mark.parametrize("erase", ERASE)
def test_all_slots_named_once_give_the_slot_write(backend, erase):
    values, _, _, write = case(B)
    e = erase_of(erase, write)
    weights = torch.sigmoid(randn(B, T, N, seed=4))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).expand(B, T, N)
    got = mk.sparse_write(values, order, weights.gather(-1, order), write, erase=e, backend=backend)
    close(got, mk.slot_write(values, weights, write, erase=e, backend=backend))


@pytest.mark.parametrize("erase", [1.0, 0.3, "tensor"])
@pytest.mark.parametrize("t", [T, 150])
def test_gradients_of_slots_that_are_named_often(native, erase, t):
    values, indices, weights, write = case(t=t, n=3)
    e = erase_of(erase, write)
    leaves = [x.requires_grad_() for x in (values, weights, write, *([e] if erase == "tensor" else []))]
    grads = [
        torch.autograd.grad(mk.sparse_write(values, indices, weights, write, erase=e, backend=b).square().sum(), leaves)
        for b in (native, "reference")
    ]
    for got, want in zip(*grads):
        close(got, want)


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("shared", [False, True])
def test_a_masked_token_is_as_if_absent(backend, erase, shared):
    """Whatever its weights and its write hold, NaN too; the others keep every bit, in place as well."""
    values, indices, weights, write = case(B, memory=() if shared else None)
    e = erase_of(erase, write)
    mask = torch.arange(T) % 3 != 1
    hidden = [x.clone() for x in (weights, write, e) if isinstance(x, torch.Tensor)]
    for x in hidden:
        x[:, ~mask] = torch.nan
    leaves = [x.requires_grad_() for x in (values.clone(), *hidden)]
    options = {"erase": leaves[3] if erase == "tensor" else erase, "token_mask": mask, "backend": backend}
    got = mk.sparse_write(leaves[0], indices, *leaves[1:3], **options)
    left = [x[:, mask].clone().requires_grad_() for x in (weights, write, e) if isinstance(x, torch.Tensor)]
    few = [values.clone().requires_grad_(), *left]
    kept = few[3] if erase == "tensor" else erase
    wanted = mk.sparse_write(few[0], indices[:, mask], *few[1:3], erase=kept, backend=backend)
    assert bits(got) == bits(wanted)
    for i, (a, b) in enumerate(
        zip(*(torch.autograd.grad(r.square().sum(), x) for r, x in ((got, leaves), (wanted, few))))
    ):
        close(a if i == 0 else a[:, mask], b)
        assert i == 0 or (a[:, ~mask] == 0).all()
    own = values.clone()
    options["erase"] = leaves[3].detach() if erase == "tensor" else erase
    mk.sparse_write_(own, indices, *(x.detach() for x in leaves[1:3]), **options)
    assert bits(own) == bits(got)


def test_an_index_of_minus_one_is_as_if_absent(backend):
    values, indices, weights, write = case(B)
    write = write.clone()
    indices[:, 3], write[:, 3], weights[:, 3] = -1, torch.nan, torch.nan
    keep = torch.arange(T) != 3
    got = mk.sparse_write(values, indices, weights, write, backend=backend)
    close(got, mk.sparse_write(values, indices[:, keep], weights[:, keep], write[:, keep], backend=backend))


def test_duplicates_within_a_token_are_applied_in_order(backend):
    values, write = randn(4, V), randn(1, V)
    got = mk.sparse_write(values, torch.tensor([[2, 2]]), torch.tensor([[0.25, 0.5]]).double(), write, backend=backend)
    half = values[2] * 0.75 + 0.25 * write[0]
    close(got[2], half * 0.5 + 0.5 * write[0])


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_one_after_the_other_equal_one_call(backend, erase, chunk):
    values, indices, weights, write = case(B)
    e = erase_of(erase, write)
    whole = mk.sparse_write(values, indices, weights, write, erase=e, backend=backend)
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        one = e[:, at] if isinstance(e, torch.Tensor) else e
        values = mk.sparse_write(values, indices[:, at], weights[:, at], write[:, at], erase=one, backend=backend)
    close(values, whole)


def test_a_shared_memory_is_written_in_row_major_order(backend):
    values, indices, weights, write = case(2, 3, memory=())
    got = mk.sparse_write(values, indices, weights, write, backend=backend)
    for i in range(2):
        for j in range(3):
            values = mk.sparse_write(values, indices[i, j], weights[i, j], write[i, j], backend=backend)
    close(got, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_exactly_0_and_1_are_exact(backend, dtype):
    """A slot written with weight 1 holds what was written, bit for bit; with weight 0 what it held."""
    values, _, _, write = case(B, dtype=dtype)
    indices = torch.arange(T).expand(B, T).unsqueeze(-1)
    weights = torch.ones(B, T, 1, dtype=dtype)
    weights[:, ::2] = 0
    new = mk.sparse_write(values, indices, weights, write, backend=backend)
    wanted = values.clone()
    wanted[:, 1:T:2] = write[:, 1::2]
    assert bits(new) == bits(wanted)


def test_slots_that_nobody_names_keep_their_bits(backend):
    values, indices, weights, write = case(B, n=500, dtype=torch.bfloat16)
    new = mk.sparse_write(values, indices, weights, write, backend=backend)
    for b in range(B):
        others = torch.ones(500, dtype=torch.bool)
        others[indices[b][indices[b] >= 0]] = False
        assert torch.equal(new[b][others], values[b][others]) and not torch.equal(new[b], values[b])


@pytest.mark.parametrize("erase", ERASE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_gives_the_same_bits_in_the_same_memory(backend, erase, dtype):
    values, indices, weights, write = case(B, dtype=dtype)
    e = erase_of(erase, write)
    wanted = mk.sparse_write(values, indices, weights, write, erase=e, backend=backend)
    address, version = values.data_ptr(), values._version
    assert mk.sparse_write_(values, indices, weights, write, erase=e, backend=backend) is values
    assert values.data_ptr() == address and values._version > version and bits(values) == bits(wanted)


def test_in_place_costs_the_same_for_any_number_of_slots(native):
    """64 times the slots may cost more through cache misses, but far less than 64 times."""
    seconds = {}
    for n in (1 << 12, 1 << 18):
        values = torch.zeros(n, V)
        _, indices, weights, write = case(t=64, n=n, dtype=torch.float32)
        runs = []
        for _ in range(15):
            start = time.perf_counter()
            mk.sparse_write_(values, indices, weights, write, backend=native)
            runs.append(time.perf_counter() - start)
        seconds[n] = statistics.median(runs)
    assert seconds[1 << 18] < 8 * seconds[1 << 12], seconds


@pytest.mark.parametrize("wild", [37, -2, 2**40, -(2**63)])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_index_out_of_range_is_refused_and_nothing_is_written(backend, wild, inplace):
    values, indices, weights, write = case(B)
    indices[1, 4, 2], before = wild, values.clone()
    with pytest.raises((RuntimeError, IndexError)):
        (mk.sparse_write_ if inplace else mk.sparse_write)(values, indices, weights, write, backend=backend)
    assert torch.equal(values, before)


def test_in_place_refuses_what_has_a_gradient(backend):
    values, indices, weights, write = case(B)
    with pytest.raises(
        RuntimeError, match="sparse_write_: no argument may require a gradient, got one; use sparse_write, or"
    ):
        mk.sparse_write_(values, indices, weights.requires_grad_(), write, backend=backend)
    with pytest.raises((RuntimeError, ValueError)):
        mk.sparse_write_(values[:1].expand(B, N, V), indices, weights.detach(), write, backend=backend)
