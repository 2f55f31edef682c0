"""The Triton kernels of the lookup memory, in Triton's interpreter, against their equations written out here.

Slots are counted in Python's own integers, rows are multiplied out number by number, the gate and its gradients are
autograd over the formula in float64.
"""

from __future__ import annotations

import pytest
from support import run_python

pytest.importorskip("triton")

COMMON = """
import importlib, itertools, math, random, sys, warnings
import torch
import memkernels as mk
from memkernels import _triton

warnings.simplefilter("ignore")
package = _triton.kernels()
draw = random.Random(0)
random_of = torch.Generator().manual_seed(0)
failures = []

def expect(what, holds):
    if not holds:
        failures.append(what)

def raises(what, sentence, call):
    try:
        call()
    except RuntimeError as error:
        expect(f"{what}: {error}", sentence in str(error))
    else:
        failures.append(f"{what} is accepted")
"""

SLOTS = """
FAR = 2**63

def wrapped(x):
    return (x + FAR) % 2**64 - FAR

def slots_of(tokens, before, first, sizes, factors, table, ignore, orders, heads, pad):
    '''One stream in Python's integers; before: its history, the last token last.'''
    past = len(before)
    ids = [*before, *tokens]
    gone = [i < 0 or i in ignore for i in ids]
    x = [pad if g else table[i] if table else i for i, g in zip(ids, gone)]
    rows = []
    for t in range(len(tokens)):
        row, offset, m = [], 0, 0
        for n in orders:
            mix = 0
            for j in range(n):
                at = past + t - j
                known = at >= 0 and (first is None or t - j >= first[t])
                mix ^= wrapped((x[at] if known else pad) * factors[j])
            for _ in range(heads):
                row.append(-1 if gone[past + t] else offset + mix % sizes[m])  # Python's %: never negative
                offset, m = offset + sizes[m], m + 1
        rows.append(row)
    return rows

def check(what, streams, T, orders, heads, n_max, sizes, *, words=50, mapped=False, history=False, packed=False,
          ignored=0, pad=0, wide=False):
    ids = [[draw.randrange(-2, FAR if wide else words) for _ in range(T)] for _ in range(streams)]
    if wide and T:
        ids[0][0] = FAR - 1
    factors = [wrapped(draw.getrandbits(64) | 1) for _ in range(n_max)]
    factors[-1] = -FAR
    table = [draw.randrange(-FAR, FAR) for _ in range(words)] if mapped else None
    before = [[draw.randrange(-2, words) for _ in range(n_max - 1)] for _ in range(streams)]
    first = [draw.randrange(-2, max(T, 1)) for _ in range(T)] if packed else None
    ignore = draw.sample(range(words), ignored)
    def tensor(x, *shape):
        return torch.tensor(x, dtype=torch.int64).view(shape)
    got = mk.ngram_slots(
        tensor(ids, streams, T), tensor(sizes, len(sizes)), tensor(factors, n_max), orders=orders, heads=heads, pad=pad,
        token_map=tensor(table, words) if mapped else None, ignore=ignore if ignored else None,
        history=tensor(before, streams, n_max - 1) if history else None, first=tensor(first, T) if packed else None,
        backend="triton",
    )
    wanted = [slots_of(x, b if history else [], first, sizes, factors, table, set(ignore), orders, heads, pad)
              for x, b in zip(ids, before)]
    expect(what, got.tolist() == wanted)

EDGE = [1, 2, 3, 2**31 - 1, 2**31, 2**32 + 15, 2**61, 2**62 - 57, 10**9 + 7, 64]
check("sizes at the edges", 2, 70, [2], len(EDGE), 2, EDGE, wide=True)
check("one size of almost 2^63", 1, 40, [3], 1, 3, [FAR - 25], wide=True)
check("short streams in one block", 61, 3, [1, 3], 3, 4, [7, 11, 13, 17, 19, 23], history=True, packed=True)
check("single tokens", 130, 1, [2, 3], 2, 3, [101, 103, 107, 109], history=True, mapped=True, pad=-9)
check("streams that end within blocks", 3, 67, [2, 4], 5, 4, [31 + 2 * i for i in range(10)], mapped=True, ignored=9)
check("an order twice, pad beyond 32 bits", 2, 20, [3, 1, 3], 2, 3, [5, 7, 11, 13, 17, 19], pad=2**40 + 1, packed=True)
check("no tokens", 3, 0, [2], 2, 2, [5, 7])
check("all at once", 2, 130, [2, 3, 5], 4, 5, [211 + 2 * i for i in range(12)], mapped=True, history=True, packed=True,
      ignored=4, pad=-(2**63))

# In pieces as at once, and one launch plan per kind of call.
launch = package.launcher("ngram_slots")
ids = torch.randint(0, 50, (2, 30), generator=random_of)
factors, sizes, table = torch.tensor([3, 5, 7]), torch.tensor([11, 13, 17, 19]), torch.randint(0, 9, (50,))
def run(ids, orders=(2, 3), heads=2, pad=0, history=None):
    return launch(ids, sizes, factors, table, history, None, None, list(orders), heads, pad)
whole = run(ids, history=torch.full((2, 2), -1))
parts = [run(ids[:, :2], history=torch.full((2, 2), -1)), run(ids[:, 2:], history=ids[:, :2])]
expect("pieces", torch.equal(torch.cat(parts, 1), whole) and torch.equal(run(ids), whole))
kinds, ways = len(launch.replays), [((3, 2), 2, 0), ((2, 3), 2, 1), ((2,), 4, 0), ((1, 2), 2, 0)]
for orders, heads, pad in ways:
    wanted = mk.ngram_slots(ids, sizes, factors, orders=orders, heads=heads, pad=pad, token_map=table,
                            backend="reference")
    expect(f"orders {orders}, {heads} heads, pad {pad}", torch.equal(run(ids, orders, heads, pad), wanted))
expect("kinds of calls", len(launch.replays) == kinds + len(ways))
again = torch.randint(0, 50, (2, 30), generator=random_of)
expect("another call of a kind", not torch.equal(run(again), whole) and len(launch.replays) == kinds + len(ways))

# What is no place in the map, and no size, fails and is not followed; an ignored token needs no place.
def call(ids, sizes=sizes, ignore=None, history=None):
    return mk.ngram_slots(ids, sizes, factors, orders=[2], heads=4, token_map=table, ignore=ignore, history=history,
                          backend="triton")
bad = ids.clone()
bad[1, 17] = 50
wild = bad.masked_fill(bad == 50, 2**62)
raises("a token beyond the map", "ngram_slots: tokens must be below 50, the length of token_map", lambda: call(bad))
raises("a wild token", "tokens must be below 50", lambda: call(wild))
raises("a token of the history", "tokens must be below 50", lambda: call(ids, history=torch.tensor([[0, 1], [50, 1]])))
expect("an ignored token beyond the map", bool((call(bad, ignore=[50])[1, 17] == -1).all()))
raises("a size of 0", "sizes must be at least 1", lambda: call(ids, torch.tensor([5, 7, 0, 3])))
raises("a negative size", "sizes must be at least 1", lambda: call(ids, torch.tensor([5, 7, 3, -1])))
raises("a sum of 2^63", "below 2^63", lambda: call(ids, torch.tensor([2**62, 7, 2**62, 3])))
"""

