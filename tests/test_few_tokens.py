"""Few tokens that write take kernels of their own, by widths of rows and kinds of erase: against float64."""

from __future__ import annotations

import pytest
import torch
from support import close, randn

import memkernels as mk

WIDTHS = (8, 16, 40, 64, 80, 128)  # short rows, whole registers, four of them, more


def written(op: str, tokens: int, width: int, erase: str, backend: str, dtype: torch.dtype):
    """What 3 streams of 200 slots hold after tokens that write, and for memory_scan what they read."""
    values, keys = randn(3, 200, width, seed=1), randn(3, 200, 24, seed=2)
    query, write = randn(3, tokens, 24, seed=3), randn(3, tokens, width, seed=4)
    if op == "memory_scan":
        asked = randn(3, tokens, 24, seed=5)
        given = [x.to(dtype) for x in (values, keys, asked, query, write)]
        return torch.cat([x.double() for x in mk.memory_scan(*given, backend=backend)], -2)
    given = (values, torch.sigmoid(randn(3, tokens, 200, seed=6)), write)
    if op != "slot_write":
        given = (values, keys, query, write)
    vector = torch.sigmoid(randn(3, tokens, width, seed=7)).to(dtype)
    options = {"erase": vector if erase == "vector" else float(erase)}
    found = getattr(mk, op)(*(x.to(dtype) for x in given), **options, backend=backend)
    return (found if isinstance(found, torch.Tensor) else found[0]).double()


WRITES = [(op, erase) for op in ("gated_write", "softmax_write", "slot_write") for erase in ("1", "0.5", "vector")]


@pytest.mark.parametrize(("op", "erase"), [*WRITES, ("memory_scan", "1")])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_few_tokens_write_as_the_reference_in_float64(op, tokens, erase):
    for width in WIDTHS:
        exact = written(op, tokens, width, erase, "reference", torch.float64)
        close(written(op, tokens, width, erase, "cpu", torch.float32), exact, 1e-5)
