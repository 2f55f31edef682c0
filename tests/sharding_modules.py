"""Checks of modules over ranks, called on every rank by tests/test_sharding_modules.py."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import full, refused
from support import close
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import memkernels as mk
from memkernels.integrations.distributed import (
    RankOrderWrites,
    SlotParallel,
    shard_product_keys,
    shard_slots,
    slot_range,
)
from memkernels.models import MemoryTransformerLM

SLOTS, WIDTH, B, T = 63, 16, 2, 8


def model() -> MemoryTransformerLM:
    """A small language model whose memory is not empty: beside an empty one the keys have no gradient."""
    torch.manual_seed(0)
    made = MemoryTransformerLM(
        30, d_model=WIDTH, layers=1, heads=2, mem_size=SLOTS, max_length=16, dropout=0.0, gate_bias=-1.0
    )
    made.memory.values.copy_(torch.randn(SLOTS, WIDTH))
    return made


def texts(ranks: int) -> torch.Tensor:
    return torch.randint(0, 30, (B * ranks, T), generator=torch.Generator().manual_seed(1))


def data_parallel_gradients(ranks: int) -> dict[str, torch.Tensor]:
    """What one process computes: the mean over the batches of all ranks."""
    alone = model()
    for batch in texts(ranks).split(B):
        (alone.loss(batch)[0] / ranks).backward()
    return {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}


def same_gradients(of: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    got = {name.removeprefix("module."): p.grad for name, p in of.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted) and wanted["memory.keys"].abs().max() > 1e-5
    for name, gradient in wanted.items():
        close(full(got[name]), gradient, 1e-5)


def slot_parallel(mesh: DeviceMesh) -> None:
    """Loss, gradients, kept memory, generated tokens and an optimizer step are those of one process."""
    tokens, alone, spread = texts(1), model(), model()
    parallelize_module(spread, mesh, {"memory": SlotParallel()})
    assert spread.memory.keys.placements == spread.memory.values.placements == (Shard(0),)
    assert isinstance(spread.memory.keys, torch.nn.Parameter)
    optimizers = [torch.optim.AdamW(m.parameters(), foreach=False) for m in (alone, spread)]
    state, states = alone.initial_state(), spread.initial_state()
    for _ in range(2):
        loss, state = alone.loss(tokens, state)
        losses, states = spread.loss(tokens, states)
        close(losses, loss, 1e-5)
        loss.backward()
        losses.backward()
        same_gradients(spread, {n: p.grad for n, p in alone.named_parameters() if p.grad is not None})
        for optimizer in optimizers:
            optimizer.step()
    close(full(states.values), state.values, 1e-5)
    alone.memory.keep(state)
    spread.memory.keep(states)
    close(full(spread.memory.values), alone.memory.values, 1e-5)
    saved = spread.state_dict()
    assert isinstance(saved["memory.values"], DTensor) and isinstance(saved["memory.keys"], DTensor)
    with torch.no_grad():  # the same parameters to the bit, for the choice of tokens
        for a, b in zip(spread.parameters(), alone.parameters()):
            b.copy_(full(a))
        alone.memory.values.copy_(full(spread.memory.values))
    prompt = tokens[:, :3]
    assert torch.equal(spread.generate(prompt, 4, temperature=0)[0], alone.generate(prompt, 4, temperature=0)[0])
    refused(ValueError, lambda: parallelize_module(model(), mesh, {"output": SlotParallel()}), "SlotParallel: Linear")


def fsdp(mesh: DeviceMesh) -> None:
    """FSDP2 of the memory by itself and of the model, where the memory is called by read and write only."""
    alone = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("data", "slots"))
    batch = texts(mesh.size()).split(B)[mesh.get_local_rank(0)]
    spread = model()
    parallelize_module(spread, alone["slots"], {"memory": SlotParallel()})
    fully_shard(spread.memory, mesh=alone["data"])
    fully_shard(spread, mesh=alone["data"])
    loss, state = spread.loss(batch)
    loss.backward()
    same_gradients(spread, data_parallel_gradients(mesh.size()))
    spread.loss(batch, state)[0].backward()


def ddp(mesh: DeviceMesh) -> None:
    """Data-parallel ranks write one memory by the rule of RankOrderWrites: all tokens, in the order of ranks."""
    ranks = mesh.size()
    batch = texts(ranks).split(B)[mesh.get_local_rank(0)]
    spread = model()
    parallelize_module(spread, mesh, {"memory": RankOrderWrites()})
    wrapped = DistributedDataParallel(spread, find_unused_parameters=True)
    out = wrapped(batch[:, :-1])
    loss = -out.log_probs.gather(-1, batch[:, 1:, None]).mean()
    loss.backward()
    same_gradients(wrapped, data_parallel_gradients(ranks))
    alone = model()
    hidden = alone(texts(ranks)[:, :-1]).hidden
    wanted = alone.write(hidden, alone.initial_state())
    state = spread.write(out.hidden, spread.initial_state())
    close(state.values, wanted.values, 1e-5)
    spread.memory.keep(state)
    close(wrapped.module.memory.values, wanted.values, 1e-5)
    # differentiable: the gradient of a rank's tokens is the sum over the losses of all ranks
    x = torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(mesh.get_local_rank(0))).requires_grad_()
    everyone = [torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    whole = torch.cat(everyone).requires_grad_()
    weight = 1.0 + mesh.get_local_rank(0)
    (spread.memory.write(x, spread.initial_state()).values.square().sum() * weight).backward()
    total = sum(1.0 + r for r in range(ranks))
    spread.memory.keys.requires_grad_(False)
    plain = model().memory
    plain.load_state_dict(spread.memory.state_dict())
    (plain.write(whole, plain.initial_state()).values.square().sum() * total).backward()
    close(x.grad, whole.grad.split(B)[mesh.get_local_rank(0)], 1e-5)
    other = state._replace(values=state.values + mesh.get_local_rank(0))
    refused(ValueError, lambda: spread.memory.keep(other), "ExternalMemory.keep", "same on all 2 ranks")
    streams = spread.memory.write(x.detach(), spread.initial_state(B))  # of its own rank
    close(streams.values, plain.write(x.detach(), plain.initial_state(B)).values, 1e-6)


def two_dimensions(mesh: DeviceMesh) -> None:
    """FSDP2 over data, slots over the other dimension, and writes in the order of the data ranks."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "slots"))
    batch = texts(2).split(B)[grid.get_local_rank("data")]
    spread = model()
    parallelize_module(spread, grid["slots"], {"memory": SlotParallel()})
    parallelize_module(spread, grid["data"], {"memory": RankOrderWrites()})
    fully_shard(spread, mesh=grid["data"])
    loss, state = spread.loss(batch)
    loss.backward()
    same_gradients(spread, data_parallel_gradients(2))
    alone = model()
    hidden = alone(texts(2)[:, :-1]).hidden
    close(full(state.values), alone.write(hidden, alone.initial_state()).values, 1e-5)
    spread.memory.keep(state)
    torch.optim.AdamW(spread.parameters(), foreach=False).step()
    spread.loss(batch)[0].backward()


