"""A rank that stalls or is killed ends the calls of the others, in bounded time and with a sentence that says where."""

from __future__ import annotations

import datetime
import os
import queue
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

import memkernels as mk
from memkernels.integrations.distributed import shard_slots

WORLD, STALL = 3, 4  # ranks, and the seconds that the group of the stalled rank waits
LIMIT = 50


def _work(rank: int, store: str, results) -> None:
    """The last rank comes too late for the first call, and is killed before the second."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=wait)
    for name, seconds in (("stalled", STALL), ("killed", 30)):
        group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(name,))
        keys, values = (shard_slots(torch.randn(16, 4), mesh) for _ in range(2))
        mk.softmax_read(torch.randn(3, 4), keys, values)
        dist.barrier()
        if rank == WORLD - 1:
            if name == "stalled":
                time.sleep(STALL + 3)
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        try:
            mk.softmax_read(torch.randn(3, 4), keys, values)
            text = "no error"
        except RuntimeError as error:
            text = str(error)
        results.put((name, rank, time.monotonic() - begun, text))


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    context = mp.get_context("spawn")
    results = context.Queue()
    store = str(tmp_path_factory.mktemp("ranks") / "group")
    processes = [context.Process(target=_work, args=(rank, store, results), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    found, deadline = [], time.monotonic() + LIMIT
    while len(found) < 2 * (WORLD - 1) and time.monotonic() < deadline:
        try:
            found.append(results.get(timeout=0.5))
        except queue.Empty:
            continue
    for process in processes:
        process.kill()
        process.join()
    return found


@pytest.mark.parametrize("name, limit", [("stalled", STALL + 1), ("killed", 5)])
def test_a_lost_rank_ends_the_others(failures, name, limit):
    calls = [call for call in failures if call[0] == name]
    assert len(calls) == WORLD - 1, failures
    for _, rank, seconds, text in calls:
        assert text.startswith("softmax_read: all_to_all over group "), text
        assert f"group '{name}' must reach all of its {WORLD} ranks, got on rank {rank}: " in text, text
        assert seconds <= limit, (seconds, text)
