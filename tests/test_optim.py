"""SparseAdam against torch's own and against its equation as loops; what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn

import memkernels as mk
from memkernels.optim import SparseAdam
from memkernels.optim.sparse_adam import by_formula

N, V = 40, 19


def loss(table: torch.Tensor, step: int) -> torch.Tensor:
    indices = torch.randint(-1, N, (3, 6), generator=torch.Generator().manual_seed(step))
    return (mk.gather_rows(table, indices, sparse_grad=True) * randn(3, 6, V, seed=step).to(table.dtype)).square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_torch_and_as_the_equation(dtype):
    start = randn(N, V).to(dtype)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    exact, m, v = start.double(), torch.zeros(N, V, dtype=torch.float64), torch.zeros(N, V, dtype=torch.float64)
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = SparseAdam([ours], **options), torch.optim.SparseAdam([theirs], **options)
    for step in range(1, 5):
        for table, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            loss(table, step).backward()
        gradient = ours.grad.coalesce()
        for slot, row in zip(gradient.indices()[0].tolist(), gradient.values().double()):
            for c, g in enumerate(row.tolist()):
                m[slot, c] = 0.8 * m[slot, c] + 0.2 * g
                v[slot, c] = 0.95 * v[slot, c] + 0.05 * g * g
                scale = 0.03 * math.sqrt(1 - 0.95**step) / (1 - 0.8**step)
                exact[slot, c] -= scale * m[slot, c] / (math.sqrt(v[slot, c]) + 1e-6)
        for optimizer in optimizers:
            optimizer.step()
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        close(ours.detach().double(), exact, tolerance)
        if dtype in (torch.bfloat16, torch.float16):  # torch keeps its moments in 16 bits
            exact = ours.detach().double()  # each step rounds the table
        else:
            close(ours.detach().double(), theirs.detach().double(), tolerance)
    assert optimizers[0].state[ours]["exp_avg"].dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_the_kernel_equals_the_formula_and_leaves_other_rows(tmp_path):
    slots, gradient = torch.tensor([1, 4, 38]), randn(3, V, dtype=torch.float32)
    given = [randn(N, V, seed=i, dtype=torch.float32).abs() for i in range(3)]
    kernel, formula = ([x.clone() for x in given] for _ in range(2))
    torch.ops.memkernels_cpu.sparse_adam(*kernel, slots, gradient, 0.1, 0.9, 0.99, 1e-8)
    by_formula(*formula, slots, gradient, 0.1, 0.9, 0.99, 1e-8)
    for got, wanted, before in zip(kernel, formula, given):
        close(got.double(), wanted.double(), 1e-6)
        others = torch.ones(N, dtype=torch.bool).index_fill_(0, slots, False)
        assert torch.equal(got[others], before[others]) and not torch.equal(got[slots], before[slots])


def test_rows_of_several_tasks():
    """Tasks take so many bytes of rows; every row between two of them is stepped once, and no other."""
    n = 5000  # rows of 300 floats: 6 MB
    slots, gradient = torch.arange(0, n, 2), torch.rand(n // 2, 300) + 0.5
    kernel, formula = ([torch.zeros(n, 300) for _ in range(3)] for _ in range(2))
    torch.ops.memkernels_cpu.sparse_adam(*kernel, slots, gradient, 0.1, 0.9, 0.99, 1e-8)
    by_formula(*formula, slots, gradient, 0.1, 0.9, 0.99, 1e-8)
    for got, wanted in zip(kernel, formula):
        close(got.double(), wanted.double(), 1e-6)
        assert got[::2].all() and not got[1::2].any()


def test_a_gradient_that_is_not_coalesced():
    """Slots that occur twice and do not ascend, as after several backward passes."""
    rows = randn(4, V, dtype=torch.float32)
    once, twice = (torch.nn.Parameter(randn(N, V, dtype=torch.float32)) for _ in range(2))
    once.grad = torch.sparse_coo_tensor(
        [[2, 5, 9]], torch.stack([rows[1], rows[0] + rows[2], rows[3]]), (N, V), check_invariants=True
    )
    twice.grad = torch.sparse_coo_tensor([[5, 2, 5, 9]], rows, (N, V), check_invariants=True)
    before = once.detach().clone()
    for table in (once, twice):
        SparseAdam([table], lr=0.1).step()
    close(twice.detach().double(), once.detach().double(), 1e-5)
    assert (once != before).any(1).nonzero().flatten().tolist() == [2, 5, 9]


def test_state_is_saved_and_steps_go_on(tmp_path):
    table, again = (torch.nn.Parameter(randn(N, V, dtype=torch.float32)) for _ in range(2))
    one, other = SparseAdam([table], lr=0.1), SparseAdam([again], lr=0.1)
    loss(table, 0).backward()
    one.step()
    with torch.no_grad():
        again.copy_(table)
    torch.save(one.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state"))
    for parameter, optimizer in ((table, one), (again, other)):
        optimizer.zero_grad()
        assert optimizer.step(lambda p=parameter: _again(p)) > 0
    assert torch.equal(table, again)


def _again(parameter):
    value = loss(parameter, 1)
    value.backward()
    return value.item()


def test_what_is_refused_changes_nothing():
    table = torch.nn.Parameter(randn(N, V, dtype=torch.float32))
    before = table.detach().clone()
    optimizer = SparseAdam([table])
    optimizer.step()  # no gradient
    table.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"^SparseAdam: gradients must be sparse, got one of torch.strided$"):
        optimizer.step()
    assert torch.equal(table, before)
    for bad, sentence in (
        ({"lr": 0.0}, "lr and eps must be above 0, got 0.0 and 1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got 0.9 and 1.0"),
    ):
        with pytest.raises(ValueError, match=f"^SparseAdam: {sentence}$"):
            SparseAdam([table], **bad)
    with pytest.raises(ValueError, match=r"^SparseAdam: params must be contiguous floats \[N, V\], got float32 \[3\]$"):
        SparseAdam([torch.nn.Parameter(torch.zeros(3))])


def test_the_operator_guards_memory():
    rows = [torch.zeros(4, 3) for _ in range(3)]
    call = torch.ops.memkernels_cpu.sparse_adam
    for slots, gradient, sentence in (
        (torch.tensor([4]), torch.zeros(1, 3), r"slots must be in \[0, 4\), got 4"),
        (torch.tensor([-1]), torch.zeros(1, 3), r"slots must be in \[0, 4\), got -1"),
        (torch.tensor([2, 2]), torch.zeros(2, 3), "slots must ascend, got 2 behind 2"),
        (torch.tensor([1]), torch.zeros(2, 3), r"gradient must be contiguous, \[1, 3\], and of its dtype"),
        (torch.tensor([1]), torch.zeros(1, 3).double(), r"gradient must be contiguous, \[1, 3\], and of its dtype"),
    ):
        with pytest.raises(RuntimeError, match=f"^sparse_adam: {sentence}$"):
            call(*rows, slots, gradient, 0.1, 0.9, 0.99, 1e-8)
    short = torch.zeros(4, 3)
    short.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="^sparse_adam: first reaches beyond its storage of 8 bytes$"):
        call(rows[0], short, rows[2], torch.tensor([1]), torch.zeros(1, 3), 0.1, 0.9, 0.99, 1e-8)
