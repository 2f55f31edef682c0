"""Slots over several GPUs, joined by NCCL: equality with one GPU, bytes and times. It has not run on GPUs yet.

torchrun --nproc_per_node 4 -m bench.sharding.nccl [--slots 1e8] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import os
import statistics

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import memkernels as mk
from memkernels._scale import read_cost
from memkernels.integrations.distributed import shard_slots, slot_range, traffic

WIDTH = 64


def milliseconds(call, rounds: int = 20) -> float:
    """The median on this GPU."""
    call()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def equality(mesh) -> None:
    """Reads, searches, writes and gradients of a small memory are those of one GPU."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(n, WIDTH, generator=generator).cuda() for n in (32, 10007, 10007))
    spread = [shard_slots(x, mesh).requires_grad_() for x in (keys, values)]
    whole = [x.clone().requires_grad_() for x in (keys, values)]
    read, wanted = mk.softmax_read(query, *spread), mk.softmax_read(query, *whole)
    torch.testing.assert_close(read, wanted, rtol=1e-3, atol=1e-4)
    read.square().sum().backward()
    wanted.square().sum().backward()
    first, stop = slot_range(spread[0])
    for a, b in zip(spread, whole):
        torch.testing.assert_close(a.grad.to_local(), b.grad[first:stop], rtol=1e-3, atol=1e-4)
    found = mk.topk_search(query, spread[0].detach(), 16)[1]
    assert (found == mk.topk_search(query, keys, 16)[1]).float().mean() > 0.99, "equal but for rounding"
    written = mk.gated_write(spread[1].detach(), spread[0].detach(), query, query)
    torch.testing.assert_close(written.to_local(), mk.gated_write(values, keys, query, query)[first:stop])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=float, default=1e8, help="of all ranks")
    parser.add_argument("--dtype", default="bfloat16", help="of the slots")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("slots",))
    equality(mesh)
    dtype, ranks = getattr(torch, options.dtype), mesh.size()
    block = -(-int(options.slots) // ranks)
    rows = max(min(block, int(options.slots) - block * mesh.get_local_rank(0)), 0)
    keys, values = (shard_slots(torch.randn(rows, WIDTH, device="cuda").to(dtype), mesh, local=True) for _ in range(2))
    for tokens in (1, 16, 256):
        query = torch.ones(tokens, WIDTH, device="cuda", dtype=dtype)
        with torch.no_grad(), traffic() as moved:
            mk.softmax_read(query, keys, values)
        with torch.no_grad():
            time = milliseconds(lambda q=query: mk.softmax_read(q, keys, values))
        paper = read_cost(options.slots, WIDTH, WIDTH, dtype=options.dtype, tokens=tokens, ranks=ranks).seconds * 1e3
        if dist.get_rank() == 0:
            print(f"T={tokens}: {time:.3f} ms, on paper {paper:.3f} ms, {sum(moved.values())} bytes received")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
