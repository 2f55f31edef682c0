"""FlopCounterMode counts the operators: forward and backward, the hand count of every op."""

from __future__ import annotations

import pytest
import torch
from promised import PROMISED
from support import operator, randn, run_python, subject
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import memkernels as mk
from memkernels.registration import OPS
from memkernels.spec import several

# Multiply-adds of one stream at the sizes below, by hand: (forward, backward).
T, N, K, V, k, S, D, W, n, h, F, B, H = 7, 33, 16, 24, 4, 3, 20, 50, 6, 8, 6, 3, 3
HAND = {
    "address": (T * N * K, 2 * T * N * K),
    "additive_read": (T * N * (2 * K + V), 3 * T * N * (2 * K + V)),
    "softmax_read": (T * N * K + T * N * V, 3 * T * N * K + 2 * T * N * V),
    "slot_usage": (T * N * K, 3 * T * N * K),
    "topk_search": (T * N * K, 2 * T * k * K),
    "topk_read": (T * N * K + T * k * V, 2 * T * k * (K + V)),
    "sparse_read": (T * k * V, 2 * T * k * V),
    "selected_scores": (T * k * K, 2 * T * k * K),
    "selected_read": (T * k * (K + V), 2 * T * k * (K + V)),
    "indexer_search": (T * N * H * (K + 1), T * k * H * (3 * K + 1)),
    "paged_topk_search": (T * F * S * K, 2 * T * k * K),
    "product_key_search": (2 * T * n * h, 4 * T * k * h),
    "product_key_read": (2 * T * n * h + T * k * V, 2 * T * k * (2 * h + V)),
    "merge_reads": (S * T * V, 2 * S * T * V),
    "gated_write": (T * N * (K + V), T * N * (3 * K + 2 * V)),
    "softmax_write": (T * N * (2 * K + V), T * N * (4 * K + 2 * V)),
    "slot_write": (2 * T * N * V, 6 * T * N * V),
    "sparse_write": (2 * T * k * V, 6 * T * k * V),
    "memory_scan": (T * N * (2 * K + 3 * V), T * N * (6 * K + 8 * V)),
    "gated_scan": (T * D, 2 * T * D),
    "cell_scan": (3 * T * D * D, 9 * T * D * D),
    "cache_logprobs": (T * (W + N), 2 * T * (W + N)),
    "cache_nll": (T * (W + N), 2 * T * (W + N)),
    "memory_gate": (4 * B * D, 7 * B * D),
}
MOVING = ("ngram_slots", "gather_rows")  # integers and rows: nothing is counted


def counted(run) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(name).rsplit(".", 1)[-1]: flops for name, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("op", [op for op in PROMISED if op not in MOVING])
@pytest.mark.parametrize("streams", [1, 2])
def test_every_op_forward_and_backward(native, op, streams):
    s = subject(op, "no leading dimensions", torch.float32)
    tensors = list(s.inputs.tensors)
    if streams == 2:
        flat = [a.flat for a in OPS[op].args]
        tensors = [t if t is None or one else torch.stack([t, t]) for t, one in zip(tensors, flat)]
    tensors = [t.requires_grad_() if i in s.wanting else t for i, t in enumerate(tensors)]

    def run():
        results = several(mk.registration.call(OPS[op], tensors, tuple(s.inputs.params), native))
        sum(torch.nan_to_num(r).sum() for r in results if r.requires_grad).backward()

    forward, backward = HAND[OPS[op].twin_of or op]
    found = counted(run)
    assert found[op] == 2 * streams * forward
    assert found[f"{op}_backward"] == 2 * streams * backward


def test_a_shared_memory_in_place_twins_and_options():
    values, keys = randn(N, V), randn(N, K)
    query, write = randn(2, 3, T, K), randn(2, 3, T, V)
    found = counted(lambda: mk.gated_write_(values, keys, query, write, slot_mask=randn(N), backend="cpu"))
    assert found == {"gated_write_": 2 * 6 * T * N * (K + V)}
    found = counted(lambda: mk.topk_read(query, keys, values, 5, backend="cpu"))
    assert found["topk_read"] == 2 * 6 * (T * N * K + T * 5 * V)


def test_meta_fake_and_compiled_calls(native):
    tensors = [randn(T, K), randn(N, K), randn(N, V)]
    wanted = {"softmax_read": 2 * T * N * (K + V)}
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        assert counted(lambda: mk.softmax_read(*fakes, backend=native)) == wanted
    run = operator(native, "softmax_read")
    assert counted(lambda: run(*(x.to("meta") for x in tensors), None, None, 0.5)) == wanted
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: mk.softmax_read(*x, backend=native), backend="aot_eager")
    compiled(*tensors)
    assert counted(lambda: compiled(*tensors)) == wanted


def test_the_formula_counts_its_products():
    """Scores and weighted sum of the reference are products that torch counts: the same number."""
    tensors = [randn(T, K), randn(N, K), randn(N, V)]
    assert sum(counted(lambda: mk.softmax_read(*tensors, backend="reference")).values()) == 2 * T * N * (K + V)


@pytest.mark.parametrize("first", ["memkernels", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    code = (
        f"import sys, {first}\n"
        "import torch, memkernels as mk\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == ({first!r} != 'memkernels')\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    mk.softmax_read(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5, 4), backend='cpu')\n"
        "print(counter.get_total_flops())"
    )
    done = run_python(code)
    assert done.stdout.strip() == str(2 * 2 * 5 * 7), done.stderr


def test_every_op_declares_its_cost():
    counted = [op for op in PROMISED if op not in MOVING]
    assert all(OPS[op].flops is not None and OPS[op].backward_flops is not None for op in counted)
    assert set(HAND) == {op for op in counted if not OPS[op].twin_of}
