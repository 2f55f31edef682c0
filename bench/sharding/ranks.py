"""Processes of gloo on this machine, and what is timed in them."""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import memkernels as mk
from memkernels import _collectives
from memkernels.integrations.distributed import shard_slots, traffic

TOKENS, WIDTH, BEST = 8, 32, 8
ROUNDS = 15


def run(work: Callable[[DeviceMesh], dict], world: int, limit: float = 300) -> dict:
    """What ``work(mesh)`` returns on rank 0 of ``world`` processes of one thread each."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "group")
        processes = [context.Process(target=_join, args=(r, world, store, work, results)) for r in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            raise RuntimeError(f"bench sharding: {world} ranks must end well, got exit codes {failed}")
        return results.get()


def _join(rank: int, world: int, store: str, work: Callable[[DeviceMesh], dict], results) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=wait)
    found = work(init_device_mesh("cpu", (world,), mesh_dim_names=("slots",)))
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def median_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """The median over rounds; a round calls ``repeats`` times."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - begun) / repeats)
    return statistics.median(rounds)


def memory(slots: int, mesh: DeviceMesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of this rank's slots, drawn where they lie."""
    block = -(-slots // mesh.size())
    rank = mesh.get_local_rank(0)
    rows = max(min(block, slots - rank * block), 0)
    generator = torch.Generator().manual_seed(rank)
    keys, values = (shard_slots(torch.randn(rows, WIDTH, generator=generator), mesh, local=True) for _ in range(2))
    return keys, values


def query() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))


# --- what the ranks do ---


def moved(mesh: DeviceMesh) -> dict:
    """Bytes that rank 0 receives, by call and number of slots."""
    found = {}
    for slots in (1000, 1_000_000):
        keys, values = memory(slots, mesh)
        calls = {
            "read": lambda k=keys, v=values: mk.softmax_read(query(), k, v),
            "search": lambda k=keys: mk.topk_search(query(), k, BEST),
            "write": lambda k=keys, v=values: mk.gated_write(v, k, query(), query()),
            "usage": lambda k=keys: mk.slot_usage(query(), k, torch.zeros(TOKENS)),
        }
        for name, call in calls.items():
            with traffic() as meter:
                call()
            found[f"{name} of {slots}"] = sum(meter.values())
        leaf = query().requires_grad_()
        read = mk.softmax_read(leaf, keys, values)
        with traffic() as meter:
            read.sum().backward()
        found[f"backward of {slots}"] = sum(meter.values())
    return found


def read_seconds(mesh: DeviceMesh, slots: int) -> dict:
    """Seconds of a read of ``slots`` over the ranks."""
    keys, values = memory(slots, mesh)
    with torch.no_grad():
        return {"seconds": median_seconds(lambda: mk.softmax_read(query(), keys, values))}


def strong(mesh: DeviceMesh) -> dict:
    return read_seconds(mesh, 1 << 20)


def weak(mesh: DeviceMesh) -> dict:
    return read_seconds(mesh, (1 << 19) * mesh.size())


def overhead(mesh: DeviceMesh) -> dict:
    """Seconds of a small read of plain tensors, and of the same on a mesh of one rank."""
    keys, values = memory(1000, mesh)
    plain = keys.to_local().clone(), values.to_local().clone()
    with torch.no_grad():
        return {
            "plain": median_seconds(lambda: mk.softmax_read(query(), *plain), 100),
            "one rank": median_seconds(lambda: mk.softmax_read(query(), keys, values), 100),
        }


def differences(mesh: DeviceMesh) -> dict:
    """Largest differences from one process, float64, relative to the largest number; and whether bits agree."""
    on = _collectives.ranks("bench", mesh, 0)
    x, v, w = (
        torch.randn(n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in (1001, 1001, TOKENS)
    )
    q = query().double()
    sx, sv = shard_slots(x, mesh), shard_slots(v, mesh)

    def gradients(function, *inputs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    found = {}
    for name, function in (("read", mk.softmax_read), ("topk_read", lambda *t: mk.topk_read(*t, BEST))):
        got, wanted = function(q, sx, sv), function(q, x, v)
        found[name] = _relative(got, wanted)
        pairs = zip(gradients(function, q, sx, sv), gradients(function, q, x, v))
        found[f"{name} gradients"] = max(_relative(getattr(a, "full_tensor", lambda a=a: a)(), b) for a, b in pairs)
        everywhere = _collectives.all_objects(got.numpy().tobytes(), on)
        found[f"{name}: same bits on all ranks and in two runs"] = len(set(everywhere)) == 1 and torch.equal(
            got, function(q, sx, sv)
        )
    got = mk.gated_write(sv, sx, q, w)
    found["written bits are those of one process"] = torch.equal(got.full_tensor(), mk.gated_write(v, x, q, w))
    found["slots found are those of one process"] = torch.equal(
        mk.topk_search(q, sx, BEST)[1], mk.topk_search(q, x, BEST)[1]
    )
    return found


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()
