"""A hundred thousand tokens with gates of exactly 0 and 1 for thousands of tokens in a row, against float64.

bfloat16 tokens and a float32 memory. The formulas are written here in a form that takes seconds, because the references
of the library build a graph node per token.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn

import memkernels as mk
from memkernels.testing.compare import distance, norms, table

T, N, K, V, D = 100_000, 3, 2, 3, 2
LOW = torch.bfloat16


def recurrence(keep, add, first):
    """All h_t = keep_t * h_(t-1) + add_t, with h_0 before them. keep, add: [T, C]; first: [C] -> [T + 1, C].

    Blocks of tokens run in parallel, each from zero. Then the state before each block is added, times the product of
    the block's factors. Every factor is at most 1, so the order of the products loses no digits.
    """
    length = max(1, round(len(keep) ** 0.5))
    more = -len(keep) % length
    keep = torch.nn.functional.pad(keep, (0, 0, 0, more), value=1.0).unflatten(0, (-1, length))
    add = torch.nn.functional.pad(add, (0, 0, 0, more)).unflatten(0, (-1, length))
    own, kept = [torch.zeros_like(add[:, 0])], [torch.ones_like(add[:, 0])]
    for k, a in zip(keep.unbind(1), add.unbind(1)):
        own.append(k * own[-1] + a)
        kept.append(k * kept[-1])
    before = [first]
    for o, k in zip(own[-1].unbind(0), kept[-1].unbind(0)):
        before.append(k * before[-1] + o)
    inside = torch.stack(own[1:], 1) + torch.stack(kept[1:], 1) * torch.stack(before[:-1]).unsqueeze(1)
    return torch.cat([first.unsqueeze(0), inside.flatten(0, 1)[: inside.shape[0] * length - more]])


class Cell(torch.autograd.Function):
    """The states [T, 2] of a memory cell, number by number. inputs: [T, 6], weight: [6, 2], first: [2]."""

    @staticmethod
    def forward(ctx, inputs, weight, first):
        (p, q), states, w = first.tolist(), [], weight.tolist()
        for x in inputs.tolist():
            f, g, i, j, c, d = (a + u * p + v * q for a, (u, v) in zip(x, w))
            p = sigmoid(f) * p + sigmoid(i) * math.tanh(c)
            q = sigmoid(g) * q + sigmoid(j) * math.tanh(d)
            states.append((p, q))
        states = torch.tensor(states, dtype=inputs.dtype)
        ctx.save_for_backward(inputs, weight, torch.cat([first.unsqueeze(0), states[:-1]]))
        return states

    @staticmethod
    def backward(ctx, d_states):
        inputs, weight, before = ctx.saved_tensors
        f, i, c = (inputs + before @ weight.mT).chunk(3, -1)
        f, i, c = torch.sigmoid(f), torch.sigmoid(i), torch.tanh(c)
        slopes = torch.cat([before * f * (1 - f), c * i * (1 - i), i * (1 - c * c)], -1)  # of h_t in z_t
        (p, q), d_inputs, w = (0.0, 0.0), [], weight.mT.tolist()
        for (x, y), slope, kept in reversed(list(zip(d_states.tolist(), slopes.tolist(), f.tolist()))):
            p, q = p + x, q + y
            z = [s * d for s, d in zip(slope, (p, q, p, q, p, q))]
            d_inputs.append(z)
            p, q = (k * d + sum(a * b for a, b in zip(column, z)) for k, d, column in zip(kept, (p, q), w))
        d_inputs = torch.tensor(d_inputs[::-1], dtype=inputs.dtype)
        return d_inputs, d_inputs.mT @ before, torch.tensor((p, q), dtype=inputs.dtype)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else 1 - 1 / (1 + math.exp(x))


def written(values, a, write, erase):
    """The memory [T + 1, N, V] before and after every token: v <- v (1 - a e) + a w."""
    keep = 1 - a.unsqueeze(-1) * (erase.unsqueeze(1) if isinstance(erase, torch.Tensor) else erase)
    add = a.unsqueeze(-1) * write.unsqueeze(1)
    states = recurrence(keep.expand(T, N, V).flatten(1), add.flatten(1), values.flatten())
    return states.unflatten(-1, (N, V))


def phases(*levels: float) -> torch.Tensor:
    """[T]: each level in turn, for thousands of tokens, a number that no block size divides."""
    lengths = (9001, 17, 5003, 12_007, 3, 6007, 1)
    turns = [torch.full((lengths[i % len(lengths)],), levels[i % len(levels)]) for i in range(60)]
    return torch.cat(turns)[:T]


# Scores reach 200 on the first slot and -200 on the last: gates of exactly 1 and 0. Between them, slots differ.
KEYS = torch.tensor([[1.0, 0.5], [0.0, -1.0], [-1.0, 0.25]]).to(LOW)


def queries(seed: int) -> torch.Tensor:
    q = randn(T, K, seed=seed)
    q[:, 0] = phases(200.0, 0.0, -200.0, 0.5)
    return q.to(LOW)


VALUES, WRITE = randn(N, V).float(), randn(T, V, seed=3).float()
ERASE = torch.sigmoid(randn(T, V, seed=4)).float()
ERASE[::7], ERASE[1::7] = 1.0, 0.0
WEIGHTS = torch.sigmoid(randn(T, N, seed=5))
WEIGHTS[phases(0.0, 1.0, 2.0) == 0] = 0.0
WEIGHTS[phases(0.0, 1.0, 2.0) == 1] = 1.0
FORGET = torch.sigmoid(randn(T, V, seed=6))
FORGET[phases(0.0, 1.0, 2.0, 0.0, 3.0) == 0] = 0.0
FORGET[phases(0.0, 1.0, 2.0, 3.0, 3.0) == 1] = 1.0
# The cell keeps (f = 1, i = 0), replaces (f = 0, i = 1), clears (f = 0, i = 0), or follows its weight.
INPUTS = randn(T, 3, D, seed=7)
INPUTS[:, 0] += phases(200.0, -200.0, -200.0, 0.0, 0.0).unsqueeze(-1)
INPUTS[:, 1] += phases(-200.0, 200.0, -200.0, 0.0, 0.0).unsqueeze(-1)
SELF = 0.3 * randn(3 * D, D, seed=8)


def write_by_scores(op, gate):
    """A write whose gates come from scores of scale 1, and its float64 form."""

    def run(values, keys, query, write, *erase, number=1.0):
        e = erase[0] if erase else number
        return op(values, keys, query, write, erase=e, scale=1.0, return_retained=True, backend="cpu")

    def formula(values, keys, query, write, *erase, number=1.0):
        a = gate(query @ keys.mT)
        return written(values, a, write, erase[0] if erase else number)[-1], (1 - a).prod(0)

    return run, formula


def softmax(s):
    return torch.softmax(s, -1)


GATED, SOFT = write_by_scores(mk.gated_write, torch.sigmoid), write_by_scores(mk.softmax_write, softmax)
GIVEN = (
    lambda v, a, w, *e, number=1.0: [mk.slot_write(v, a, w, erase=e[0] if e else number, backend="cpu")],
    lambda v, a, w, *e, number=1.0: [written(v, a, w, e[0] if e else number)[-1]],
)


def scanned(values, keys, reader, writer, write, read_first=False):
    states = written(values, torch.sigmoid(writer @ keys.mT), write, 1.0)
    weights = torch.softmax(reader @ keys.mT, -1)
    seen = states[:-1] if read_first else states[1:]
    return torch.einsum("tn,tnv->tv", weights, seen), states[-1]


def scan(*tensors, read_first=False):
    return mk.memory_scan(*tensors, scale=1.0, read_first=read_first, backend="cpu")


SCORED = (VALUES, KEYS, queries(1), WRITE)
MEMORY = (VALUES, KEYS, randn(T, K, seed=2).to(LOW), queries(1), WRITE)
# name -> (function, its float64 form, tensors, options)
CASES = {
    "gated_write": (*GATED, SCORED, {}),
    "gated_write, erase 0.5": (*GATED, SCORED, {"number": 0.5}),
    "gated_write, erase tensor": (*GATED, (*SCORED, ERASE), {}),
    "softmax_write": (*SOFT, SCORED, {}),
    "softmax_write, erase tensor": (*SOFT, (*SCORED, ERASE), {}),
    "slot_write": (*GIVEN, (VALUES, WEIGHTS.to(LOW), WRITE), {}),
    "slot_write, erase tensor": (*GIVEN, (VALUES, WEIGHTS.to(LOW), WRITE, ERASE), {}),
    "memory_scan": (scan, scanned, MEMORY, {}),
    "memory_scan, read first": (scan, scanned, MEMORY, {"read_first": True}),
    "gated_scan": (
        lambda *x: [mk.gated_scan(*x, backend="cpu")],
        lambda *x: [recurrence(*x)[1:]],
        (FORGET.to(LOW), WRITE, VALUES[0]),
        {},
    ),
    "cell_scan": (
        lambda *x: [mk.cell_scan(*x, backend="cpu")],
        lambda *x: [Cell.apply(*x)],
        (INPUTS.flatten(1).to(LOW), SELF.to(LOW), VALUES[0, :D].to(LOW)),
        {},
    ),
}


def run(function, tensors, options):
    """Results and gradients, for the same cotangents in every precision."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = function(*leaves, **options)
    cotangents = [randn(*r.shape, seed=9).to(LOW).to(r.dtype) for r in results]
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, cotangents)


