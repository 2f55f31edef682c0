"""A mask broadcasts to the leading dimensions of the other arguments, and adds none."""

from __future__ import annotations

import math

import pytest
import torch
from calls import SLOT_MASKED, TOKEN_MASKED, B, N, T, arguments, mask_shape, run
from support import close

MASKS = [*((op, "slot_mask") for op in SLOT_MASKED), *((op, "token_mask") for op in TOKEN_MASKED)]


def _ones(kind: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=kind)


def _refused(backend: str, op: str, given: dict, name: str, lead: list[int], others: list[int]) -> None:
    before = {n: x.clone() for n, x in given.items() if isinstance(x, torch.Tensor)}
    for kind in (torch.bool, torch.float32) if name == "slot_mask" else (torch.bool,):
        with pytest.raises(ValueError) as caught:
            run(op, backend, **{**given, name: _ones(kind, *lead, *mask_shape(op, name))})
        assert str(caught.value) == (
            f"{op.removesuffix('_')}: leading dimensions of {name} must broadcast to {others}, those of the other "
            f"arguments, got {lead}"
        )
    assert all(torch.equal(given[n], x) for n, x in before.items())


@pytest.mark.parametrize(("op", "name"), MASKS)
def test_a_mask_of_another_rank_is_refused(backend, op, name):
    whole = arguments(op)
    flat = {n: x[0] if isinstance(x, torch.Tensor) else x for n, x in whole.items()}
    in_place = op.endswith("_") and name == "slot_mask"  # there the check of the memory comes first
    for lead in ([T], [1], [1, 1]):
        if not in_place:
            _refused(backend, op, flat, name, lead, [])
    for lead in ([B, 1], [1, 1], [B, T], [1, 1, 1]):
        if not in_place:
            _refused(backend, op, whole, name, lead, [B])
    heads = {n: x.unsqueeze(1).expand(B, 3, *x.shape[1:]) if isinstance(x, torch.Tensor) else x
             for n, x in whole.items()}  # fmt: skip
    if not op.endswith("_"):
        _refused(backend, op, heads, name, [B, 1, 1], [B, 3])
        # as many tokens as the mask has rows: size 1 is a leading dimension that the others lack
        one = {n: x[:1] if isinstance(x, torch.Tensor) else x for n, x in whole.items()}
        _refused(backend, op, one, name, [T], [1])


@pytest.mark.parametrize("op", [op for op in SLOT_MASKED if op.endswith("_")])
def test_in_place_a_mask_of_another_rank_is_refused(backend, op):
    given = arguments(op)
    for lead in ([B, 1], [3]):
        with pytest.raises(ValueError, match=f"^{op}: values must have the leading dimensions of slot_mask, "):
            run(op, backend, **given, slot_mask=torch.ones(*lead, N, dtype=torch.bool))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in MASKS if not op.endswith("_")])
def test_a_mask_that_broadcasts_within_them_works(backend, op, name):
    given = arguments(op, torch.float64)
    shape = mask_shape(op, name)
    mask = (torch.arange(math.prod(shape)) % 3 > 0).view(shape)
    whole = run(op, "reference", **given, **{name: mask.expand(B, *shape)})
    for own in (mask, mask.expand(1, *shape)):
        for got, want in zip(run(op, backend, **given, **{name: own}), whole):
            close(got.double(), want.double(), 1e-12)
    if name == "slot_mask" and "query" in given and op != "slot_usage":  # one memory for all streams, a mask for each
        per_stream = torch.stack([mask, ~mask])
        shared = {n: x[:1] if n in ("keys", "values", "score_vector") else x for n, x in given.items()}
        results = run(op, backend, **shared, slot_mask=per_stream)
        for b in range(B):
            own = {n: x[b % len(x)] if isinstance(x, torch.Tensor) else x for n, x in shared.items()}
            for got, want in zip(results, run(op, "reference", **own, slot_mask=per_stream[b])):
                close(got[b].double(), want.double(), 1e-12)


def test_scales_of_rows_add_no_leading_dimension_either(backend):
    given = arguments("softmax_read")
    keys = (given["query"][0], given["keys"][0].to(torch.int8), given["values"][0])
    with pytest.raises(ValueError, match="^softmax_read_compressed: leading dimensions of key_scale must broadcast"):
        run("softmax_read", backend, **dict(zip(given, keys)), key_scale=torch.ones(T, N))
