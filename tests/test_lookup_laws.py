"""gather_rows and memory_gate: rows to the bit, sparse gradients, the gate's equation written as loops."""

from __future__ import annotations

import math
import re

import pytest
import torch
from support import close, randn

import memkernels as mk

N, V = 50, 64
INDICES = torch.randint(-1, N, (3, 7), generator=torch.Generator().manual_seed(0))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def table(dtype: torch.dtype, width: int = V) -> torch.Tensor:
    """Rows with every 8-bit number, or with zeros, denormals, infinities and the largest numbers."""
    if dtype in (torch.int8, torch.float8_e4m3fn):
        numbers = torch.arange(N * width).remainder(256).to(torch.uint8).view(dtype)
        return numbers.view(N, width)
    x = randn(N, width)
    x[::5] *= 1e-40
    x[1::7] = 0.0
    x[2, :3] = torch.tensor([torch.inf, -torch.inf, 65504.0])[:width]
    return x.to(dtype)


def same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan)
    kind = BITS.get(got.dtype, torch.int64)
    assert torch.equal(got.view(kind)[~nan], wanted.view(kind)[~nan])


@pytest.mark.parametrize("width", [V, 72, 5, 1, 300])
def test_float_rows_are_those_of_the_table(backend, width):
    for given in FLOATS:
        for wanted in FLOATS:
            values = table(given, width)
            rows = values[INDICES.clamp(min=0)].masked_fill((INDICES < 0).unsqueeze(-1), 0).to(wanted)
            same_bits(mk.gather_rows(values, INDICES, dtype=wanted, backend=backend), rows)
            same_bits(
                mk.gather_rows(values, INDICES.int(), backend=backend), rows if wanted == given else rows_of(values)
            )
    doubles = table(torch.float64, width)
    assert torch.equal(mk.gather_rows(doubles, INDICES, backend=backend), rows_of(doubles))


def rows_of(values: torch.Tensor) -> torch.Tensor:
    return values[INDICES.clamp(min=0)].masked_fill((INDICES < 0).unsqueeze(-1), 0)


