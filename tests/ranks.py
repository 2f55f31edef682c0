"""Runs checks on several processes that form one group of torch.distributed, and never longer than a limit."""

from __future__ import annotations

import datetime
import importlib
import os
import queue
import time
import traceback
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

TIMEOUT = 20  # seconds that a collective may wait


def run(names: Sequence[str], world: int, folder, limit: float = 55) -> dict[str, str]:
    """Call ``name(mesh)`` for each ``"module.name"``, one after the other, on ``world`` ranks of a mesh named slots.

    Returns what went wrong by name: the tracebacks of the ranks, or that a check did not end in time.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (list(names), world, str(folder / f"group-{world}"), results)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    reports: dict[str, list[str]] = {name: [] for name in names}
    missing, deadline = len(names) * world, time.monotonic() + limit
    while missing and time.monotonic() < deadline:
        try:
            name, error = results.get(timeout=0.2)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
            continue
        missing -= 1
        reports[name].append(error)
    for process in processes:
        process.join(max(min(5, deadline - time.monotonic()), 0.5))
        if process.is_alive():
            process.kill()
    late = f"did not end on all {world} ranks within {limit} s"
    texts = {name: "\n".join(filter(None, errors)) for name, errors in reports.items()}
    return {name: texts[name] + (late if len(errors) < world else "") for name, errors in reports.items()}


class Reports:
    """What went wrong in checks by number of ranks. The processes of a group run once, when first asked for."""

    def __init__(self, names: Sequence[tuple[int, str]], folder):
        self.names, self.folder, self.done = names, folder, {}

    def of(self, world: int) -> dict[str, str]:
        if world not in self.done:
            names = [name for size, name in self.names if size == world]
            self.done[world] = run(names, world, self.folder)
        return self.done[world]


def _work(rank: int, names: list[str], world: int, store: str, results) -> None:
    torch.set_num_threads(1)
    os.environ["TEST_FOLDER"] = os.path.dirname(store)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world)
    limit = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("slots",))
    for name in names:
        module, _, check = name.rpartition(".")
        torch.manual_seed(0)
        error = ""
        try:
            getattr(importlib.import_module(module), check)(mesh)
        except BaseException:
            error = f"rank {rank}: {traceback.format_exc()}"
        results.put((name, error))
    results.close()
    results.join_thread()
    dist.barrier()
    dist.destroy_process_group()


# --- what the checks share ---


def full(x: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, from all ranks."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def dealt(x: torch.Tensor, mesh: DeviceMesh, placements) -> torch.Tensor:
    """``x`` with these placements; None leaves it plain."""
    if placements is None:
        return x.clone()
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def refused(kind: type[Exception], call: Callable[[], object], *parts: str) -> None:
    """``call`` raises ``kind`` in one sentence that has all ``parts``."""
    try:
        call()
    except kind as error:
        text = str(error)
        assert all(part in text for part in parts), (parts, text)
        assert "\n" not in text, text
        return
    raise AssertionError(f"no {kind.__name__}: {parts}")