@pytest.mark.parametrize("name", CASES)
def test_gates_at_0_and_1_for_thousands_of_tokens(name):
    """Results and gradients are finite, and within the table of tolerances."""
    function, formula, tensors, options = CASES[name]
    exact = run(formula, [x.double() for x in tensors], options)
    for got, wanted, backward in zip(run(function, tensors, options), exact, (False, True)):
        for g, w, norm in zip(got, wanted, norms(wanted)):
            assert torch.isfinite(g).all() and torch.isfinite(w).all()
            assert distance(g, w, norm) <= table(LOW, LOW if backward else g.dtype)


def test_the_gates_do_stand_at_their_ends():
    """In float32, in which kernels compute gates: exactly 0 and exactly 1, for thousands of tokens in a row."""
    scores = queries(1).float() @ KEYS.float().mT
    gates, shares = torch.sigmoid(scores), torch.softmax(scores, -1)
    cell = torch.sigmoid(INPUTS.float()).flatten(1)
    for some in (gates, shares, WEIGHTS, FORGET, cell):
        for end in (0.0, 1.0):
            changes = torch.nn.functional.pad((some == end).any(-1), (1, 1)).int().diff()
            runs = (changes == -1).nonzero() - (changes == 1).nonzero()
            assert runs.max() > 3000


def test_the_formulas_are_loops_over_the_tokens():
    """And their derivatives are right."""
    keep, add, first = torch.sigmoid(randn(23, V, seed=1)), randn(23, V, seed=2), randn(V)
    h, wanted = first, [first]
    for k, a in zip(keep, add):
        h = k * h + a
        wanted.append(h)
    close(recurrence(keep, add, first), torch.stack(wanted), 1e-14)
    x, w, h = randn(5, 3 * D, seed=1), randn(3 * D, D, seed=2), randn(D)
    states = Cell.apply(x, w, h)
    for t in range(5):
        f, i, c = (x[t] + w @ h).chunk(3)
        h = torch.sigmoid(f) * h + torch.sigmoid(i) * torch.tanh(c)
        close(states[t], h, 1e-14)
    assert torch.autograd.gradcheck(Cell.apply, [y.requires_grad_() for y in (x, w, h)])
