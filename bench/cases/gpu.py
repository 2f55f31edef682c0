"""The GPU rows of the goals: the same ops and inputs as on the CPU, at sizes of a GPU, against its own peers.

Single memories stand beside B x H of them: one head of attention has too few blocks for all SMs. Inputs and checks fit
in 16 GB; a peer that forms [T, N] for every head may not, and its row says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from memkernels import spec
from memkernels.registration import OPS
from memkernels.testing.compare import distance, norms

from ..case import Case, Goal, copy_bandwidth, cost, normal, peak, ratio
from ..peers import eager
from . import gated_write, memory_scan, softmax_read, sparse_read, topk_read

SDPA = ("SDPA", "SDPA flash", "SDPA cuDNN", "SDPA efficient")
FASTEST = (*SDPA, "FlexAttention")
FLA, GLA = "flash-linear-attention", "flash-linear-attention GLA"


def heads(sizes: Mapping[str, int]) -> int:
    """Memories, or streams that share one."""
    return math.prod(sizes.get(axis, 1) for axis in "BH")


def lead(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Leading dimensions."""
    return tuple(sizes[axis] for axis in "BH" if axis in sizes)


def tensors(op: str, one_memory: bool):
    """``make`` of a case: every tensor of the op with leading dimensions; a memory that they share has none."""

    def make(sizes, dtype, device, seed):
        args = [arg for arg in OPS[op].args if not arg.optional]
        found = {}
        for i, arg in enumerate(args):
            before = () if one_memory and arg.side == "memory" else lead(sizes)
            shape = (*before, *spec.sizes(arg.axes, sizes))
            found[arg.name] = normal(shape, dtype, device, len(args) * seed + i)
        return found

    return make


def weak_gates(make, query: str):
    """The inputs of ``make`` with gates of about 1 / T. Wide ones would overwrite all but the last tokens, and a kernel
    may leave out what is overwritten: then it would not be the work that is timed."""

    def made(sizes, dtype, device, seed):
        found = make(sizes, dtype, device, seed)
        away = torch.zeros(sizes["K"], dtype=dtype, device=device)
        away[0] = (math.log(sizes["T"]) * sizes["K"] ** 0.5) ** 0.5  # scores fall by log T
        return {**found, "keys": found["keys"] + away, query: found[query] - away}

    return made


def every_head(work, one_memory: bool):
    """``flops`` or ``bytes`` of a case from those of one memory; tokens that share one count as tokens of it."""
    if one_memory:
        return lambda sizes, *item: work({**sizes, "T": heads(sizes) * sizes["T"]}, *item)
    return lambda sizes, *item: heads(sizes) * work(sizes, *item)


def by_head(op: str):
    """``check`` of a case: the first and the last memory alone against the vectorised form in float64, forward or
    backward. The steps of the reference, or the [T, N] of all memories, would not fit in the device's."""

    def pick(tensor, at):
        return tensor.detach() if tensor.dim() < 3 else tensor.detach().flatten(0, -3)[at]

    def check(inputs, d_output, outputs) -> float:
        errors = []
        for at in (0, -1):
            exact = {name: pick(t, at).double().requires_grad_(d_output is not None) for name, t in inputs.items()}
            wanted = [getattr(eager, op)(**exact)()]
            if d_output is not None:
                wanted = torch.autograd.grad(wanted, list(exact.values()), pick(d_output, at).double())
            got = [pick(t, at) for t in outputs]
            if any(g.shape != w.shape or not g.isfinite().all() for g, w in zip(got, wanted)):
                return math.inf
            errors += [distance(g, w, norm) for g, w, norm in zip(got, wanted, norms(wanted))]
        return max(errors)

    return check


def _case(
    op, module, sizes, quick, *goals: Goal, direction="forward", dtype="bfloat16", one_memory=False, gates="", **more
):
    forward = direction == "forward"
    make = tensors(op, one_memory) if "H" in sizes else module.make
    flops = cost(op, direction, k=getattr(module, "NEIGHBOURS", 0))
    moved = getattr(module, f"{direction}_bytes", getattr(module, "bytes_moved", None))
    return Case(
        op=op,
        sizes=sizes,
        quick=quick,
        make=weak_gates(make, gates) if gates else make,
        flops=every_head(flops, one_memory),
        bytes=every_head(moved, one_memory),
        direction=direction,
        dtype=dtype,
        goals=goals,
        grads=() if forward else tuple(arg.name for arg in OPS[op].differentiable if not arg.optional),
        devices=("cuda",),
        **more,
    )


