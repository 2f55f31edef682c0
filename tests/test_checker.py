"""The checker itself: every kind of mistake that a kernel can make turns a row red."""

from __future__ import annotations

import pytest
import torch
from support import NATIVE, READY, operator, subject

from memkernels import testing
from memkernels.registration import OPS
from memkernels.spec import several
from memkernels.testing import grid
from memkernels.testing.compare import FLOOR, distance, norms, special_values, wrong_choice


def _rows(monkeypatch, op: str, case: str, spoil, dtype=torch.float32):
    """The rows of a backend whose results went through ``spoil(inputs, results) -> results``."""
    whole = grid._call

    def spoiled(op, backend, target, *inputs):
        return spoil(inputs, several(whole(op, "reference", target, *inputs)))

    monkeypatch.setattr(grid, "_call", spoiled)
    return subject(op, case, dtype).rows("cpu")


def test_an_untouched_kernel_passes(monkeypatch):
    rows = _rows(monkeypatch, "softmax_read", "usual", lambda inputs, results: results)
    assert all(r.passed for r in rows), "\n".join(str(r) for r in rows)


@pytest.mark.parametrize("direction", [0, 1])
def test_an_error_of_one_in_a_thousand_fails_both_directions(monkeypatch, direction):
    rows = _rows(monkeypatch, "softmax_read", "usual", lambda inputs, results: [results[0] * 1.001, *results[1:]])
    assert not rows[direction].passed
    assert "error" in rows[direction].message


def _small(x: torch.Tensor, share: float) -> torch.Tensor:
    chosen = (x > 0) & (x < share * x.max())
    assert chosen.any()
    return chosen


# The weights that each op returns, with an error that is small beside the largest weight.
WEIGHTS = {
    "small weights half a percent off": lambda x: torch.where(_small(x, 1e-2), x * 1.005, x),
    "small weights missing": lambda x: x.masked_fill(_small(x, 1e-2), 0),
    "only the smallest off": lambda x: torch.where(x == _ascending(x)[0], x * 1.01, x),
    "the two smallest swapped": lambda x: _swapped(
        x, _ascending(x)[0], next(n for n in _ascending(x) if n > 1.1 * _ascending(x)[0])
    ),
    "a bias": lambda x: torch.where(x > 0, x + 3e-6 * x.max(), x),
}


def _ascending(x: torch.Tensor) -> torch.Tensor:
    """The different numbers of ``x``, smallest first, without those that float32 may flush to zero."""
    return x[x > 1e-30].unique()


