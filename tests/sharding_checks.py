"""Checks of ops on DTensors, called on every rank by test_sharding.py: the whole in one process is the reference."""

from __future__ import annotations

import torch
from ranks import dealt, full
from support import bits, close
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import memkernels as mk
from memkernels import _collectives
from memkernels.integrations.distributed import shard_slots, slot_range
from memkernels.testing import TOLERANCE

B, T, N, K, V, k = 2, 6, 13, 4, 6, 4
R, S0, S1 = Replicate(), Shard(0), Shard(1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEYS, VALUES, WRITE = randn(B, T, K, seed=1), randn(N, K, seed=2), randn(N, V, seed=3), randn(B, T, V, seed=4)
MASK = randn(N, seed=5).masked_fill(torch.arange(N) == 3, -torch.inf)
INDICES = torch.randint(-1, N, (B, T, 3), generator=torch.Generator().manual_seed(6))
WEIGHTS = randn(B, T, 3, seed=7).sigmoid()
RANGE = torch.stack([torch.arange(T) // 2, 2 * torch.arange(T) + 1], -1)
LSE = mk.softmax_read(QUERY, KEYS, VALUES, return_lse=True)[1]

# name -> (function, its tensors, which of them are sharded over slots)
OVER_SLOTS = {
    "softmax_read": (
        lambda q, x, v, m: mk.softmax_read(q, x, v, slot_mask=m, return_lse=True),
        (QUERY, KEYS, VALUES, MASK),
        (0, 1, 1, 1),
    ),
    "softmax_read of a range, with a sink and a scale": (
        lambda q, x, v, s: mk.softmax_read(q, x, v, slot_range=RANGE, sink=s, scale=s.exp(), return_lse=True),
        (QUERY, KEYS, VALUES, randn(T, seed=8)),
        (0, 1, 1, 0),
    ),
    "additive_read": (
        lambda q, x, v, u: mk.additive_read(q, x, v, u, slot_range=RANGE, return_lse=True),
        (QUERY, KEYS, VALUES, randn(K, seed=9)),
        (0, 1, 1, 0),
    ),
    "topk_search": (
        lambda q, x, m: mk.topk_search(q, x, k, slot_mask=m, slot_range=RANGE),
        (QUERY, KEYS, MASK),
        (0, 1, 1),
    ),
    "topk_read": (
        lambda q, x, v, m: mk.topk_read(q, x, v, k, slot_mask=m, return_slots=True, return_lse=True),
        (QUERY, KEYS, VALUES, MASK),
        (0, 1, 1, 1),
    ),
    "indexer_search": (
        lambda q, h, x: mk.indexer_search(q, h, x, k, slot_range=RANGE),
        (randn(T, 2, K, seed=10), randn(T, 2, seed=11), KEYS),
        (0, 0, 1),
    ),
    "sparse_read": (lambda v, w: mk.sparse_read(v, INDICES, w), (VALUES, WEIGHTS), (1, 0)),
    "gather_rows": (lambda v: mk.gather_rows(v, INDICES), (VALUES,), (1,)),
    "selected_read": (
        lambda q, x, v, m: mk.selected_read(
            q, x, v, INDICES, slot_mask=m, sink=0.5, return_lse=True, return_weights=True
        ),
        (QUERY, KEYS, VALUES, MASK),
        (0, 1, 1, 1),
    ),
    "selected_scores": (
        lambda q, x: mk.selected_scores(q, x, INDICES).masked_fill(INDICES < 0, 0),
        (QUERY, KEYS),
        (0, 1),
    ),
    "gated_write": (
        lambda v, x, q, w: mk.gated_write(v, x, q, w, return_retained=True),
        (VALUES, KEYS, QUERY, WRITE),
        (1, 1, 0, 0),
    ),
    "slot_write": (lambda v, a, w: mk.slot_write(v, a, w), (VALUES, randn(B, T, N).sigmoid(), WRITE), (1, 2, 0)),
    "slot_usage": (lambda q, x, lse: mk.slot_usage(q, x, lse), (QUERY, KEYS, LSE), (0, 1, 0)),
    "sparse_write": (
        lambda v, w, x: mk.sparse_write(v, INDICES, w, x),
        (VALUES, WEIGHTS, WRITE),
        (1, 0, 0),
    ),
    "product_key_read": (
        lambda q, s, v: mk.product_key_read(q, s, v, k, return_slots=True, return_lse=True),
        (QUERY, randn(2, 3, 2, seed=12), randn(9, V, seed=13)),
        (0, 0, 1),
    ),
}


def compare(name: str, function, tensors, placements, mesh: DeviceMesh) -> None:
    """Results, gradients and second derivatives equal those of the whole within 1e-12, and lie where arguments lie."""
    plain = [x.clone().requires_grad_() for x in tensors]
    spread = [dealt(x, mesh, p).requires_grad_() for x, p in zip(tensors, placements)]
    wanted, got = (r if isinstance(r, tuple) else (r,) for r in (function(*plain), function(*spread)))
    for a, b in zip(wanted, got):
        close(full(b).detach(), a.detach(), 1e-12)
    live = [i for i, a in enumerate(wanted) if a.requires_grad]
    seeds = [randn(*wanted[i].shape, seed=20 + i) for i in live]

    def gradients(results, inputs):
        asked = [results[i] for i in live]
        given = [dealt(d, mesh, getattr(x, "placements", None)) for d, x in zip(seeds, asked)]
        return torch.autograd.grad(asked, inputs, given, create_graph=True, allow_unused=True)

    first, second = gradients(wanted, plain), gradients(got, spread)
    for a, b, x in zip(first, second, spread):
        close(full(b).detach(), a.detach(), 1e-12)
        assert not isinstance(x, DTensor) or b.placements == x.placements, name
    some = [i for i, a in enumerate(first) if a.requires_grad]
    if not some:
        return
    weights = [randn(*first[i].shape, seed=40 + i) for i in some]
    twice = torch.autograd.grad([first[i] for i in some], plain, weights, allow_unused=True)
    given = [dealt(d, mesh, getattr(second[i], "placements", None)) for d, i in zip(weights, some)]
    again = torch.autograd.grad([second[i] for i in some], spread, given, allow_unused=True)
    for a, b in zip(twice, again):
        if a is not None:
            close(full(b), a, 1e-11)


def over_slots(mesh: DeviceMesh) -> None:
    """Bar 1: every op that slots may be cut for, with its first and second derivatives."""
    places = [None, [S0], [Shard(2)]]
    for name, (function, tensors, sharded) in OVER_SLOTS.items():
        compare(name, function, tensors, [places[s] for s in sharded], mesh)


def other_axes(mesh: DeviceMesh) -> None:
    """Cuts of tokens, leading dimensions and value columns."""
    read = OVER_SLOTS["softmax_read"][0]
    write = OVER_SLOTS["gated_write"][0]
    streams = randn(B * mesh.size(), N, V, seed=30)
    query, tokens = randn(B * mesh.size(), T, K, seed=31), randn(B * mesh.size(), T, V, seed=32)
    memory, plain = (KEYS, VALUES, MASK), (None, None, None)
    compare("V", read, (QUERY, *memory), (None, [R], [S1], None), mesh)
    compare("T", read, (QUERY, *memory), ([S1], *plain), mesh)
    compare("B", read, (query, *memory), ([S0], *plain), mesh)
    compare("a memory per stream", read, (query, KEYS, streams, MASK), ([S0], [R], [S0], None), mesh)
    compare("tokens that write", write, (VALUES, KEYS, QUERY, WRITE), ([R], [R], [S1], [S1]), mesh)
    compare("streams that write", write, (VALUES, KEYS, query, tokens), ([R], [R], [S0], [S0]), mesh)
    compare("own streams write", write, (streams, KEYS, query, tokens), ([S0], [R], [S0], [S0]), mesh)
    compare("columns written", write, (VALUES, KEYS, QUERY, WRITE), ([S1], None, None, [Shard(2)]), mesh)
    compare("topk V", OVER_SLOTS["topk_read"][0], (QUERY, *memory), (None, None, [S1], None), mesh)
    compare(
        "product keys by columns",
        *OVER_SLOTS["product_key_read"][:2],
        (None, None, [S1]),
        mesh,
    )
    scans = (streams, KEYS, query, query + 1, tokens)
    compare("memory_scan", lambda *x: mk.memory_scan(*x), scans, ([S0], [R], [S0], [S0], [S0]), mesh)
    compare("gated_scan", lambda f, u: mk.gated_scan(f, u), (query.sigmoid(), query), ([S0], [S0]), mesh)
    compare("usage", lambda q, x, lse: mk.slot_usage(q, x, lse), (QUERY, KEYS, LSE), ([S1], [R], [S1]), mesh)


def two_dimensions(mesh: DeviceMesh) -> None:
    """A mesh of 2 x 2: two cuts at once, of different axes and of the same."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "slots"))
    read, write, topk = (OVER_SLOTS[name][0] for name in ("softmax_read", "gated_write", "topk_read"))
    inputs = QUERY, KEYS, VALUES, MASK
    data, slots, twice = [S0, R], [R, S0], [S0, S0]
    compare("data x slots", read, inputs, (data, slots, slots, slots), grid)
    compare("slots x V", read, inputs, (None, [S0, R], [S0, S1], [S0, R]), grid)
    compare("slots x slots", read, inputs, (None, twice, twice, twice), grid)
    compare("best of slots x slots", topk, inputs, (None, twice, twice, twice), grid)
    compare("T x T", read, inputs, ([S1, S1], None, None, None), grid)
    compare("written over both", write, (VALUES, KEYS, QUERY, WRITE), (slots, slots, data, data), grid)
    streams = randn(4, T, K, seed=50), randn(4, T, V, seed=51)
    compare("streams x streams", write, (VALUES, KEYS, *streams), (None, None, twice, twice), grid)


def bits_of_one_process(mesh: DeviceMesh) -> None:
    """Writes are local, so they are those of one process to the last bit; reads are the same bits on every rank."""
    on = _collectives.ranks("test", mesh, 0)
    for dtype in (torch.float32, torch.bfloat16):
        q, x, v, w = (t.to(dtype) for t in (QUERY, KEYS, VALUES, WRITE))
        sx, sv = shard_slots(x, mesh), shard_slots(v, mesh)
        for got, wanted in (
            (mk.gated_write(sv, sx, q, w), mk.gated_write(v, x, q, w)),
            (mk.sparse_write(sv, INDICES, WEIGHTS.to(dtype), w), mk.sparse_write(v, INDICES, WEIGHTS.to(dtype), w)),
            (mk.slot_usage(q, sx, LSE.float()), mk.slot_usage(q, x, LSE.float())),
            (mk.gather_rows(sv, INDICES), mk.gather_rows(v, INDICES)),
        ):
            assert bits(full(got)) == bits(wanted), dtype
        kept = sv.clone()
        assert mk.gated_write_(kept, sx, q, w) is kept
        assert bits(full(kept)) == bits(mk.gated_write(v, x, q, w))
        read = mk.softmax_read(q, sx, sv)
        close(read.double(), mk.softmax_read(q.double(), x.double(), v.double()), 2 * TOLERANCE[dtype])
        best, slots, weights = mk.topk_read(q, sx, sv, k, return_slots=True)
        alone = mk.topk_read(q, x, v, k, return_slots=True)
        if dtype == torch.float32:  # in 16 bits equal scores of rounded sums rank by slot
            assert torch.equal(slots, alone[1])
            close(best, alone[0], TOLERANCE[dtype])
            close(weights, alone[2], TOLERANCE[dtype])
        for result in (read, best, weights, slots):
            everywhere = _collectives.all_objects(bits(result), on)
            assert set(everywhere) == {bits(result)}
        assert bits(read) == bits(mk.softmax_read(q, sx, sv))


def compressed(mesh: DeviceMesh) -> None:
    """Keys and values of 8 bits, whose scales may be plain or sharded."""
    x, v = (KEYS * 20).to(torch.int8), (VALUES * 20).to(torch.int8)
    ks, vs = (randn(N, seed=s).abs().float() + 0.5 for s in (60, 61))
    q = QUERY.float()
    sx, sv, sks = shard_slots(x, mesh), shard_slots(v, mesh), shard_slots(ks, mesh)
    for function in (
        lambda x, v, ks, vs: mk.softmax_read(q, x, v, key_scale=ks, value_scale=vs),
        lambda x, v, ks, vs: mk.topk_read(q, x, v, k, key_scale=ks, value_scale=vs),
        lambda x, v, ks, vs: mk.selected_read(q, x, v, INDICES, key_scale=ks, value_scale=vs),
        lambda x, v, ks, vs: mk.gather_rows(v, INDICES, value_scale=vs),
    ):
        close(function(sx, sv, sks, vs), function(x, v, ks, vs), 1e-5)
    subkeys, table = randn(2, 3, 2, seed=62).float(), v[:9]
    wanted = mk.product_key_read(q, subkeys, table, k, value_scale=vs[:9])
    close(mk.product_key_read(q, subkeys, shard_slots(table, mesh), k, value_scale=vs[:9]), wanted, 1e-5)


def ties(mesh: DeviceMesh) -> None:
    """Slots of equal scores on both sides of a border: the smaller slot first, as in one process."""
    x = torch.ones(N, K)
    x[N // 2 :] *= 2
    query = torch.ones(3, K)
    wanted, got = mk.topk_search(query, x, 9), mk.topk_search(query, shard_slots(x, mesh), 9)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert got[1][0, : N - N // 2].tolist() == list(range(N // 2, N))[:9]
    read, slots, _ = mk.topk_read(query, shard_slots(x, mesh), shard_slots(torch.eye(N), mesh), 5, return_slots=True)
    assert slots[0].tolist() == list(range(N // 2, N // 2 + 5))
    close(read[0], torch.eye(N)[N // 2 : N // 2 + 5].mean(0), 1e-6)


def few_slots(mesh: DeviceMesh) -> None:
    """Fewer slots than ranks, or a number that they do not divide; none that may be addressed; NaN in one query."""
    for count in (0, 1, 5, 7):
        x, v = randn(count, K, seed=70), randn(count, V, seed=71)
        sx, sv = shard_slots(x, mesh), shard_slots(v, mesh)
        first, stop = slot_range(sx)
        assert sx.to_local().shape[0] == stop - first
        for got, wanted in zip(
            mk.softmax_read(QUERY, sx, sv, return_lse=True), mk.softmax_read(QUERY, x, v, return_lse=True)
        ):
            close(got, wanted, 1e-12)
        for got, wanted in zip(mk.topk_search(QUERY, sx, 6), mk.topk_search(QUERY, x, 6)):
            close(got, wanted, 1e-12)
        close(full(mk.gated_write(sv, sx, QUERY, WRITE)), mk.gated_write(v, x, QUERY, WRITE), 0)
    sx, sv = shard_slots(KEYS, mesh).requires_grad_(), shard_slots(VALUES, mesh).requires_grad_()
    query = QUERY.clone().requires_grad_()
    read, lse = mk.softmax_read(query, sx, sv, slot_mask=torch.zeros(N, dtype=torch.bool), return_lse=True)
    assert not read.any() and lse.isneginf().all()
    (read.sum() + lse.masked_fill(lse.isneginf(), 0).sum()).backward()
    assert not any(full(x.grad).any() for x in (query, sx, sv))
    broken = QUERY.clone()
    broken[0, 1] = torch.nan
    got, whole = mk.softmax_read(broken, sx, sv).detach(), mk.softmax_read(QUERY, KEYS, VALUES)
    assert got[0, 1].isnan().all()
    got[0, 1] = whole[0, 1] = 0
    close(got, whole, 1e-12)
