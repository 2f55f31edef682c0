"""The GPU rows of the goals: the same ops and inputs as on the CPU, at sizes of a GPU, against its own peers."""

from __future__ import annotations

import torch

from ..case import Case, bandwidth, peak, ratio
from ..peers.eager import written
from . import gated_write, softmax_read, sparse_read, topk_read

SDPA = ("SDPA flash", "SDPA cuDNN", "SDPA efficient")
FASTEST = (*SDPA, "FlexAttention")


def _same(inputs, exact, outputs) -> float:
    """Largest error of ``outputs``, each relative to its own largest number."""
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in zip(outputs, exact))


def check_write(inputs, d_output, outputs) -> float:
    """A write and its gradients against the vectorised form in float64: a loop of T steps would not fit in memory."""
    doubled = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    new = written(**doubled)
    if d_output is None:
        return _same(inputs, [new.detach()], outputs)
    return _same(inputs, torch.autograd.grad(new, list(doubled.values()), d_output.double()), outputs)


def _case(op, module, sizes, quick, direction="forward", goals=(), dtype="bfloat16", **more):
    forward = direction == "forward"
    return Case(
        op=op,
        sizes=sizes,
        quick=quick,
        make=module.make,
        flops=getattr(module, f"{direction}_flops", getattr(module, "flops", None)),
        bytes=getattr(module, f"{direction}_bytes", getattr(module, "bytes_moved", None)),
        direction=direction,
        dtype=dtype,
        goals=goals,
        grads=() if forward else more.pop("grads"),
        devices=("cuda",),
        **more,
    )


def _sizes(t, n, k, v):
    return {"T": t, "N": n, "K": k, "V": v}


SMALL = _sizes(256, 1024, 128, 128)
READ = ("query", "keys", "values")
WRITE = ("values", "keys", "query", "write")
MANY = _sizes(4096, 8192, 128, 128)
CASES = [
    _case("softmax_read", softmax_read, MANY, SMALL, goals=(ratio(0.9, *FASTEST),), sample=("T", 256)),
    _case(
        "softmax_read",
        softmax_read,
        _sizes(4096, 8192, 128, 256),
        _sizes(256, 1024, 128, 256),
        goals=(ratio(1.0, *FASTEST),),
        sample=("T", 256),
        name="K != V",
    ),
    _case(
        "softmax_read",
        softmax_read,
        _sizes(2048, 4096, 320, 320),
        _sizes(256, 1024, 320, 320),
        goals=(ratio(1.0, *FASTEST),),
        sample=("T", 256),
        name="K > 256",
    ),
    _case(
        "softmax_read",
        softmax_read,
        _sizes(16, 1 << 20, 128, 128),
        _sizes(16, 1 << 16, 128, 128),
        goals=(bandwidth(0.85),),
        sample=("T", 4),
    ),
    _case("softmax_read", softmax_read, MANY, SMALL, "backward", (ratio(0.8, *SDPA),), grads=READ),
    _case(
        "gated_write",
        gated_write,
        _sizes(4096, 4096, 128, 128),
        SMALL,
        goals=(ratio(20, "eager"), ratio(5, "flash-linear-attention"), peak(0.5)),
        check=check_write,
    ),
    _case(
        "gated_write",
        gated_write,
        _sizes(4096, 4096, 128, 128),
        SMALL,
        "backward",
        (ratio(20, "eager"), peak(0.5)),
        grads=WRITE,
        check=check_write,
    ),
    _case(
        "topk_read",
        topk_read,
        _sizes(512, 1 << 18, 128, 128),
        _sizes(64, 1 << 14, 128, 128),
        goals=(ratio(4, "eager"),),
        options={"k": topk_read.NEIGHBOURS},
        sample=("T", 16),
        dtype="float32",
    ),
    _case(
        "topk_read",
        topk_read,
        _sizes(16, 1 << 20, 128, 128),
        _sizes(16, 1 << 16, 128, 128),
        goals=(bandwidth(0.85),),
        options={"k": topk_read.NEIGHBOURS},
        sample=("T", 2),
        dtype="float32",
    ),
    _case(
        "sparse_read",
        sparse_read,
        {"T": 4096, "N": 1 << 20, "V": 256},
        {"T": 512, "N": 1 << 15, "V": 256},
        "backward",
        (bandwidth(0.6), ratio(3, "embedding_bag")),
        dtype="float32",
        grads=("values", "weights"),
        check=sparse_read.check_gradient,
        shared=("values",),
    ),
]