ROWS = """
def number(bits):
    '''A float8_e4m3fn.'''
    sign, e, m = -1.0 if bits & 128 else 1.0, bits >> 3 & 15, bits & 7
    return math.nan if bits & 127 == 127 else sign * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))

NUMBERS = {torch.int8: {i: float(i) for i in range(-128, 128)}, torch.float8_e4m3fn: {i: number(i) for i in range(256)}}

def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])

def equal(got, wanted):
    '''The same bits; any NaN for NaN.'''
    return got.dtype == wanted.dtype and got.shape == wanted.shape and bool(
        ((bits(got) == bits(wanted)) | (got.isnan() & wanted.isnan())).all())

def check(what, kind, V, block, dtype, powers=False, N=9, shape=(2, 21)):
    places = torch.randint(0, 256, (N, V), generator=random_of, dtype=torch.uint8)
    places[0, :4] = torch.tensor([0, 1, 127, 255], dtype=torch.uint8)[:V]
    table = places.view(kind)
    numbers = torch.tensor([NUMBERS[kind][i] for i in places.view(torch.int8 if kind == torch.int8 else torch.uint8)
                            .flatten().tolist()], dtype=torch.float64).view(N, V)
    width = V if block is None else block
    C = -(-V // width)
    if powers:
        e = torch.randint(100, 140, (N, C), generator=random_of)
        e[0, 0], e[-1, -1], e[N // 2, 0] = 0, 255, 254
        scale = e.to(torch.uint8).view(torch.float8_e8m0fnu)
        exact = torch.where(e == 255, math.nan, 2.0 ** (e - 127).double())
    else:
        scale = torch.randn(N, C, generator=random_of)
        scale[1] = 1e-40  # not flushed
        exact = scale.double()
    # The product of 8 and 24 bits is exact in float64: one rounding to float32, one to the result.
    by_column = exact[:, [c // width for c in range(V)]]
    wanted = (numbers * by_column).float().to(dtype)
    i = torch.randint(-1, N, shape, generator=random_of)
    i[..., 0] = torch.tensor([0, N - 1, N // 2, 1] * shape[0])[: shape[0]]
    wanted = torch.where((i < 0)[..., None], 0.0, wanted[i.clamp(min=0)])
    scale = scale if block is not None else scale[:, 0]
    got = mk.gather_rows(table, i, value_scale=scale, block=block, dtype=dtype, backend="triton")
    expect(what, equal(got, wanted.to(dtype)))

for kind, powers in itertools.product(NUMBERS, (False, True)):
    # The interpreter's blocks have 32 columns: rows of several, and a last one that is cut.
    for V, block in ((70, None), (70, 8), (96, 32), (70, 64), (41, 7), (5, 1), (33, 40), (1, None)):
        for dtype in (torch.float32, torch.float16):
            check(f"{kind} {V} columns, block {block}, {dtype}, {powers}", kind, V, block, dtype, powers, shape=(4, 7))
check("many entries", torch.int8, 37, 16, torch.float32, shape=(3, 3, 17))

def floats(given, dtype, V, shape, layout=lambda x: x):
    table = torch.randn(11, V, generator=random_of).to(given)
    table[3, 0], table[4, -1], table[5, 0] = math.inf, 65519.0, -0.0
    i = torch.randint(-1, 11, shape, generator=random_of)
    table, i = layout(table), layout(i)
    wanted = torch.where((i < 0)[..., None], 0.0, table.to(dtype)[i.clamp(min=0)]).to(dtype)
    expect(f"{given} to {dtype}, {V}", equal(mk.gather_rows(table, i, dtype=dtype, backend="triton"), wanted))
    # The gradient of a row adds in the order of the entries, in float64 here.
    d = torch.randn(wanted.shape, generator=random_of).to(dtype)
    leaf = table.clone(memory_format=torch.preserve_format).requires_grad_()
    (got,) = torch.autograd.grad(mk.gather_rows(leaf, i, dtype=dtype, backend="triton"), leaf, d)
    total = torch.zeros(11, V, dtype=torch.float64)
    for e, row in zip(i.flatten().tolist(), d.reshape(-1, V)):
        if e >= 0:
            total[e] += row.double()
    error, most = (got.double() - total).abs().max(), total.abs().max()
    expect(f"gradient of {given} to {dtype}, {V}: {error}", got.dtype == given and
           error <= most * (1e-6 if given == torch.float32 else 5e-4))

half = torch.float16
for V, shape in ((1, (5,)), (37, (3, 19)), (70, (2, 2, 33)), (64, (0, 4))):
    for given, dtype in ((torch.float32, torch.float32), (half, half), (torch.float32, half), (half, torch.float32)):
        floats(given, dtype, V, shape)
floats(torch.float32, torch.float32, 40, (4, 70), lambda x: x.T.contiguous().T)
floats(torch.float32, torch.float32, 40, (4, 70), lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2])
floats(torch.float32, torch.float32, 40, (4, 70), lambda x: x[1:2].expand(x.shape) if x.shape[0] == 4 else x)

launch = package.launcher("gather_rows")
table, i = torch.randint(-9, 9, (9, 40), dtype=torch.int8), torch.randint(-1, 9, (6,))
scale = torch.rand(9, 2)
for block, dtype in ((20, half), (20, torch.float32), (32, half), (39, half)):
    got = launch(table, i, scale, block, dtype)
    wanted = mk.gather_rows(table, i, value_scale=scale, block=block, dtype=dtype, backend="reference")
    expect(f"block {block}, {dtype}", equal(got, wanted))
expect("kinds of calls", len(launch.replays) == 4)
for wrong in (9, -2, 2**40, -(2**62)):
    i[3] = wrong
    raises(f"index {wrong}", "gather_rows: an index is outside [-1, 9)", lambda: launch(table, i, scale, 20, half))
    leaf = torch.randn(9, 4, requires_grad=True)
    back, given = torch.ops.memkernels_triton.gather_rows_backward, (torch.ones(6, 4), 4, torch.float32, [True])
    raises(f"index {wrong}, backward", "gather_rows_backward: an index is outside [-1, 9)",
           lambda: back(leaf, i, None, *given))

# A table of more than 2^31 numbers, of whose pages few are ever touched.
V = 2**16
table, scale = torch.zeros(2**15 + 9, V, dtype=torch.int8), torch.full((2**15 + 9, 1), 0.5)
table[2**15 + 8, -1], table[2**15 - 1, 0] = 7, -3
got = launch(table[:, -40:], torch.tensor([2**15 + 8]), scale, 40, torch.float32)
expect("the last row", got[0].tolist() == [0.0] * 39 + [3.5])
got = launch(table[:, :40], torch.tensor([2**15 - 1, 2**15 + 8]), scale, 40, torch.float32)
expect("the last rows", got[:, 0].tolist() == [-1.5, 0.0])
"""

