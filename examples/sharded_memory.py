"""A memory over several processes: what moves, and that nothing else changes.

Each rank holds a part of the slots. A language model with a memory trains two steps, once in one process and once with
its memory sharded; then a million slots are read, searched and written. It prints the bytes that moved beside those of
the slots, and how far the results are from those of one process.

    torchrun --nproc_per_node 2 examples/sharded_memory.py

Without torchrun it is a group of one rank.
"""

from __future__ import annotations

import argparse
import os
import socket

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import memkernels as mk
from memkernels.integrations.distributed import SlotParallel, shard_slots, slot_range, traffic
from memkernels.models import MemoryTransformerLM


def group() -> None:
    """Join the group of torchrun, or make one of this process alone."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")


def model() -> MemoryTransformerLM:
    torch.manual_seed(0)
    made = MemoryTransformerLM(100, d_model=64, layers=1, heads=2, mem_size=1000, dropout=0.0, gate_bias=-2.0)
    made.memory.values.copy_(torch.randn(1000, 64))
    return made


def train(of: MemoryTransformerLM, tokens: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """The losses of two steps, each reading what the ones before wrote, and what the memory then holds."""
    optimizer, state, losses = torch.optim.AdamW(of.parameters(), foreach=False), of.initial_state(), []
    for _ in range(2):
        loss, state = of.loss(tokens, state)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    values = state.values
    return losses, values.full_tensor() if isinstance(values, DTensor) else values


def main(slots: int = 1_000_000) -> dict[str, float]:
    """What was measured, by name: differences from one process, and bytes that this rank received."""
    group()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("slots",))
    first = dist.get_rank() == 0
    tokens = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(1))
    wanted, content = train(model(), tokens)
    sharded = model()
    parallelize_module(sharded, mesh, {"memory": SlotParallel()})
    with traffic() as training:
        losses, held = train(sharded, tokens)
    measured = {
        "loss": max(abs(a - b) for a, b in zip(losses, wanted)),
        "memory": (held - content).abs().max().item(),
        "bytes of training": sum(training.values()),
    }

    generator = torch.Generator().manual_seed(2)
    keys, values, query = (torch.randn(n, 32, generator=generator) for n in (slots, slots, 16))
    spread = [shard_slots(x, mesh) for x in (keys, values)]
    with traffic() as moved:
        read = mk.softmax_read(query, *spread)
        best, found = mk.topk_search(query, spread[0], 8)
        written = mk.gated_write(spread[1], spread[0], query, query)
    again, (_, slot) = mk.softmax_read(query, keys, values), mk.topk_search(query, keys, 8)
    own = slice(*slot_range(written))
    measured["read"] = (read - again).abs().max().item()
    measured["slots found elsewhere"] = (found != slot).sum().item()
    measured["written"] = (written.to_local() - mk.gated_write(values, keys, query, query)[own]).abs().max().item()
    measured["bytes of the slots"] = 2 * slots * 32 * 4
    measured["bytes of calls"] = sum(moved.values())
    if first:
        print(f"{mesh.size()} ranks; rank 0 holds slots {own.start} to {own.stop} of {slots}")
        for what, meter in (("training", training), ("calls", moved)):
            for (op, collective), count in meter.items():
                print(f"  {what:<10}{op:<14}{collective:<14}{count:>9} bytes received by rank 0")
        for name, number in measured.items():
            print(f"{name:<24}{number:.3g}")
    dist.destroy_process_group()
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=1_000_000, help="slots of the memory that is read and searched")
    main(parser.parse_args().slots)