def checkpoints(mesh: DeviceMesh) -> None:
    """A checkpoint of 2 ranks is read by 4, and one of 4 by 1; each rank saves what it holds."""
    folder = os.environ["TEST_FOLDER"]
    meshes = {n: DeviceMesh("cpu", list(range(n)), mesh_dim_names=("slots",)) for n in (2, 4, 1)}
    wanted = {name: torch.randn(SLOTS, 700, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("kv")}
    held = wanted
    for before, after in ((2, 4), (4, 1)):
        path = f"{folder}/{before}"
        if mesh.get_rank() < before:
            saved = {name: shard_slots(x, meshes[before]) for name, x in held.items()}
            dcp.save(saved, checkpoint_id=path, process_group=meshes[before].get_group())
        dist.barrier()
        sizes = [os.path.getsize(f"{path}/{file}") for file in os.listdir(path) if file.endswith(".distcp")]
        rows = -(-SLOTS // before)
        assert len(sizes) == before and max(sizes) <= 2 * rows * 700 * 4 + (64 << 10), sizes
        if mesh.get_rank() < after:
            loaded = {name: shard_slots(torch.zeros(SLOTS, 700), meshes[after]) for name in wanted}
            dcp.load(loaded, checkpoint_id=path, process_group=meshes[after].get_group())
            for name, x in loaded.items():
                first, stop = slot_range(x)
                assert torch.equal(x.to_local(), wanted[name][first:stop])
        dist.barrier()


def compiled(mesh: DeviceMesh) -> None:
    """One graph, forward and backward, of a write, a read and a search over slots."""
    query, keys, values = torch.randn(6, 8), torch.randn(13, 8), torch.randn(13, 8)

    def step(q, x, v):
        written = mk.gated_write(v, x, q, q)
        return mk.softmax_read(q, x, written) + mk.topk_read(q, x, v, 3)

    plain = [x.clone().requires_grad_() for x in (query, keys, values)]
    spread = [query.clone().requires_grad_(), *(shard_slots(x, mesh).requires_grad_() for x in (keys, values))]
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*spread)
    wanted = step(*plain)
    close(got, wanted, 1e-5)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(spread, plain):
        close(full(a.grad), b.grad, 1e-5)


def dealt_out(mesh: DeviceMesh) -> None:
    """How slots and product keys are dealt out, and what is refused."""
    whole = torch.arange(7.0).unsqueeze(-1)
    first, stop = slot_range(shard_slots(whole, mesh))
    parts = shard_slots(whole[first:stop], mesh, local=True)
    assert parts.shape == (7, 1) and torch.equal(parts.full_tensor(), whole)
    assert slot_range(whole) == (0, 7) and slot_range(whole.squeeze(-1)) == (0, 7)
    mask = shard_slots(whole.squeeze(-1), mesh)
    assert mask.placements == (Shard(0),) and slot_range(mask) == (first, stop)
    uneven = whole[: 3 + mesh.get_local_rank(0)]
    refused(ValueError, lambda: shard_slots(uneven, mesh, local=True), "shard_slots: the ranks must hold")
    refused(TypeError, lambda: shard_slots(parts, mesh), "shard_slots: tensor must be a plain tensor")
    ranks = mesh.size()
    for width, dim in ((16 * ranks, 1), (16 * ranks - 1, 0)):  # 64 bytes of a row on each rank, or fewer
        subkeys, values = shard_product_keys(torch.randn(2, 3, 2), torch.randn(9, width), mesh)
        assert values.placements == (Shard(dim),) and subkeys.placements[0].is_replicate()
        query = torch.randn(5, 4)
        wanted = mk.product_key_read(query, full(subkeys), full(values), 3)
        close(full(mk.product_key_read(query, subkeys, values, 3)), wanted, 1e-5)
