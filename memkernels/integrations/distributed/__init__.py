"""Slots over the ranks of torch.distributed: a memory that is larger, or read faster, than one device allows.

    mesh = init_device_mesh("cuda", (data, slots), mesh_dim_names=("data", "slots"))
    parallelize_module(model, mesh["slots"], {"memory": SlotParallel()})
    read = mk.softmax_read(query, keys, values)              # keys, values: DTensors sharded over slots

Every op takes DTensors; the rules are those of :mod:`memkernels.sharding`.
"""

from ._modules import RankOrderWrites, SlotParallel
from ._store import ShardedStore
from ._tensors import check_ranks, shard_product_keys, shard_slots, slot_range, traffic

__all__ = [
    "RankOrderWrites",
    "ShardedStore",
    "SlotParallel",
    "check_ranks",
    "shard_product_keys",
    "shard_slots",
    "slot_range",
    "traffic",
]
