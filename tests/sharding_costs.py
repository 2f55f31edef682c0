"""Checks of what calls on DTensors move, refuse and cost, called on every rank by tests/test_sharding.py."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from ranks import dealt, full, refused
from sharding_checks import INDICES, KEYS, MASK, QUERY, RANGE, S1, VALUES, WRITE, N, T, randn
from support import bits, close
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.profiler import ProfilerActivity, profile

import memkernels as mk
from memkernels import _collectives, _over_ranks, registration
from memkernels._scale import exchanged
from memkernels.integrations.distributed import check_ranks, shard_slots, traffic
from memkernels.registration import OPS


def recorded(call, *arguments) -> tuple[int, list[tuple[str, list[int]]]]:
    """Bytes that :func:`traffic` counts of a call, and the collectives of gloo with their shapes by the profiler."""
    with traffic() as moved, profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call(*arguments)
    events = [(e.name[5:], e.input_shapes[0]) for e in seen.events() if e.name.startswith("gloo:")]
    return sum(moved.values()), events


def received(events, ranks: int, itemsize: int) -> int:
    """The bytes that a rank receives by these collectives."""
    share = {"all_gather": ranks - 1, "all_to_all": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
    return sum(math.ceil(share[name] * math.prod(shape) * itemsize) for name, shape in events)


def gradients(*tensors: torch.Tensor) -> None:
    torch.autograd.grad(mk.softmax_read(*tensors).sum(), tensors)


def bytes_of_a_call(mesh: DeviceMesh) -> None:
    """Bar 2: what moves does not depend on the number of slots, and stays below the bounds of the contract."""
    tokens, width, columns, best, size = 16, 8, 12, 5, 4
    ranks, rank = mesh.size(), mesh.get_local_rank(0)
    share = 2 * (ranks - 1) / ranks
    query = torch.randn(tokens, width).requires_grad_()
    seen = {}
    for slots in (1000, 1_000_000):
        block = -(-slots // ranks)
        rows = max(min(block, slots - rank * block), 0)
        keys, values = (shard_slots(torch.randn(rows, d), mesh, local=True).requires_grad_() for d in (width, columns))
        plain = torch.randn(tokens, columns)
        with torch.no_grad():
            read = recorded(mk.softmax_read, query, keys, values)
            search = recorded(mk.topk_search, query, keys, best)
            silent = [recorded(mk.gated_write, values, keys, query, plain)]
            silent.append(recorded(mk.slot_usage, query, keys, torch.zeros(tokens)))
        both = recorded(gradients, query, keys, values)
        assert 0 < read[0] <= share * tokens * (columns + 1) * size
        assert 0 < search[0] <= share * tokens * best * (size + 8)
        assert 0 < both[0] - read[0] <= share * tokens * width * size
        assert read[0] == exchanged(tokens, (columns + 1) * size, ranks)  # as the calculator has it
        assert search[0] == exchanged(tokens, best * (size + 8), ranks)
        assert silent == [(0, []), (0, [])]
        for (moved, events), itemsize in ((read, size), (search, 1), (both, size)):
            assert received(events, ranks, itemsize) == moved, (events, moved)
            assert all(d < slots // ranks // 2 for _, shape in events for d in shape), events
        seen[slots] = read, search, both
    assert seen[1000] == seen[1_000_000]


def derivatives(mesh: DeviceMesh) -> None:
    """Bar 3: gradcheck and gradgradcheck of the whole as a function of plain tensors that every rank has."""
    on = _collectives.ranks("test", mesh, 0)
    keys, values, query = randn(5, 2, seed=1), randn(5, 2, seed=2), randn(2, 2, seed=3)

    def sharded(x: torch.Tensor) -> torch.Tensor:
        block = -(-x.shape[0] // on.size)
        first = min(block * on.rank, x.shape[0])
        own = _over_ranks.part(x, 0, first, min(first + block, x.shape[0]), on)
        return _over_ranks.wrap(own, mesh, (Shard(0),), tuple(x.shape))

    def whole(x: torch.Tensor) -> torch.Tensor:
        own = _over_ranks.unwrapped(x)
        block = -(-x.shape[0] // on.size)
        first = min(block * on.rank, x.shape[0])
        return _over_ranks.whole(own, 0, first, first + own.shape[0], x.shape[0], on)

    functions = {
        "softmax_read": lambda q, x, v: mk.softmax_read(q, sharded(x), sharded(v), return_lse=True),
        "topk_read": lambda q, x, v: mk.topk_read(q, sharded(x), sharded(v), 3, return_lse=True),
        "topk_search": lambda q, x, v: mk.topk_search(q, sharded(x), 3)[0],
        "gated_write": lambda q, x, v: whole(mk.gated_write(sharded(v), sharded(x), q, q)),
    }
    for function in functions.values():
        inputs = [x.clone().requires_grad_() for x in (query, keys, values)]
        torch.manual_seed(0)  # the directions that the second check draws are those of every rank
        assert torch.autograd.gradcheck(function, inputs)
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(function, inputs)


def refusals(mesh: DeviceMesh) -> None:
    """What cannot be computed where the tensors lie raises one sentence, and moves nothing."""
    keys, values = shard_slots(KEYS, mesh), shard_slots(VALUES, mesh)
    by_width = dealt(KEYS, mesh, [S1])
    read = mk.softmax_read
    with traffic() as moved:
        refused(ValueError, lambda: read(QUERY, by_width, VALUES), "softmax_read: keys", "along K")
        refused(ValueError, lambda: read(QUERY, keys, VALUES), "softmax_read: values", "along N", "plain tensor")
        refused(ValueError, lambda: read(dealt(QUERY, mesh, [S1]), keys, values), "one axis", "T of query", "N of keys")
        refused(NotImplementedError, lambda: read(QUERY, keys, values, backend="reference"), "'reference'", "sharded")
        mask = MASK.clone().requires_grad_()
        refused(ValueError, lambda: read(QUERY, keys, values, slot_mask=mask), "slot_mask must be sharded along N")
        refused(NotImplementedError, lambda: mk.softmax_write(values, keys, QUERY, WRITE), "softmax_write: slots")
        scan = lambda: mk.memory_scan(values, keys, QUERY, QUERY, WRITE)  # noqa: E731
        refused(NotImplementedError, scan, "memory_scan: slots must be replicated")
        refused(NotImplementedError, lambda: mk.address(QUERY, keys), "address: slots must be replicated")
        undeclared = replace(
            OPS["softmax_read"], name="undeclared", over_slots=""
        )  # a new op that does not say how its shards merge
        given = [QUERY, keys, values, None, None]
        call = registration.call
        refused(NotImplementedError, lambda: call(undeclared, given, (1.0,), "auto"), "slots must be replicated")
        gates = dealt(QUERY.sigmoid(), mesh, [S1])
        refused(ValueError, lambda: mk.gated_scan(gates, gates), "gated_scan: forget", "along T")
        partial = DTensor.from_local(KEYS, mesh, [Partial()])
        refused(ValueError, lambda: read(QUERY, partial, values), "softmax_read: keys", "Partial")
        refused(RuntimeError, lambda: mk.sparse_read(values, INDICES + N, INDICES.double()), "sparse_read", "indices")
        refused(ValueError, lambda: read(QUERY, keys, values[:, :3].redistribute(mesh, [Shard(1)])), "one axis")
        other = DeviceMesh("cpu", [1, 0])
        refused(ValueError, lambda: read(QUERY, keys, shard_slots(VALUES, other)), "values must be on the mesh of keys")
        flat = keys.clone().requires_grad_()
        refused(ValueError, lambda: mk.topk_read(QUERY, flat, values, 2, sparse_grad=True), "sparse_grad", "sharded")
    assert {op for op, _ in moved} <= {"test"}, moved


def one_rank(mesh: DeviceMesh) -> None:
    """Bars 4 and 5: a mesh of one rank gives the bits of plain tensors, for at most 100 us a call more."""
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("rest", "one"))["one"]
    q, x, v, w = (t.float() for t in (QUERY, KEYS, VALUES, WRITE))
    sx, sv = shard_slots(x, alone), shard_slots(v, alone)
    for function in (
        lambda x, v: mk.softmax_read(q, x, v, slot_range=RANGE),
        lambda x, v: mk.topk_read(q, x, v, 3),
        lambda x, v: mk.topk_search(q, x, 3)[1],
        lambda x, v: mk.gated_write(v, x, q, w),
        lambda x, v: mk.softmax_write(v, x, q, w),
        lambda x, v: mk.memory_scan(v, x, q, q, w)[0],
    ):
        got = function(sx, sv)
        assert bits(got.to_local() if isinstance(got, DTensor) else got) == bits(function(x, v))

    def seconds(x, v) -> float:
        begun = time.perf_counter()
        for _ in range(50):
            mk.softmax_read(q, x, v)
        return (time.perf_counter() - begun) / 50

    seconds(sx, sv), seconds(x, v)
    more = statistics.median(seconds(sx, sv) - seconds(x, v) for _ in range(11))
    assert more <= 100e-6, f"{more * 1e6:.0f} us"


def checked_ranks(mesh: DeviceMesh) -> None:
    """Bar 7: calls that differ over ranks raise on all of them, and those that do not differ run."""
    keys, values = shard_slots(KEYS, mesh), shard_slots(VALUES, mesh)
    rank = mesh.get_local_rank(0)
    with check_ranks():
        close(mk.softmax_read(QUERY, keys, values), mk.softmax_read(QUERY, KEYS, VALUES), 1e-12)
        few = QUERY[:, : T - rank]
        refused(
            ValueError, lambda: mk.softmax_read(few, keys, values), "softmax_read", "[2, 6, 4]", "[2, 5, 4]", "slots"
        )
        refused(ValueError, lambda: mk.topk_search(QUERY, keys, 3 + rank), "topk_search", "3, ", "4, ")
    close(mk.softmax_read(QUERY, keys, values), mk.softmax_read(QUERY, KEYS, VALUES), 1e-12)


def groups_that_are_gone(mesh: DeviceMesh) -> None:
    """A mesh that equals an earlier one, whose group was destroyed, is used with its own group."""
    for _ in range(2):
        group = dist.new_group()
        again = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("slots",))
        keys, values = shard_slots(KEYS, again), shard_slots(VALUES, again)
        close(mk.softmax_read(QUERY, keys, values), mk.softmax_read(QUERY, KEYS, VALUES), 1e-12)
        dist.destroy_process_group(group)


def low_precision(mesh: DeviceMesh) -> None:
    """Autocast, and a tensor of scales beside 16-bit queries, which doubles the keys."""
    q, x, v, scale = (
        QUERY.float(),
        KEYS.float(),
        VALUES.float(),
        torch.rand(T, generator=torch.Generator().manual_seed(1)),
    )
    sx, sv = shard_slots(x, mesh), shard_slots(v, mesh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = mk.softmax_read(q, sx, sv), mk.softmax_read(q, x, v)
        assert got.dtype == wanted.dtype == torch.bfloat16
        close(got.float(), wanted.float(), 2e-2)
    low = [t.bfloat16() for t in (q, x, v)]
    spread = [shard_slots(t, mesh) for t in low[1:]]
    for function in (
        lambda x, v: mk.softmax_read(low[0], x, v, scale=scale),
        lambda x, v: mk.topk_read(low[0], x, v, 3, scale=scale),
        lambda x, v: mk.gated_write(v, x, low[0], low[2][:T], scale=scale),
    ):
        close(full(function(*spread)).float(), function(*low[1:]).float(), 2e-2)
