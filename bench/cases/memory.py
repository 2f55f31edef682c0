"""Peak extra memory at T = N = 8192: no fused op may come near a [T, N] matrix, forward or backward."""

from __future__ import annotations

from ..case import Case, Goal
from . import gated_write, slot_usage, softmax_read, sparse_read, topk_read

SIZES = {"T": 8192, "N": 8192, "K": 64, "V": 64}
QUICK = {"T": 2048, "N": 2048, "K": 64, "V": 64}
SHARE = Goal("memory", 1 / 20)


def search_inputs(sizes, dtype, device, seed):
    inputs = topk_read.make(sizes, dtype, device, seed)
    return {"query": inputs["query"], "keys": inputs["keys"]}


def _case(op, make, direction, grads, **more):
    return Case(
        op=op,
        sizes=SIZES,
        quick=QUICK,
        name="peak extra memory",
        make=make,
        flops=lambda s: 0,
        bytes=lambda s, item: 0,
        direction=direction,
        grads=grads if direction == "backward" else (),
        goals=(SHARE,),
        measure="memory",
        **more,
    )


def _both(op, make, grads, **more):
    return [_case(op, make, direction, grads, **more) for direction in ("forward", "backward")]


CASES = [
    *_both("softmax_read", softmax_read.make, ("query", "keys", "values"), sample=("T", 64)),
    *_both("gated_write", gated_write.make, ("values", "keys", "query", "write"), sample=("N", 64)),
    *_both("topk_search", search_inputs, ("query", "keys"), options={"k": 32}, sample=("T", 64)),
    *_both("topk_read", topk_read.make, ("query", "keys", "values"), options={"k": 32}, sample=("T", 64)),
    *_both("slot_usage", slot_usage.make, ("query", "keys", "lse"), sample=("N", 64)),
    _case("sparse_read", sparse_read.make, "forward", (), sample=("T", 64)),
    _case("sparse_read", sparse_read.make, "backward", ("values", "weights"), check=sparse_read.check_gradient),
]