GATE = """
def gate(h, k, v, wh, wk, eps, signed):
    '''The equation in float64, with a gradient that the kernels do not share.'''
    def normed(x):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps) ** -0.5
    g = (normed(h) * wh * normed(k) * wk).sum(-1) / h.shape[-1] ** 0.5
    if signed:
        g = g.sign() * g.abs().clamp(min=1e-6) ** 0.5
    return torch.sigmoid(g)[..., None] * v[..., None, :]

def check(what, lead, B, D, signed=True, eps=1e-6, dtype=torch.float32, weights=None, leads=(), change=None, most=2e-5):
    shapes = [(*lead, B, D), (*lead, B, D), (*lead, D), (B, D), (B, D)]
    for place, other in leads:
        shapes[place] = (*other, *shapes[place][len(lead):])
    tensors = [torch.randn(s, generator=random_of) for s in shapes]
    if not leads:  # a key close to the hidden state or its opposite
        tensors[1] = tensors[1] / 4 + tensors[0] * torch.tensor([1.0, -1.0]).repeat(B)[:B, None]
    if change:
        change(tensors)
    kinds = [dtype] * 3 + [weights or dtype] * 2
    tensors = [x.to(kind) for x, kind in zip(tensors, kinds)]
    d = torch.randn((*lead, B, D), generator=random_of).to(dtype)
    def run(function, kind):
        leaves = [x.detach().to(kind or x.dtype, copy=True).requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, d.to(out.dtype))]
    got = run(lambda *x: mk.memory_gate(*x, eps=eps, signed_sqrt=signed, backend="triton"), None)
    wanted = run(lambda *x: gate(*x, eps, signed), torch.float64)
    for place, (a, b) in enumerate(zip(got, wanted)):
        size = max(float(b.abs().max()) if b.numel() else 0.0, 0.05)
        error = float((a.double() - b).abs().max()) / size if b.numel() else 0.0
        expect(f"{what}, {place}: {error:.1e}", a.shape == b.shape and error <= most)
    if "parts" in what:
        again = run(lambda *x: mk.memory_gate(*x, eps=eps, signed_sqrt=signed, backend="triton"), None)
        expect(f"{what}: other bits", all(torch.equal(a, b) for a, b in zip(got, again)))

for signed in (True, False):
    check("one number", (), 1, 1, signed)
    check("many parts", (3, 11), 2, 37, signed)
    check("many columns", (2,), 5, 100, signed)
    check("one long row", (1,), 1, 700, signed)
check("many rows of several blocks", (20,), 3, 70)
check("large eps", (9,), 2, 20, eps=0.5)
check("float16", (2, 9), 3, 50, dtype=torch.float16, most=4e-3)
check("float16, float32 weights", (2, 9), 3, 50, dtype=torch.float16, weights=torch.float32, most=4e-3)
check("three leading dimensions", (2, 3, 4), 2, 20)
check("all of them broadcast", (3, 4), 2, 20, leads=[(0, (1, 4)), (1, ()), (2, (3, 1))])
check("no tokens", (0, 3), 2, 20)
check("no branches", (3,), 0, 20)
def orthogonal(tensors):  # a score of exactly 0, and a tiny one: the root is constant there, the gate has no gradient
    tensors[0][:] = torch.tensor([1.0, 1.0, 0.0, 0.0] * 5)
    tensors[1][:] = torch.tensor([0.0, 0.0, 1.0, -1.0] * 5)
    tensors[0][1, 0, 0], tensors[1][1, 0, 0] = 1.0, 1e-7
    tensors[3][:], tensors[4][:] = 1.0, 1.0
check("scores of almost 0", (3,), 2, 20, change=orthogonal)

# Less than all gradients are the same numbers, and what is not wanted is empty.
tensors = [torch.randn(s, generator=random_of) for s in ((9, 2, 40), (9, 2, 40), (9, 40), (2, 40), (2, 40), (9, 2, 40))]
*five, d = tensors
ops = torch.ops.memkernels_triton
_, *stats = ops.memory_gate(*five, 1e-6, True)
every = ops.memory_gate_backward(*five, *stats, d, 1e-6, True, [True] * 5)
for wants in ((False,) * 4 + (True,), *((*x, False) for x in itertools.product((True, False), repeat=4))):
    some = ops.memory_gate_backward(*five, *stats, d, 1e-6, True, list(wants))
    expect(f"wants {wants}", all(torch.equal(a, b) if w else a.numel() == 0 for a, b, w in zip(some, every, wants)))
raises("weights of another shape", "hidden_weight must have 2 dimensions",
       lambda: ops.memory_gate(*five[:3], d, d, 1e-6, True))
raises("another dtype", "key and value must have the dtype of hidden",
       lambda: ops.memory_gate(five[0], five[1].half(), *five[2:], 1e-6, True))
"""


@pytest.mark.parametrize("law", ["SLOTS", "ROWS", "GATE"])
def test_a_kernel_computes_its_equation(law):
    code = COMMON + globals()[law] + "print('RESULT', *failures, sep=chr(10))"
    done = run_python(code, timeout=1800, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout.split("RESULT", 1)[1].strip(), done.stdout
