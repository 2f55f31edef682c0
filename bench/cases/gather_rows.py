"""gather_rows: 24 rows per token of a table in 8 bits, dequantised, and the same of a table in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..case import Case, normal, ratio

ROWS = 24  # per token


def make(sizes, dtype, device, seed):
    """values [N, V] in float8_e4m3fn, indices [T, k], value_scale [N]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    values = normal((sizes["N"], sizes["V"]), torch.bfloat16, device, 0).to(torch.float8_e4m3fn)
    return {
        "values": values,
        "indices": torch.randint(sizes["N"], (sizes["T"], ROWS), device=device, generator=generator),
        "value_scale": 0.5 + torch.rand(sizes["N"], device=device, generator=generator),
    }


def make_floats(sizes, dtype, device, seed):
    """values [N, V], indices [T, k]."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (sizes["T"], ROWS)
    return {
        "values": normal((sizes["N"], sizes["V"]), dtype, device, 0),
        "indices": torch.randint(sizes["N"], shape, device=device, generator=generator),
    }


def e4m3() -> np.ndarray:
    """The number of each byte, by the definition: sign, 4 bits of exponent (bias 7), 3 of mantissa. float64 [256]."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size)


def dequantised(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``[..., V]`` of bytes by that definition: products with ``[...]`` in float32, rounded to ``dtype``."""
    numbers = e4m3().astype(np.float32)[rows.cpu().numpy()]
    return torch.from_numpy(numbers * scale.cpu().numpy()[..., None]).to(dtype)


def check(inputs, d_output, outputs) -> float:
    """0 where one token in 8 is right to the bit."""
    found, some = outputs[0].cpu(), slice(None, None, 8)
    at = inputs["indices"][some]
    wanted = dequantised(inputs["values"].view(torch.uint8)[at], inputs["value_scale"][at], found.dtype)
    right = found.shape == (*inputs["indices"].shape, wanted.shape[-1]) and torch.equal(found[some], wanted)
    return 0.0 if right else float("inf")


def _case(name, make, dtype, width, row_bytes, *goals, **more):
    return Case(
        op="gather_rows",
        name=name,
        sizes={"T": 8192, "N": 1 << 22, "V": width},
        quick={"T": 256, "N": 1 << 16, "V": width},
        make=make,
        flops=lambda s: 0,
        bytes=lambda s, item: s["T"] * ROWS * (row_bytes + 8 + s["V"] * item),
        dtype=dtype,
        shared=("values", "value_scale"),
        goals=goals,
        **more,
    )


CASES = [
    _case(
        "float8_e4m3fn to bfloat16",
        make,
        "bfloat16",
        256,
        256 + 4,
        ratio(3, "eager"),
        ratio(1.5, "torch.compile"),
        options={"dtype": torch.bfloat16},
        check=check,
    ),
    _case("float32", make_floats, "float32", 64, 256),
]
