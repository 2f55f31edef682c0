"""Autocast: an operation runs with any dtypes that results of others have, and a memory keeps its dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from calls import OPERATIONS, SCALED, arguments, run
from support import close

import memkernels as mk

LOW = (torch.bfloat16, torch.float16)
NEW_VALUES = {"gated_write": 0, "softmax_write": 0, "slot_write": 0, "sparse_write": 0, "memory_scan": 1}
ORDINARY = [op for op in OPERATIONS if not op.endswith("_")]


def _given(op: str) -> dict:
    given = arguments(op)
    if op in ("slot_write", "sparse_write", "gated_write", "softmax_write"):
        given["erase"] = torch.sigmoid(given["write"])
    if "mix" in given:
        given["mix"] = torch.full(given["logits"].shape[:-1], 0.25)
    if op in SCALED:
        given["scale"] = torch.full((), 0.3)
    return given


def _floats(given: dict) -> list[str]:
    return [n for n, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _exact(op: str, given: dict) -> list[torch.Tensor]:
    doubled = {n: x.detach().double() if n in _floats(given) else x for n, x in given.items()}
    return run(op, "reference", **doubled)


def _check(op: str, backend: str, given: dict, low: torch.dtype) -> None:
    given = {n: x.requires_grad_() if n in _floats(given) else x for n, x in given.items()}
    with torch.autocast("cpu", low):
        results = run(op, backend, **given)
    if op in NEW_VALUES:
        assert results[NEW_VALUES[op]].dtype == given["values"].dtype
    # Where rounding changes the ranking, the chosen scores change little, but the indices may be others.
    searches = ("topk_search", "paged_topk_search", "product_key_search", "indexer_search")
    compared = {**dict.fromkeys(searches, 1), "topk_read": 0, "product_key_read": 0}.get(op)
    for got, want in list(zip(results, _exact(op, given)))[:compared]:
        close(got.detach().double(), want.double(), 3e-2)
    if not _floats(given):
        return  # an op on integers
    sum(r.double().sum() for r in results if r.is_floating_point()).backward()
    for name in _floats(given):
        assert given[name].grad is not None and given[name].grad.dtype == given[name].dtype, name
        assert given[name].grad.isfinite().all()


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("op", ORDINARY)
def test_every_mixture_of_dtypes_runs(backend, op, low):
    names = _floats(_given(op))
    for dtypes in itertools.product((torch.float32, low), repeat=len(names)):
        given = _given(op)
        given.update({n: given[n].to(d) for n, d in zip(names, dtypes)})
        _check(op, backend, given, low)


@pytest.mark.parametrize("op", sorted(NEW_VALUES))
def test_a_memory_in_the_other_16_bit_type_keeps_it(backend, op):
    for low, own in (LOW, LOW[::-1]):
        given = _given(op)
        given["values"] = given["values"].to(own)
        _check(op, backend, given, low)


def _fitted(x: torch.Tensor, like: torch.Tensor, share: bool) -> torch.Tensor:
    """The numbers of ``x``, repeated, in the shape of ``like``; in [0, 1] where they are shares."""
    flat = x.masked_fill(x.isinf(), 0).flatten()
    x = flat.repeat(-(-like.numel() // flat.numel()))[: like.numel()].reshape(like.shape)
    return torch.sigmoid(x) if share else torch.tanh(x)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("first", ORDINARY)
def test_the_results_of_every_op_go_into_every_other(backend, first, low):
    with torch.autocast("cpu", low):
        results = [r for r in run(first, backend, **_given(first)) if r.is_floating_point()]
        kinds = {r.dtype: r for r in results}.values()  # one result per dtype: only the dtype matters to the next op
    for second in ORDINARY:
        for name in _floats(_given(second)):
            for result in kinds:
                given = _given(second)
                share = name in ("weights", "forget", "mix", "erase", "scale")
                given[name] = _fitted(result, given[name], share).to(result.dtype).detach()
                _check(second, backend, given, low)


def test_reads_in_two_dtypes_merge(backend):
    given = arguments("merge_reads")
    reads, lses = list(given["reads"]), list(given["lses"])
    wanted = mk.merge_reads([r.double() for r in reads], [x.double() for x in lses], backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = mk.merge_reads([reads[0].bfloat16(), reads[1]], [lses[0], lses[1].bfloat16()], backend=backend)
    assert got[0].dtype == torch.float32
    for one, other in zip(got, wanted):
        close(one.double(), other, 1e-2)
    with pytest.raises(ValueError, match="^merge_reads: reads must all be like the first"):
        mk.merge_reads([reads[0].bfloat16(), reads[1]], lses, backend=backend)


@pytest.mark.parametrize("op", ["gated_write_", "slot_write_", "softmax_write_", "sparse_write_"])
def test_writes_in_place_keep_the_memory(backend, op):
    given = {**_given(op.removesuffix("_")), "values": arguments(op)["values"]}
    given = {n: x.bfloat16() if n in ("write", "query", "weights") else x for n, x in given.items()}
    wanted = _exact(op, {**given, "values": given["values"].clone()})
    memory = given["values"]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert run(op, backend, **given)[0] is memory
    assert memory.dtype == torch.float32
    close(memory.double(), wanted[0], 3e-2)


def test_float64_stays_float64(backend):
    for op in ORDINARY:
        given = arguments(op, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            results = run(op, backend, **given)
        assert all(r.dtype == torch.float64 for r in results if r.is_floating_point())
        for got, want in zip(results, run(op, "reference", **given)):
            close(got.double(), want.double(), 1e-12)


def test_compressed_slots(backend):
    given = arguments("softmax_read")
    keys = (given["keys"] * 40).round().clamp(-127, 127)
    row = torch.full(keys.shape[:-1], 1 / 64, dtype=torch.bfloat16)
    wanted = run("softmax_read", "reference", query=given["query"].double(), keys=keys.double() / 64,
                 values=given["values"].double())[0]  # fmt: skip
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", torch.bfloat16):
            got = run("softmax_read", backend, query=given["query"], keys=keys.to(torch.int8),
                      values=given["values"].to(kind), key_scale=row)[0]  # fmt: skip
        close(got.double(), wanted, 3e-2)


def test_without_autocast_dtypes_must_fit(backend):
    given = arguments("sparse_write")
    with pytest.raises(TypeError, match="^sparse_write: write must be float32, got bfloat16$"):
        run("sparse_write", backend, **{**given, "write": given["write"].bfloat16()})