def _sizes(t, n, k, v, *batch):
    return {**dict(zip("BH", batch)), "T": t, "N": n, "K": k, "V": v}


def _small(sizes):
    """The quick form of a case: two heads where there are several, and few tokens and slots."""
    batch = (1, 2) if "H" in sizes else ()
    return _sizes(min(sizes["T"], 128), min(sizes["N"], 512), sizes["K"], sizes["V"], *batch)


def _read(sizes, *goals, name="", direction="forward", one_memory=False, sample=128):
    check = by_head("softmax_read") if direction == "backward" else None
    return _case(
        "softmax_read",
        softmax_read,
        sizes,
        _small(sizes),
        *goals,
        name=name,
        direction=direction,
        one_memory=one_memory,
        check=check,
        sample=None if check else ("T", sample),
    )


def _write(sizes, *goals, direction="forward"):
    more = {"check": by_head("gated_write"), "gates": "query", "name": "weak gates"}
    return _case("gated_write", gated_write, sizes, _small(sizes), *goals, direction=direction, **more)


def _search(sizes, goal, sample, dtype):
    more = {"options": {"k": topk_read.NEIGHBOURS}, "sample": ("T", sample), "dtype": dtype}
    return _case("topk_read", topk_read, sizes, _small(sizes), goal, **more)


def _scan(sizes):
    more = {"check": by_head("memory_scan"), "gates": "write_query", "name": "weak gates"}
    return _case("memory_scan", memory_scan, sizes, _small(sizes), ratio(2, GLA), **more)


NEAR, AHEAD, BACK = ratio(0.9, *FASTEST), ratio(1.0, *FASTEST), ratio(0.8, *SDPA)
STREAM = copy_bandwidth(0.85)
WRITE = (ratio(20, "eager"), ratio(5, FLA, GLA), peak(0.5))
CASES = [
    _read(_sizes(4096, 8192, 128, 128), NEAR),
    _read(_sizes(4096, 4096, 128, 128, 4, 8), NEAR),
    _read(_sizes(4096, 8192, 128, 256), AHEAD, name="K != V"),
    _read(_sizes(2048, 4096, 128, 256, 4, 8), AHEAD, name="K != V"),
    _read(_sizes(2048, 4096, 320, 320), AHEAD, name="K > 256"),
    _read(_sizes(2048, 4096, 320, 320, 2, 8), AHEAD, name="K > 256"),
    _read(_sizes(2048, 8192, 128, 128, 4, 8), AHEAD, name="shared memory", one_memory=True),
    _read(_sizes(1, 1 << 20, 128, 128), STREAM, sample=1),
    _read(_sizes(16, 1 << 20, 128, 128), STREAM, sample=4),
    _read(_sizes(16, 1 << 15, 128, 128, 4, 8), STREAM, sample=4),
    _read(_sizes(4096, 8192, 128, 128), BACK, direction="backward"),
    _read(_sizes(2048, 2048, 128, 128, 4, 8), BACK, direction="backward"),
    _write(_sizes(4096, 4096, 128, 128), *WRITE),
    _write(_sizes(4096, 4096, 128, 128, 2, 8), *WRITE),
    _write(_sizes(4096, 4096, 128, 128), ratio(20, "eager"), ratio(5, GLA), peak(0.5), direction="backward"),
    _write(_sizes(4096, 4096, 128, 128, 2, 8), ratio(20, "eager"), ratio(5, GLA), peak(0.5), direction="backward"),
    _search(_sizes(512, 1 << 18, 128, 128), ratio(4, "eager"), 16, "float32"),
    _search(_sizes(512, 1 << 18, 128, 128), ratio(4, "eager"), 16, "bfloat16"),
    _search(_sizes(16, 1 << 20, 128, 128), STREAM, 2, "float32"),
    _search(_sizes(16, 1 << 20, 128, 128), STREAM, 2, "bfloat16"),
    _case(
        "sparse_read",
        sparse_read,
        {"T": 4096, "N": 1 << 20, "V": 256},
        {"T": 512, "N": 1 << 15, "V": 256},
        copy_bandwidth(0.6),
        ratio(3, "embedding_bag"),
        direction="backward",
        dtype="float32",
        check=sparse_read.check_gradient,
        shared=("values",),
    ),
    _scan(_sizes(8192, 64, 64, 64)),
    _scan(_sizes(8192, 512, 128, 128)),
    _scan(_sizes(8192, 64, 64, 64, 2, 8)),
    _scan(_sizes(8192, 512, 128, 128, 2, 8)),
]
