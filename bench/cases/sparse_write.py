"""sparse_write: k = 8 slots of a large memory per token. The memory is copied; in place it is not."""

from __future__ import annotations

import torch

from ..case import Case, cost, normal

NEIGHBOURS = 8


def make(sizes, dtype, device, seed):
    """values [N, V], indices [T, k] without duplicates in a token, weights [T, k], write [T, V]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    t, n, v = (sizes[axis] for axis in "TNV")
    step = n // NEIGHBOURS
    indices = torch.randint(step, (t, NEIGHBOURS), device=device, generator=generator)
    return {
        "values": normal((n, v), dtype, device, 0),
        "indices": indices + step * torch.arange(NEIGHBOURS, device=device),
        "weights": torch.rand((t, NEIGHBOURS), dtype=dtype, device=device, generator=generator),
        "write": normal((t, v), dtype, device, seed + 1),
    }


def forward_bytes(s, item):
    """The copy, then the named rows."""
    return 2 * s["N"] * s["V"] * item + row_bytes(s, item)


def row_bytes(s, item):
    """Every named row once in and once out."""
    return s["T"] * (NEIGHBOURS * (2 * s["V"] * item + 8 + item) + s["V"] * item)


def make_in_place(sizes, dtype, device, seed):
    """Gates of 1, so that what the first call writes the next writes again; slot i holds i, modulo a prime."""
    inputs = make(sizes | {"N": NEIGHBOURS}, dtype, device, seed)
    step = sizes["N"] // NEIGHBOURS
    generator = torch.Generator(device=device).manual_seed(seed)
    chosen = torch.randint(step, inputs["indices"].shape, device=device, generator=generator)
    return inputs | {
        "values": _numbered(sizes["N"], device).to(dtype).unsqueeze(-1).repeat(1, sizes["V"]),
        "indices": chosen + step * torch.arange(NEIGHBOURS, device=device),
        "weights": torch.ones_like(inputs["weights"]),
    }


def _numbered(slots, device):
    return torch.arange(slots, device=device) % 8191


def check_in_place(inputs, d_output, outputs) -> float:
    """Every slot holds the content of the last token that named it, or its number."""
    (values,), indices, write = outputs, inputs["indices"], inputs["write"]
    token = torch.arange(len(indices), device=indices.device).repeat_interleave(NEIGHBOURS)
    last = torch.full((len(values),), -1, device=indices.device).scatter_reduce_(0, indices.flatten(), token, "amax")
    named = last >= 0
    wrong = [(values[named] - write[last[named]]).abs().max()]
    wrong += [
        (part - n.unsqueeze(-1)).abs().max()
        for part, n in zip(values[~named].split(1 << 18), _numbered(len(values), values.device)[~named].split(1 << 18))
    ]
    return float(torch.stack(wrong).max())


def _in_place(n):
    return Case(
        op="sparse_write",
        name="in place",
        sizes={"T": 1024, "N": n, "V": 64},
        quick={"T": 128, "N": 4096, "V": 64},
        make=make_in_place,
        flops=cost("sparse_write", k=NEIGHBOURS),
        bytes=row_bytes,
        shared=("values",),
        check=check_in_place,
        in_place=True,
    )


def _case(direction):
    forward = direction == "forward"
    return Case(
        op="sparse_write",
        # Autograd of the loop keeps a copy of the memory per token, so its memory is a small one.
        sizes={"T": 1024, "N": 1 << 16, "V": 64} if forward else {"T": 256, "N": 1 << 13, "V": 64},
        quick={"T": 128, "N": 4096, "V": 64},
        make=make,
        flops=cost("sparse_write", direction, k=NEIGHBOURS),
        bytes=forward_bytes if forward else lambda s, item: 2 * forward_bytes(s, item),
        direction=direction,
        grads=() if forward else ("values", "weights", "write"),
        shared=("values",),
    )


CASES = [_case("forward"), _case("backward"), _in_place(1 << 16), _in_place(1 << 22)]
