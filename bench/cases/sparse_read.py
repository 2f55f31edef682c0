"""sparse_read: a weighted sum of k = 32 rows of a large memory per token, and its gradient."""

from __future__ import annotations

import torch

from ..case import Case, bandwidth, cost, normal, ratio

NEIGHBOURS = 32


def make(sizes, dtype, device, seed):
    """values [N, V], indices [T, k], weights [T, k]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (sizes["T"], NEIGHBOURS)
    return {
        "values": normal((sizes["N"], sizes["V"]), dtype, device, 0),
        "indices": torch.randint(sizes["N"], shape, device=device, generator=generator),
        "weights": torch.rand(shape, dtype=dtype, device=device, generator=generator),
    }


def forward_bytes(s, item):
    return s["T"] * (NEIGHBOURS * (s["V"] * item + 8 + item) + s["V"] * item)


def backward_bytes(s, item):
    """The dense gradient is written once; the rows that were read are read again for the gradient of the weights."""
    return s["N"] * s["V"] * item + forward_bytes(s, item)


def check_gradient(inputs, d_output, outputs) -> float:
    """Largest error, relative to the size: 1 of 64 touched rows, every untouched row, the weights of 1 of 16 tokens."""
    indices, weights, values = (inputs[name].detach() for name in ("indices", "weights", "values"))
    d_values, d_weights = outputs
    rows, place = torch.unique(indices, return_inverse=True)
    chosen = torch.arange(0, len(rows), 64, device=rows.device)
    token, slot = torch.isin(place, chosen).nonzero(as_tuple=True)
    terms = weights[token, slot].double().unsqueeze(-1) * d_output[token].double()
    exact = torch.zeros(len(chosen), values.shape[-1], dtype=torch.float64, device=rows.device)
    exact.index_add_(0, place[token, slot] // 64, terms)
    error = (d_values[rows[chosen]] - exact).abs().max()
    untouched = torch.ones(len(values), dtype=torch.bool, device=rows.device)
    untouched[rows] = False
    where = untouched.nonzero().squeeze(-1)
    stray = max((d_values[part].abs().max() for part in where.split(1 << 16) if len(part)), default=error.new_zeros(()))
    relative = torch.maximum(error, stray.to(error)) / exact.abs().max()
    sampled = torch.arange(0, len(indices), 16, device=rows.device)
    exact_weights = torch.einsum("tkv,tv->tk", values[indices[sampled]].double(), d_output[sampled].double())
    error_weights = (d_weights[sampled] - exact_weights).abs().max() / exact_weights.abs().max()
    return float(torch.maximum(relative, error_weights))


def _case(direction, *goals, **more):
    return Case(
        op="sparse_read",
        sizes={"T": 4096, "N": 1 << 20, "V": 256},
        quick={"T": 2048, "N": 1 << 17, "V": 256},
        make=make,
        flops=cost("sparse_read", direction, k=NEIGHBOURS),
        bytes=forward_bytes if direction == "forward" else backward_bytes,
        direction=direction,
        shared=("values",),
        goals=goals,
        **more,
    )


CASES = [
    _case("forward", bandwidth(0.80), ratio(1.4, "embedding_bag"), sample=("T", 256)),
    _case("backward", ratio(3, "embedding_bag"), grads=("values", "weights"), check=check_gradient),
]
