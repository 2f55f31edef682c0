"""Which GPU backend `auto` tries first: the fastest measured one, or by the rule where nothing was measured."""

from __future__ import annotations

import json

import pytest
import torch
from support import randn

from bench import fastest
from memkernels import backends, spec
from memkernels.registration import OPS

ROW = ("softmax_read", "9.0", 16, True)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which every backend of one has every kernel, and one row of the table."""
    monkeypatch.setattr(backends.Backend, "gap", lambda own, op, device, dtype=None: None if device != "cpu" else "no")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "measured", lambda: {ROW: "triton"})


def chosen(op: str, dtype: torch.dtype, few: bool) -> str:
    return backends.select(op, "cuda", dtype, "auto", few).name


def test_what_was_measured_comes_first(gpu):
    assert chosen("softmax_read", torch.bfloat16, True) == "triton"


def test_without_a_measurement_few_tokens_go_to_cuda_and_many_to_triton(gpu):
    assert chosen("softmax_read", torch.float32, True) == "cuda"
    assert chosen("address", torch.bfloat16, True) == "cuda"
    assert chosen("softmax_read", torch.bfloat16, False) == "triton"


def test_the_next_backend_takes_what_the_first_cannot(gpu, monkeypatch):
    gap = lambda own, op, device, dtype=None: None if own.name == "triton" else "it has no kernel"  # noqa: E731
    monkeypatch.setattr(backends.Backend, "gap", gap)
    assert chosen("address", torch.bfloat16, True) == "triton"


def test_the_choice_is_a_constant_to_torch_compile(gpu):
    @torch.compile(fullgraph=True, backend="eager")
    def double_where_cuda(x):
        name = backends.select("address", "cuda", torch.bfloat16, "auto", bool(x.shape[0] <= backends.FEW)).name
        return 2 * x if name == "cuda" else x

    torch._dynamo.reset()
    assert double_where_cuda(torch.ones(3)).sum() == 6
    assert double_where_cuda(torch.ones(30)).sum() == 30


def test_tokens_are_counted_by_the_memory_that_they_share():
    op = OPS["softmax_read"]
    query, keys, values = randn(4, 3, 5, 8), randn(4, 1, 9, 8), randn(9, 7)
    assert spec.check(op, [query, keys, values, None]).tokens == 15
    assert spec.check(op, [query, keys[0, 0], values, None]).tokens == 60
    assert spec.check(op, [query[:0], keys[:0], values, None]).tokens == 0


def test_the_shipped_table_names_ops_and_backends_that_there_are():
    rows = json.loads(backends.FASTEST.read_text())
    assert {row["op"] for row in rows} <= set(OPS)
    assert {row["backend"] for row in rows} <= {"cuda", "triton"}
    assert len({(r["op"], r["capability"], r["bits"], r["few"]) for r in rows}) == len(rows)


@pytest.mark.parametrize("op", ["softmax_read", "gated_write", "topk_search", "sparse_read", "slot_usage"])
def test_backends_are_timed_forward_and_backward(op, monkeypatch, capsys):
    monkeypatch.setattr(fastest, "SIZES", dict.fromkeys((True, False), {"T": 20, "N": 600, "K": 16, "V": 16, "k": 4}))
    names = ("cpu", "reference")
    assert fastest.fastest(OPS[op], False, torch.float32, "cpu", names, 0.02) in names
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in names), printed