def _swapped(x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(x == one, other, torch.where(x == other, one, x))


@pytest.mark.parametrize("mutant", WEIGHTS)
@pytest.mark.parametrize("op", ["address", "slot_usage", "topk_read", "product_key_read"])
def test_wrong_small_weights_fail(monkeypatch, op, mutant):
    place = 2 if op.endswith("_read") else 0

    def spoil(inputs, results):
        return [WEIGHTS[mutant](r) if i == place else r for i, r in enumerate(results)]

    assert all(r.passed for r in _rows(monkeypatch, op, "one slot takes all", lambda i, r: r))
    monkeypatch.undo()
    row = _rows(monkeypatch, op, "one slot takes all", spoil)[0]
    assert not row.passed, mutant
    assert "a number of" in row.message or "error" in row.message


def _smallest_row(x: torch.Tensor) -> torch.Tensor:
    """Mask of the row whose largest number is the smallest."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return (largest == largest.min()).expand_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", ["softmax_read", "gated_write", "memory_scan", "gated_scan"])
def test_one_small_row_off_fails_in_both_directions(monkeypatch, op, dtype):
    off = 3 * {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]

    def spoil(inputs, results):
        return [torch.where(_smallest_row(results[0]), results[0] * (1 + off), results[0]), *results[1:]]

    rows = _rows(monkeypatch, op, "usual", spoil, dtype)
    assert not rows[0].passed
    monkeypatch.undo()

    def spoil_gradient(inputs, results):
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(lambda g: torch.where(_smallest_row(g), g * (1 + 20 * off), g))
        return results

    rows = _rows(monkeypatch, op, "usual", spoil_gradient, dtype)
    assert rows[0].passed and not rows[1].passed
    assert "a row of at most" in rows[1].message or "error" in rows[1].message


def test_one_number_left_unwritten_fails(monkeypatch):
    def spoil(inputs, results):
        fresh = torch.empty_like(results[0])
        fresh.view(-1)[1:] = results[0].reshape(-1)[1:]
        return [fresh, *results[1:]]

    rows = _rows(monkeypatch, "softmax_read", "usual", spoil)
    assert "NaN where the reference has none" in rows[0].message


def test_a_modified_input_fails(monkeypatch):
    def spoil(inputs, results):
        inputs[1].detach()[..., 0, 0] += 1
        return results

    assert "keys was modified" in _rows(monkeypatch, "softmax_read", "usual", spoil)[0].message


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda i, r: [r[0].double(), *r[1:]], "must be"),
        (lambda i, r: [r[0][..., :-1], *r[1:]], "must be"),
        (lambda i, r: (_ for _ in ()).throw(RuntimeError("out of luck")), "out of luck"),
    ],
)
def test_wrong_dtype_shape_and_exceptions_fail(monkeypatch, spoil, message):
    assert message in _rows(monkeypatch, "softmax_read", "usual", spoil)[0].message


def test_a_number_where_the_reference_is_nan_fails(monkeypatch):
    rows = _rows(monkeypatch, "softmax_read", "NaN in one token", lambda i, r: [torch.nan_to_num(x) for x in r])
    assert "NaN" in rows[0].message


def test_a_finite_lse_of_an_empty_memory_fails(monkeypatch):
    rows = _rows(monkeypatch, "softmax_read", "all slots empty", lambda i, r: [r[0], torch.full_like(r[1], -1e30)])
    assert "infinities" in rows[0].message


def _choice(change, case="usual", exact=False):
    s = subject("topk_search", case)
    tensors = s.inputs.doubled()
    indices = s.op.reference(*tensors, *s.inputs.params)[1].clone()
    return wrong_choice(s.op, tensors, s.inputs.params, change(indices), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i, ""),
        (lambda i: i.flip(-1), "order"),
        (lambda i: i.index_fill(-1, torch.tensor([0]), 10**6), "outside"),
        (lambda i: i.index_fill(-1, torch.tensor([0]), -2), "outside"),
        (lambda i: i.index_fill(-1, torch.tensor([7]), -1), "run out"),
        (lambda i: i[..., :1].expand(i.shape), "twice"),
        (lambda i: (i + 1) % 64, "better slot"),
    ],
)
def test_wrong_choices_of_slots_are_found(change, message):
    found = _choice(change)
    assert message in found if message else not found


def test_ties_must_go_to_the_smaller_index():
    assert not _choice(lambda i: i, "all scores equal", exact=True)
    assert "ties" in _choice(lambda i: i.flip(-1), "all scores equal", exact=True)


def test_norm_is_the_own_size_but_not_less_than_a_share_of_the_largest():
    big, small, none = torch.tensor([10.0]), torch.tensor([1e-3, torch.inf]), torch.zeros(0)
    assert norms([big, small, none]) == [10.0, 10.0 * FLOOR, 10.0 * FLOOR]
    assert distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 4.0) == 0.5
    assert special_values(torch.tensor([torch.inf]), torch.tensor([-torch.inf]), nan_must_stay=True)


def test_check_covers_what_is_asked_and_reports_progress():
    seen = []
    rows = testing.check("merge_reads", "reference", "float32", quick=True, progress=lambda *at: seen.append(at))
    assert {(r.op, r.backend, r.dtype, r.device) for r in rows} == {("merge_reads", "reference", "float32", "cpu")}
    assert {r.direction for r in rows} == {"forward", "backward"}
    assert seen and seen[-1][0] == seen[-1][1] == len(seen)
    assert all(r.passed for r in rows) and "ok" in testing.report(rows)


@pytest.mark.parametrize("wrong", [{"op": "soft_read"}, {"backend": "tpu"}, {"dtype": "int8"}, {"device": "moon"}])
def test_check_refuses_unknown_names(wrong):
    with pytest.raises(ValueError, match="must be"):
        testing.check(**wrong)


def test_a_missing_backend_is_a_failed_row(monkeypatch):
    from memkernels import backends

    gone = backends.Backend("cpu", ("cpu",), lambda: "it is not built")
    monkeypatch.setattr(backends, "BACKENDS", (gone,))
    rows = testing.check("softmax_read", dtype="float32", quick=True)
    failed = [r for r in rows if not r.passed]
    assert {r.direction for r in failed} == {"forward", "backward"}
    assert all("it is not built" in r.message for r in failed)


def test_an_op_without_a_kernel_is_a_gap_unless_the_backend_is_asked_for_by_name(monkeypatch):
    from memkernels import backends

    monkeypatch.setattr(backends, "_kernels", backends._kernels - {("memkernels_cpu::softmax_read_backward", "cpu")})
    rows = testing.check("softmax_read", dtype="float32", quick=True)
    (gap,) = (r for r in rows if r.gap)
    assert all(r.passed for r in rows) and (gap.backend, gap.direction) == ("cpu", "backward")
    assert "has no backward kernel" in gap.message and gap.message in testing.report(rows)
    assert f"{len(rows) - 1} of {len(rows) - 1} passed" in testing.report(rows)
    named = testing.check("softmax_read", "cpu", "float32", quick=True)
    assert [(r.direction, r.passed, r.gap) for r in named if r.case == "-"] == [("backward", False, False)]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("op", READY)
def test_poisoned_memory_reaches_the_native_allocator(op, backend):
    """Memory that the native library allocates through torch is filled too, so that unwritten outputs are seen."""
    s = subject(op, "usual", torch.float32)
    run = operator(backend, op)
    made = len(OPS[op].outputs)
    if backend == "cpu":
        switch = torch.ops.memkernels_cpu.fill_new_memory
        before = switch(False)
        run(*s.inputs.tensors, *s.inputs.params)
        assert switch(False) == before
        with testing.nan_in_new_memory():
            run(*s.inputs.tensors, *s.inputs.params)
        assert switch(False) >= before + made
        return
    with testing.nan_in_new_memory(), torch.profiler.profile() as profile:
        run(*s.inputs.tensors, *s.inputs.params)
    names = [e.name for e in profile.events()]
    new = sum(n in ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty") for n in names)
    assert new >= made
    assert names.count("aten::fill_") >= made