@pytest.mark.parametrize("given", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("width", "block"), [(V, None), (V, 32), (72, 32), (71, 5), (256, 32), (3, 1), (40, 100)])
def test_dequantised_rows_are_rounded_once(backend, given, width, block):
    """Every 8-bit number times its scale in float32, then rounded to the result: plain PyTorch, to the bit."""
    values = table(given, width)
    blocks = 1 if block is None else -(-width // block)
    scale = torch.rand(N, blocks, generator=torch.Generator().manual_seed(1)) / 64
    powers = torch.randint(100, 150, (N, blocks), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    for each in (scale, powers.view(torch.float8_e8m0fnu)):
        factor = each.float().repeat_interleave(block or width, 1)[:, :width]
        for wanted in FLOATS:
            rows = rows_of(values.float() * factor).to(wanted)
            given_scale = each.squeeze(1) if block is None else each
            got = mk.gather_rows(values, INDICES, value_scale=given_scale, block=block, dtype=wanted, backend=backend)
            same_bits(got, rows)
    assert mk.gather_rows(values, INDICES, value_scale=scale[:, 0], backend=backend).dtype == torch.float32


def test_the_extremes_of_e8m0(backend):
    """2^-127 is denormal, 2^127 the largest, 255 no number."""
    values = torch.ones(4, 32, dtype=torch.int8)
    scale = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = mk.gather_rows(values, torch.arange(4), value_scale=scale, backend=backend)
    assert got[:3, 0].tolist() == [2.0**-127, 2.0**-126, 2.0**127] and bool(got[3].isnan().all())


@pytest.mark.parametrize("offset", [0, 1])
def test_a_large_result_is_written_whole(native, offset):
    """16 MiB take non-temporal stores where rows are aligned; either way every byte is written."""
    values = torch.randn(3000, 256 + offset).to(torch.float8_e4m3fn)
    indices = torch.randint(-1, 3000, (40_000,), generator=torch.Generator().manual_seed(3))
    scale = torch.rand(3000)
    for dtype in FLOATS:
        with mk.testing.nan_in_new_memory():
            got = mk.gather_rows(values, indices, value_scale=scale, dtype=dtype, backend=native)
        wanted = (values.float() * scale[:, None]).to(dtype)[indices.clamp(min=0)]
        assert torch.equal(got, wanted.masked_fill((indices < 0).unsqueeze(-1), 0))


def test_gather_into_memory_of_the_caller():
    values, scale = table(torch.int8), torch.rand(N, 2)
    out = torch.empty(3, 7, V, dtype=torch.bfloat16)
    torch.ops.memkernels_cpu.gather_rows_out(values, INDICES, scale, 32, out)
    wanted = mk.gather_rows(values, INDICES, value_scale=scale, block=32, dtype=torch.bfloat16)
    assert torch.equal(out, wanted)
    for wrong in (out[:2], out.transpose(0, 1), out.double().half()[..., ::2], torch.empty(0, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="gather_rows_out: out must be contiguous, with a row for every index"):
            torch.ops.memkernels_cpu.gather_rows_out(values, INDICES, scale, 32, wrong)
    short = torch.empty(3, 7, V, dtype=torch.bfloat16)
    short.untyped_storage().resize_(64)
    with pytest.raises(RuntimeError, match="gather_rows_out: out reaches beyond its storage of 64 bytes"):
        torch.ops.memkernels_cpu.gather_rows_out(values, INDICES, scale, 32, short)


# --- sparse gradients ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sparse_gradient_is_the_dense_one(backend, dtype):
    values = randn(N, V).to(dtype).requires_grad_()
    d = randn(3, 7, V, seed=1).to(dtype)
    (dense,) = torch.autograd.grad(mk.gather_rows(values, INDICES, backend=backend), values, d)
    (sparse,) = torch.autograd.grad(mk.gather_rows(values, INDICES, sparse_grad=True, backend=backend), values, d)
    assert sparse.layout == torch.sparse_coo and sparse.is_coalesced() and sparse.dtype == dtype
    slots = sparse.indices()[0]
    assert slots.tolist() == sorted(set(INDICES.flatten().tolist()) - {-1})
    exact = torch.zeros(N, V, dtype=torch.float64)
    exact.index_add_(0, INDICES.clamp(min=0).flatten(), rows_of_zero(d).double().flatten(0, 1))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    close(sparse.to_dense().double(), exact, tolerance)
    assert torch.equal(sparse.to_dense(), dense)
    (again,) = torch.autograd.grad(mk.gather_rows(values, INDICES, sparse_grad=True, backend=backend), values, d)
    assert torch.equal(again.values(), sparse.values())


def rows_of_zero(d: torch.Tensor) -> torch.Tensor:
    return d.masked_fill((INDICES < 0).unsqueeze(-1), 0)


def test_second_derivatives_through_a_sparse_gradient(backend):
    values, d = randn(N, 5).requires_grad_(), randn(3, 7, 5, seed=1).requires_grad_()

    def twice(sparse: bool):
        rows = mk.gather_rows(values, INDICES, sparse_grad=sparse, backend=backend)
        (first,) = torch.autograd.grad((rows**2 * d).sum(), values, create_graph=True)
        first = first.coalesce().values() if sparse else first[sorted(set(INDICES.flatten().tolist()) - {-1})]
        found = torch.autograd.grad((first**2).sum(), (values, d))
        return [x.to_dense() for x in found]

    for got, wanted in zip(twice(True), twice(False)):
        close(got, wanted)


def test_sparse_adam_takes_the_gradient(backend):
    values = torch.nn.Parameter(randn(N, V, dtype=torch.float32))
    dense = torch.nn.Parameter(values.detach().clone())
    before = values.detach().clone()
    torch.optim.SparseAdam([values], lr=0.1).zero_grad()
    for one, sparse, make in ((values, True, torch.optim.SparseAdam), (dense, False, torch.optim.Adam)):
        optimizer = make([one], lr=0.1)
        mk.gather_rows(one, INDICES, sparse_grad=sparse, backend=backend).square().sum().backward()
        optimizer.step()
    touched = torch.zeros(N, dtype=torch.bool).index_fill_(0, INDICES.clamp(min=0).flatten(), True)
    touched[0] = bool((INDICES == 0).any())
    close(values.detach()[touched].double(), dense.detach()[touched].double(), 1e-3)  # eps stands elsewhere
    assert torch.equal(values.detach()[~touched], before[~touched])


def test_no_gradient_is_wanted_or_nothing_is_named(backend):
    values = randn(N, V, dtype=torch.float32)
    assert not mk.gather_rows(values, INDICES, sparse_grad=True, backend=backend).requires_grad
    values.requires_grad_()
    for indices in (torch.full((2, 3), -1), torch.zeros(0, 4, dtype=torch.int64)):
        rows = mk.gather_rows(values, indices, sparse_grad=True, backend=backend)
        (gradient,) = torch.autograd.grad(rows.sum(), values)
        assert gradient._nnz() == 0 and gradient.shape == values.shape


BYTES = torch.zeros(4, 8, dtype=torch.int8)
ROWS = torch.zeros(4, 8)
BAD = [
    ((BYTES, {}), TypeError, "value_scale must be a tensor, got None beside values in int8"),
    ((ROWS, {"value_scale": torch.ones(4)}), TypeError,
     "value_scale is for int8 and float8_e4m3fn, got one beside values in float32"),
    ((BYTES, {"value_scale": torch.ones(5)}), ValueError, "value_scale must be [N], [4], got [5]"),
    ((BYTES, {"value_scale": torch.ones(4, 2), "block": 3}), ValueError,
     "value_scale must be [N, ceil(V / block)], block = 3, [4, 3], got [4, 2]"),
    ((BYTES, {"value_scale": torch.ones(4, 2), "block": 0}), ValueError, "block must be at least 1, got 0"),
    ((BYTES, {"value_scale": torch.ones(4).double()}), TypeError, "value_scale must be float32 or uint8, got float64"),
    ((ROWS, {"block": 4}), ValueError, "block is for values in 8 bits, got 4 without a value_scale"),
    ((ROWS, {"dtype": torch.int32}), TypeError, "dtype must be one of float32, bfloat16, float16, float64, got int32"),
    ((ROWS, {"dtype": torch.float64}), TypeError, "dtype must not be float64 beside values in float32"),
    ((ROWS.double(), {"dtype": torch.float32}), TypeError, "dtype must be float64 beside values in float64"),
    ((ROWS, {"sparse_grad": 1}), TypeError, "sparse_grad must be a bool, got int"),
    ((ROWS[None], {}), ValueError, "values must be [N, V], got [1, 4, 8]"),
    ((ROWS.to(torch.float8_e5m2), {}), TypeError,
     "values must be float32 or bfloat16 or float16 or float64 or int8 or float8_e4m3fn, got torch.float8_e5m2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), BAD)
def test_bad_input_is_one_sentence(backend, call, error, sentence):
    with pytest.raises(error, match=f"^gather_rows: {re.escape(sentence)}$"):
        mk.gather_rows(call[0], torch.arange(3), backend=backend, **call[1])


def test_an_index_out_of_range():
    with pytest.raises(RuntimeError, match=r"^gather_rows: indices must be in \[-1, 4\), got 4$"):
        mk.gather_rows(ROWS, torch.tensor([0, 4]), backend="cpu")
    with pytest.raises(TypeError, match="^gather_rows: indices must be int64 or int32, got float32$"):
        mk.gather_rows(ROWS, torch.ones(2), backend="cpu")
    wants = BYTES.to(torch.float8_e4m3fn).requires_grad_()
    with pytest.raises(RuntimeError, match="^gather_rows: values must not require a gradient in 8 bits, got one$"):
        mk.gather_rows(wants, torch.arange(3), value_scale=torch.ones(4))


# --- the gate ---


def gate_by_loops(hidden, key, value, w_h, w_k, eps, signed_sqrt):
    """[T, B, D], [T, B, D], [T, D], [B, D], [B, D] -> [T, B, D], number by number."""
    T, B, D = hidden.shape
    out = torch.zeros_like(hidden)
    for t in range(T):
        for b in range(B):
            h, k = hidden[t, b].tolist(), key[t, b].tolist()
            r_h = 1 / math.sqrt(sum(x * x for x in h) / D + eps)
            r_k = 1 / math.sqrt(sum(x * x for x in k) / D + eps)
            pairs = zip(h, w_h[b].tolist(), k, w_k[b].tolist())
            g = sum(x * r_h * u * y * r_k * w for x, u, y, w in pairs) / math.sqrt(D)
            if signed_sqrt:
                g = (g > 0) * math.sqrt(max(g, 1e-6)) - (g < 0) * math.sqrt(max(-g, 1e-6))
            out[t, b] = value[t] / (1 + math.exp(-g))
    return out


@pytest.mark.parametrize("signed_sqrt", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 20), (2, 1, 1), (2, 4, 33)])
def test_the_gate_by_loops(backend, shape, signed_sqrt):
    T, B, D = shape
    tensors = [randn(T, B, D), randn(T, B, D, seed=1), randn(T, D, seed=2), randn(B, D, seed=3), randn(B, D, seed=4)]
    got = mk.memory_gate(*tensors, eps=1e-5, signed_sqrt=signed_sqrt, backend=backend)
    close(got, gate_by_loops(*tensors, 1e-5, signed_sqrt), 1e-12)
    one = [*tensors[:3], tensors[3][0], tensors[4][0]]  # [D]: the weights of every branch
    weights = [w[:1].expand(B, D) for w in tensors[3:]]
    got = mk.memory_gate(*one, eps=1e-5, signed_sqrt=signed_sqrt, backend=backend)
    close(got, gate_by_loops(*tensors[:3], *weights, 1e-5, signed_sqrt), 1e-12)


def test_a_score_of_zero_and_tiny_ones(backend):
    """sign(0) = 0: the gate is exactly 1/2. Below 1e-6 the root is constant, and no gradient passes."""
    value = randn(4, dtype=torch.float32)
    hidden = torch.zeros(3, 1, 4)
    hidden[1, 0, 0], hidden[2, 0, 0] = 1.0, -1.0
    key = torch.zeros(3, 1, 4)
    key[:, 0, 1], key[:, 0, 0] = 1.0, 1e-8
    hidden.requires_grad_()
    out = mk.memory_gate(hidden, key, value.expand(3, 4), torch.ones(4), torch.ones(4), eps=1e-12, backend=backend)
    root = torch.sigmoid(torch.tensor([0.0, 1e-3, -1e-3]))
    close(out[:, 0].double().detach(), (root[:, None] * value).double(), 1e-6)
    assert torch.equal(out[0, 0], value / 2)
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    assert torch.equal(gradient, torch.zeros_like(gradient))


GATE = (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.zeros(2, 8), torch.ones(8), torch.ones(3, 8))
GATE_BAD = [
    ((1, torch.zeros(2, 3, 7)), {}, ValueError, "key must be [..., B=3, D=8], got [2, 3, 7]"),
    ((2, torch.zeros(2, 7)), {}, ValueError, "value must be [..., D=8], got [2, 7]"),
    ((3, torch.ones(7)), {}, ValueError, "hidden_weight must be [..., B=3, D=8], got [3, 7]"),
    ((4, torch.ones(2, 3, 8)), {}, ValueError, "key_weight must be [B, D], got [2, 3, 8]"),
    ((1, torch.zeros(2, 3, 8).half()), {}, TypeError, "key must be float32, got float16"),
    ((0, torch.zeros(2, 3, 8)), {"eps": "1"}, TypeError, "eps must be a number, got str"),
    ((0, torch.zeros(2, 3, 8)), {"signed_sqrt": 1}, TypeError, "signed_sqrt must be a bool, got int"),
]


@pytest.mark.parametrize(("change", "options", "error", "sentence"), GATE_BAD)
def test_a_bad_gate_is_one_sentence(backend, change, options, error, sentence):
    tensors = list(GATE)
    tensors[change[0]] = change[1]
    with pytest.raises(error, match=f"^memory_gate: {re.escape(sentence)}$"):
        mk.memory_gate(*tensors, **{"eps": 1e-6, **options}, backend=backend)
