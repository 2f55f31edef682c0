"""Equations that gated_scan, cell_scan and memory_scan must obey, checked in float64 on every backend."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

B, T, N, K, V, D = 2, 11, 37, 16, 20, 19
FIRST = [False, True]


def gated(*lead: int, t: int = T, d: int = D, dtype=torch.float64):
    """forget, update, initial."""
    forget = torch.sigmoid(randn(*lead, t, d, seed=1)).to(dtype)
    return forget, randn(*lead, t, d, seed=2, dtype=dtype), randn(*lead, d, seed=3, dtype=dtype)


def cell(*lead: int, t: int = T, d: int = D, dtype=torch.float64):
    """inputs, weight, initial."""
    weight = (d**-0.5 * randn(3 * d, d, seed=2)).to(dtype)
    return randn(*lead, t, 3 * d, seed=1, dtype=dtype), weight, randn(*lead, d, seed=3, dtype=dtype)


def memory(*tokens: int, own: tuple[int, ...] | None = None, t: int = T, dtype=torch.float64):
    """values, keys, read_query, write_query, write."""
    own = tokens if own is None else own
    return (
        randn(*own, N, V, dtype=dtype),
        randn(*own, N, K, seed=1, dtype=dtype),
        randn(*tokens, t, K, seed=2, dtype=dtype),
        randn(*tokens, t, K, seed=3, dtype=dtype),
        randn(*tokens, t, V, seed=4, dtype=dtype),
    )


def tokens_of(x, at):
    """The tokens ``at`` of the three tensors of a memory scan that have tokens."""
    return [y[..., at, :] for y in x[2:]]


def test_gated_scan_equals_the_written_out_definition(backend):
    forget, update, initial = gated(B)
    h = initial.clone()
    states = mk.gated_scan(forget, update, initial, backend=backend)
    for t in range(T):
        for b in range(B):
            for d in range(D):
                h[b, d] = forget[b, t, d] * h[b, d] + update[b, t, d]
        close(states[:, t], h)


def test_gated_scan_is_the_sum_of_updates_times_what_they_keep(backend):
    """h_T = prod_t f_t h_0 + sum_t (prod_{s > t} f_s) u_t."""
    forget, update, initial = gated(B)
    kept = torch.stack([forget[:, t:].prod(-2) for t in range(T + 1)], -2)
    wanted = kept[:, 0] * initial + (kept[:, 1:] * update).sum(-2)
    close(mk.gated_scan(forget, update, initial, backend=backend)[:, -1], wanted)


def test_cell_scan_equals_the_written_out_definition(backend):
    inputs, weight, initial = cell(B)
    states = mk.cell_scan(inputs, weight, initial, backend=backend)
    for b in range(B):
        h = initial[b]
        for t in range(T):
            z = inputs[b, t] + weight @ h
            f, i, c = 1 / (1 + torch.exp(-z[:D])), 1 / (1 + torch.exp(-z[D : 2 * D])), torch.tanh(z[2 * D :])
            h = f * h + i * c
            close(states[b, t], h)


def test_cell_scan_without_recurrence_is_a_gated_scan(backend):
    inputs, weight, initial = cell(B)
    f, i, c = inputs.chunk(3, -1)
    wanted = mk.gated_scan(torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(c), initial, backend=backend)
    close(mk.cell_scan(inputs, torch.zeros_like(weight), initial, backend=backend), wanted)


@pytest.mark.parametrize("read_first", FIRST)
def test_memory_scan_equals_the_written_out_definition(backend, read_first):
    values, keys, reader, writer, write = memory(B)
    reads, new = mk.memory_scan(values, keys, reader, writer, write, scale=0.3, read_first=read_first, backend=backend)
    for b in range(B):
        v = values[b]
        for t in range(T):
            a = 1 / (1 + torch.exp(-0.3 * keys[b] @ writer[b, t]))
            e = torch.exp(0.3 * keys[b] @ reader[b, t])
            after = v * (1 - a[:, None]) + a[:, None] * write[b, t]
            close(reads[b, t], (e / e.sum()) @ (v if read_first else after))
            v = after
        close(new[b], v)


@pytest.mark.parametrize("read_first", FIRST)
@pytest.mark.parametrize("masked", [False, True])
def test_memory_scan_is_a_write_and_a_read_for_every_token(backend, read_first, masked):
    x = memory(B)
    mask = randn(B, N, seed=5).masked_fill(randn(N) > 1, -torch.inf) if masked else None
    live = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    got, new = mk.memory_scan(*x, slot_mask=mask, token_mask=live, read_first=read_first, backend=backend)
    v, reads = x[0], []
    for t in range(T):
        reader, writer, write = tokens_of(x, slice(t, t + 1))
        on = None if live is None else live[:, t : t + 1]
        after = mk.gated_write(v, x[1], writer, write, slot_mask=mask, token_mask=on, backend=backend)
        read = mk.softmax_read(reader, x[1], v if read_first else after, slot_mask=mask, backend=backend)
        reads.append(read if on is None else read.masked_fill(~on.unsqueeze(-1), 0))
        v = after
    close(got, torch.cat(reads, -2))
    close(new, v)


@pytest.mark.parametrize("read_first", FIRST)
def test_a_shared_memory_takes_streams_in_row_major_order(backend, read_first):
    x = memory(2, 3, own=())
    reads, new = mk.memory_scan(*x, read_first=read_first, backend=backend)
    values = x[0]
    for i in range(2):
        for j in range(3):
            one = [y[i, j] for y in x[2:]]
            read, values = mk.memory_scan(values, x[1], *one, read_first=read_first, backend=backend)
            close(reads[i, j], read)
    close(new, values)


def test_a_memory_shared_across_an_outer_dimension(backend):
    x = memory(2, 3, own=(3,))
    reads, new = mk.memory_scan(*x, backend=backend)
    for j in range(3):
        folded = [y[:, j].flatten(0, 1) for y in x[2:]]
        read, values = mk.memory_scan(x[0][j], x[1][j], *folded, backend=backend)
        close(reads[:, j].flatten(0, 1), read)
        close(new[j], values)


# --- causality: later tokens do not change a bit of earlier results ---


@pytest.mark.parametrize("t", [7, 300])
@pytest.mark.parametrize("late", [torch.nan, 1e30])
def test_no_token_sees_a_later_one(backend, t, late):
    cut = t - t // 3
    f, u, h = gated(t=t, dtype=torch.float32)
    wanted = mk.gated_scan(f, u, h, backend=backend)[:cut]
    f[cut:], u[cut:] = late, late
    assert torch.equal(mk.gated_scan(f, u, h, backend=backend)[:cut], wanted)

    x, w, h = cell(t=t, dtype=torch.float32)
    wanted = mk.cell_scan(x, w, h, backend=backend)[:cut]
    x[cut:] = late
    assert torch.equal(mk.cell_scan(x, w, h, backend=backend)[:cut], wanted)

    for read_first in FIRST:
        x = memory(t=t, dtype=torch.float32)
        wanted = mk.memory_scan(*x, read_first=read_first, backend=backend)[0][:cut]
        for y in x[2:]:
            y[cut:] = late
        assert torch.equal(mk.memory_scan(*x, read_first=read_first, backend=backend)[0][:cut], wanted)


# --- a scan in parts, with the state carried on ---


@pytest.mark.parametrize("first", [0, 1, 100, 190, 299])
def test_two_parts_equal_the_whole(backend, first):
    f, u, h = gated(B, t=300)
    whole = mk.gated_scan(f, u, h, backend=backend)
    left = mk.gated_scan(f[:, :first], u[:, :first], h, backend=backend)
    right = mk.gated_scan(f[:, first:], u[:, first:], left[:, -1] if first else h, backend=backend)
    close(torch.cat([left, right], 1), whole)

    x, w, h = cell(B, t=300)
    whole = mk.cell_scan(x, w, h, backend=backend)
    left = mk.cell_scan(x[:, :first], w, h, backend=backend)
    right = mk.cell_scan(x[:, first:], w, left[:, -1] if first else h, backend=backend)
    close(torch.cat([left, right], 1), whole)


@pytest.mark.parametrize("read_first", FIRST)
@pytest.mark.parametrize("first", [0, 1, 95, 96, 200])
def test_two_memory_scans_equal_the_whole(backend, read_first, first):
    x = memory(B, t=205)
    reads, new = mk.memory_scan(*x, read_first=read_first, backend=backend)
    parts, values = [], x[0]
    for at in (slice(0, first), slice(first, 205)):
        read, values = mk.memory_scan(values, x[1], *tokens_of(x, at), read_first=read_first, backend=backend)
        parts.append(read)
    close(torch.cat(parts, -2), reads)
    close(values, new)


def test_no_tokens_change_nothing(backend):
    f, u, h = gated(B, t=0)
    assert mk.gated_scan(f, u, h, backend=backend).shape == (B, 0, D)
    x, w, h = cell(B, t=0)
    assert mk.cell_scan(x, w, h, backend=backend).shape == (B, 0, D)
    x = memory(B, t=0)
    reads, new = mk.memory_scan(*x, backend=backend)
    assert reads.shape == (B, 0, V) and torch.equal(new, x[0]) and new.data_ptr() != x[0].data_ptr()


# --- gates of 0 and 1, and masks ---


def test_gates_of_0_and_1_are_exact(backend):
    f, u, h = gated(B, t=9, dtype=torch.float32)
    assert torch.equal(mk.gated_scan(torch.zeros_like(f), u, h, backend=backend), u)
    kept = mk.gated_scan(torch.ones_like(f), torch.zeros_like(u), h, backend=backend)
    assert torch.equal(kept, h.unsqueeze(-2).expand(B, 9, D))


def test_a_gate_of_1_replaces_and_of_0_keeps(backend):
    values, keys, reader, writer, write = memory(dtype=torch.float32)
    for score, wanted in ((1e4, write[-1].expand(N, V)), (-1e4, values)):
        keys[:, 0], writer[:, 0] = 1.0, score
        keys[:, 1:], writer[:, 1:] = 0.0, 0.0
        reads, new = mk.memory_scan(values, keys, reader, writer, write, backend=backend)
        assert torch.equal(new, wanted)
        close(reads, write if score > 0 else values.mean(0).expand(T, V), 1e-6)


@pytest.mark.parametrize("read_first", FIRST)
def test_masked_tokens_are_as_if_absent_and_read_0(backend, read_first):
    x = memory(t=300)
    live = torch.rand(300, generator=torch.Generator().manual_seed(4)) > 0.4
    for y in x[2:]:
        y[~live] = torch.nan
    reads, new = mk.memory_scan(*x, token_mask=live, read_first=read_first, backend=backend)
    some, wanted = mk.memory_scan(*x[:2], *tokens_of(x, live), read_first=read_first, backend=backend)
    close(reads[live], some)
    close(new, wanted)
    assert not reads[~live].any()


@pytest.mark.parametrize("read_first", FIRST)
def test_empty_slots_are_as_if_absent_and_keep_what_they_hold(backend, read_first):
    x = memory(B)
    mask = randn(N) < 0.5
    x[0][:, ~mask], x[1][:, ~mask] = torch.nan, torch.nan
    reads, new = mk.memory_scan(*x, slot_mask=mask, read_first=read_first, backend=backend)
    few = (x[0][:, mask], x[1][:, mask], *x[2:])
    wanted, some = mk.memory_scan(*few, read_first=read_first, backend=backend)
    close(reads, wanted)
    close(new[:, mask], some)
    assert new[:, ~mask].isnan().all()


@pytest.mark.parametrize("read_first", FIRST)
def test_slots_may_be_permuted(backend, read_first):
    x, order = memory(B), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    reads, new = mk.memory_scan(*x, read_first=read_first, backend=backend)
    moved, permuted = mk.memory_scan(x[0][:, order], x[1][:, order], *x[2:], read_first=read_first, backend=backend)
    close(moved, reads)
    close(permuted, new[:, order])


def test_a_memory_without_addressable_slots_reads_0(backend):
    x = memory(B)
    nothing = torch.zeros(N, dtype=torch.bool)
    reads, new = mk.memory_scan(*x, slot_mask=nothing, backend=backend)
    assert not reads.any() and torch.equal(new, x[0])
    reads, new = mk.memory_scan(x[0][:, :0], x[1][:, :0], *x[2:], backend=backend)
    assert not reads.any() and reads.shape == (B, T, V) and new.shape == (B, 0, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_gates_stay_finite_for_thousands_of_tokens(backend, dtype):
    """States, and all gradients."""
    t = 3000
    signs = (torch.randint(2, (t, D), generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)

    def finite(results, leaves):
        assert all(torch.isfinite(r).all() for r in results)
        for g in torch.autograd.grad([r.float().sum() for r in results], leaves):
            assert torch.isfinite(g).all()

    f, u, h = ((signs > 0).to(dtype), randn(t, D).to(dtype), randn(D).to(dtype))
    leaves = [y.requires_grad_() for y in (f, u, h)]
    finite([mk.gated_scan(*leaves, backend=backend)], leaves)

    x, w, h = (100 * randn(t, 3 * D).to(dtype), randn(3 * D, D).to(dtype), randn(D).to(dtype))
    leaves = [y.requires_grad_() for y in (x, w, h)]
    finite([mk.cell_scan(*leaves, backend=backend)], leaves)

    leaves = [y.to(dtype).requires_grad_() for y in memory(t=t)]
    finite(mk.memory_scan(*leaves, scale=300.0, backend=backend), leaves)
