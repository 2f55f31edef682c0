"""MemoryRNN against its equations written as plain loops in float64; state, and tasks that need a memory."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn
from torch import nn
from torch.nn import functional as F

from memkernels.models import MemoryRNN, RNNState

BACKENDS = ("reference", "cpu")
ADDRESSINGS = ("location", "content")
B, T, D, N, W = 2, 4, 3, 5, 4


def rnn_of(backend: str, addressing: str) -> MemoryRNN:
    torch.manual_seed(0)
    return MemoryRNN(D, W, N, addressing=addressing, backend=backend).double()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gru(cell: nn.GRUCell, x: list[float], h: list[float]) -> list[float]:
    """Cho et al. 2014, with the biases of torch: reset, update and new, in this order."""

    def row(weight, bias, i, v):
        return sum(float(a) * b for a, b in zip(weight[i], v)) + float(bias[i])

    result = []
    for i in range(W):
        of_x = [row(cell.weight_ih, cell.bias_ih, part * W + i, x) for part in range(3)]
        of_h = [row(cell.weight_hh, cell.bias_hh, part * W + i, h) for part in range(3)]
        reset, update = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
        result.append((1 - update) * math.tanh(of_x[2] + reset * of_h[2]) + update * h[i])
    return result


def weights(address: nn.Linear, h: list[float], memory: list[list[float]], addressing: str) -> list[float]:
    bias = [0.0] * address.out_features if address.bias is None else address.bias.tolist()
    scores = [sum(a * b for a, b in zip(row, h)) + c for row, c in zip(address.weight.tolist(), bias)]
    if addressing == "content":
        scores = [sum(a * b for a, b in zip(scores, slot)) for slot in memory]
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_it_is_its_equations(backend, addressing):
    model, x = rnn_of(backend, addressing), randn(B, T, D)
    got, state = model(x)
    for b in range(B):
        h, memory = [0.0] * W, model.memory.tolist()
        for t in range(T):
            h = gru(model.cell, x[b, t].tolist(), h)
            read = weights(model.read_address, h, memory, addressing)
            write = weights(model.write_address, h, memory, addressing)
            r = [sum(a * slot[j] for a, slot in zip(read, memory)) for j in range(W)]
            close(got[b, t], torch.tensor([a + c for a, c in zip(h, r)], dtype=torch.float64))
            memory = [[m + a * (c - m) for m, c in zip(slot, h)] for a, slot in zip(write, memory)]
        close(state.hidden[b], torch.tensor(h, dtype=torch.float64))
        close(state.memory[b], torch.tensor(memory, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_token_by_token_equals_the_whole(backend, addressing):
    """The state is passed from call to call: outputs, last state and all gradients equal those of one call."""
    model, x = rnn_of(backend, addressing), randn(B, 9, D).requires_grad_()
    leaves = [x, *model.parameters()]
    whole, end = model(x)
    state, steps = model.initial_state(B), []
    for t in range(x.shape[1]):
        y, state = model(x[:, t : t + 1], state)
        steps.append(y)
    stepped = torch.cat(steps, 1)
    d = [randn(*z.shape, seed=4) for z in (whole, *end)]
    gradients = [torch.autograd.grad((z, *s), leaves, d) for z, s in ((whole, end), (stepped, state))]
    for got, want in zip((stepped, *state, *gradients[1]), (whole, *end, *gradients[0])):
        close(got.detach(), want.detach(), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_pieces_of_a_sequence_equal_the_whole(addressing):
    model, x = rnn_of("cpu", addressing), randn(B, T, D)
    whole, end = model(x)
    first, state = model(x[:, :1])
    before = [s.clone() for s in state]
    second, after = model(x[:, 1:], state)
    close(torch.cat([first, second], 1), whole)
    close(after.memory, end.memory)
    assert all(torch.equal(s, b) for s, b in zip(state, before)), "the given state must not change"
    empty, same = model(x[:, :0], state)
    assert empty.shape == (B, 0, W) and torch.equal(same.memory, state.memory)


@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_gradients(addressing):
    model, x = rnn_of("cpu", addressing), randn(B, 2, D).requires_grad_()
    state = RNNState(randn(B, W).requires_grad_(), randn(B, N, W).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, *s: model(x, RNNState(*s))[0], (x, *state))
    model(x)[0].sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_detached_state_cuts_the_graph():
    model, x = rnn_of("cpu", "content"), randn(B, T, D).requires_grad_()
    model(randn(B, 1, D), model(x)[1].detach())[0].sum().backward()
    assert x.grad is None


# --- tasks ---

SYMBOLS = 5


def recall(generator: torch.Generator, streams: int):
    """Two facts "key is value", each a sequence of its own; then one of the keys, whose value is wanted."""
    key = torch.rand(streams, SYMBOLS, generator=generator).argsort(1)[:, :2]
    value = torch.randint(SYMBOLS, (streams, 2), generator=generator)
    asked = torch.randint(2, (streams, 1), generator=generator)
    facts = torch.cat([F.one_hot(key, SYMBOLS), F.one_hot(value, SYMBOLS)], -1).float()
    question = F.pad(F.one_hot(key.gather(1, asked), SYMBOLS).float(), (0, SYMBOLS))
    return [*facts.split(1, dim=1), question], value.gather(1, asked)


def copy(generator: torch.Generator, streams: int):
    """Three symbols; then three blanks, at which they are wanted in order."""
    symbols = torch.randint(SYMBOLS, (streams, 3), generator=generator)
    return [F.one_hot(symbols, 2 * SYMBOLS).float(), torch.zeros(streams, 3, 2 * SYMBOLS)], symbols


def hidden_only(state: RNNState, model: MemoryRNN) -> RNNState:
    return state._replace(memory=model.initial_state(len(state.hidden)).memory)


def memory_only(state: RNNState, model: MemoryRNN) -> RNNState:
    return state._replace(hidden=torch.zeros_like(state.hidden))


def both(state: RNNState, model: MemoryRNN) -> RNNState:
    return state


@pytest.mark.parametrize(
    ("task", "carried", "addressing", "rate", "steps"),
    (
        (recall, memory_only, "content", 1e-2, 200),
        (recall, memory_only, "location", 3e-2, 600),
        (copy, both, "content", 2e-2, 300),
        (copy, both, "location", 2e-2, 300),
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_learns_to_remember(task, carried, addressing, rate, steps):
    """``carried`` selects the part of the state that is passed on. Without the memory the answers get worse."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, output = MemoryRNN(2 * SYMBOLS, 32, 6, addressing=addressing), nn.Linear(32, SYMBOLS)
    optimizer = torch.optim.Adam([*model.parameters(), *output.parameters()], lr=rate)

    def answer(sequences, carried):
        state = model.initial_state(len(sequences[0]))
        for x in sequences:
            y, state = model(x, carried(state, model))
        return output(y)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        sequences, wanted = task(generator, 32)
        loss = F.cross_entropy(answer(sequences, carried).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    sequences, wanted = task(generator, 512)
    with torch.no_grad():
        accuracy, without = ((answer(sequences, c).argmax(-1) == wanted).float().mean() for c in (carried, hidden_only))
    assert accuracy >= 0.95
    assert without < accuracy - 0.05


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match="MemoryRNN: mem_size must be at least 1, got 0"):
        MemoryRNN(D, W, 0)
    with pytest.raises(ValueError, match="addressing must be one of location, content, got 'key'"):
        MemoryRNN(D, W, N, addressing="key")
    with pytest.raises(ValueError, match=r"x must be \[B, T, input_size\], got \[2, 3\]"):
        MemoryRNN(D, W, N)(torch.zeros(B, D))
