"""MemoryCell, StreamingMemory and SimilarityLM against their equations written as plain loops in float64; learning."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn
from torch import nn
from torch.nn import functional as F

from memkernels import _text
from memkernels.models import SimilarityLM
from memkernels.nn import MemoryCell, MemoryState, NeuralCache, StreamingMemory

BACKENDS = ("reference", "auto")
B, T, D, W, N, H = 2, 6, 4, 3, 5, 2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- the memory cell ---


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_is_its_equation(backend):
    torch.manual_seed(0)
    cell, x, initial = MemoryCell(D, W, backend=backend).double(), randn(B, T, D), randn(B, W)
    got, last = cell(x, initial)
    weight = torch.cat([cell.weight, cell.input_projection.weight], 1)  # of [h, x]
    for b in range(B):
        h = initial[b]
        for t in range(T):
            z = (weight @ torch.cat([h, x[b, t]]) + cell.input_projection.bias).tolist()
            h = torch.tensor(
                [sigmoid(z[j]) * float(h[j]) + sigmoid(z[W + j]) * math.tanh(z[2 * W + j]) for j in range(W)],
                dtype=torch.float64,
            )
            close(got[b, t], h)
        close(last[b], h)


@torch.no_grad()
def test_pieces_through_the_cell_equal_the_whole():
    cell, x = MemoryCell(D, W).double(), randn(B, T, D)
    whole, last = cell(x)
    first, state = cell(x[:, :2])
    second, end = cell(x[:, 2:], state)
    close(torch.cat([first, second], 1), whole)
    close(end, last)
    assert torch.equal(cell(x[:, :0], state)[1], state)


def test_cell_learns_to_hold_one_bit():
    """The first number of a sequence of noise says which class it is."""
    torch.manual_seed(0)
    cell, output = MemoryCell(1, 8), nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*cell.parameters(), *output.parameters()], lr=3e-2)

    def batch(count):
        x = torch.randn(count, 25, 1) / 2
        first = torch.randint(2, (count,))
        x[:, 0, 0] = 4.0 * first - 2.0
        return x, first

    for _ in range(100):
        x, wanted = batch(32)
        loss = F.cross_entropy(output(cell(x)[1]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, wanted = batch(512)
    assert (output(cell(x)[1]).argmax(-1) == wanted).float().mean() >= 0.95


# --- the streaming layer ---


def streaming(backend="auto", **options) -> StreamingMemory:
    torch.manual_seed(0)
    return StreamingMemory(D, N, heads=H, backend=backend, **options).double()


def slots(*lead: int) -> MemoryState:
    return MemoryState(randn(*lead, H, N, D // H))


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read_first", (False, True))
def test_layer_is_its_equation(backend, read_first):
    layer, x, state = streaming(backend, read_first=read_first), randn(B, T, D), slots(B)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    got, after = layer(x, state, token_mask=mask)
    width = D // H
    of_query, of_write_query, of_write = layer.project_in.weight.split(D)
    for b in range(B):
        values = state.values[b].clone()
        for t in range(T):
            if not mask[b, t]:
                close(got[b, t], torch.zeros(D, dtype=torch.float64))
                continue
            reads = []
            for h in range(H):
                rows = slice(h * width, (h + 1) * width)
                q, p, w = (weight[rows] @ x[b, t] for weight in (of_query, of_write_query, of_write))
                score = [
                    [float(v @ layer.keys[h, i]) * width**-0.5 + float(layer.slot_bias[h, i]) for i in range(N)]
                    for v in (q, p)
                ]
                before = values[h].clone()
                for i in range(N):
                    gate = sigmoid(score[1][i])
                    values[h, i] = (1 - gate) * values[h, i] + gate * w
                share = [math.exp(s) / sum(math.exp(s) for s in score[0]) for s in score[0]]
                reads.append(sum(s * v for s, v in zip(share, before if read_first else values[h])))
            close(got[b, t], layer.project_out.weight @ torch.cat(reads))
        close(after.values[b], values)


@torch.no_grad()
def test_pieces_through_the_layer_equal_the_whole_and_nothing_sees_the_future():
    layer, x = streaming(), randn(B, T, D)
    whole, end = layer(x)
    first, state = layer(x[:, :2])
    second, after = layer(x[:, 2:], state)
    close(torch.cat([first, second], 1), whole)
    close(after.values, end.values)
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        later = layer(changed)[0]
        assert torch.equal(later[:, :t], whole[:, :t]) and not torch.allclose(later[:, t], whole[:, t])


def test_gradients_of_the_layer():
    layer, x, state = streaming(), randn(B, 3, D).requires_grad_(), slots(B).values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: layer(x, MemoryState(v))[0], (x, state))
    layer(x)[0].square().sum().backward()
    assert not [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


def test_layer_learns_associative_recall():
    """Each token is a key with its value; the last token is one of the keys, whose value is the answer."""
    torch.manual_seed(0)
    keys, pairs, width = 6, 4, 24
    embed, layer, output = nn.Linear(2 * keys, width), StreamingMemory(width, 12, heads=2), nn.Linear(width, keys)
    optimizer = torch.optim.Adam([*embed.parameters(), *layer.parameters(), *output.parameters()], lr=1e-2)

    def batch(count):
        key = torch.rand(count, keys).argsort(1)[:, :pairs]
        value = torch.randint(keys, (count, pairs))
        asked = torch.randint(pairs, (count, 1))
        facts = torch.cat([F.one_hot(key, keys), F.one_hot(value, keys)], -1)
        question = F.pad(F.one_hot(key.gather(1, asked), keys), (0, keys))
        return torch.cat([facts, question], 1).float(), value.gather(1, asked).squeeze(1)

    def answer(x):
        return output(layer(embed(x))[0][:, -1])

    for _ in range(250):
        x, wanted = batch(32)
        loss = F.cross_entropy(answer(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, wanted = batch(512)
    accuracy = (answer(x).argmax(-1) == wanted).float().mean()
    assert accuracy >= 0.95


# --- the similarity model, and a cache on top of it ---


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forget", (False, True))
def test_similarity_model_is_its_equation(backend, forget):
    torch.manual_seed(0)
    model = SimilarityLM(7, D, forget=forget, backend=backend).double()
    model.log_beta.fill_(0.5)
    tokens = torch.randint(7, (B, T))
    (logits, hidden), state = model(tokens)
    first, middle = model(tokens[:, :2])
    second, _ = model(tokens[:, 2:], middle)
    close(torch.cat([first.logits, second.logits], 1), logits)
    decay = torch.sigmoid(model.decay_logit) if forget else torch.ones(D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            words = [model.embedding.weight[tokens[b, j]] * decay ** (t - j) for j in range(t + 1)]
            similarity = [sum(float(a @ model.output.weight[w]) for a in words) for w in range(7)]
            wanted = torch.softmax(math.exp(0.5) * torch.tensor(similarity, dtype=torch.float64), -1)
            close(torch.softmax(logits[b, t], -1), wanted)
            close(hidden[b, t] * sum(words).square().mean().sqrt(), sum(words))
        close(state[b], sum(words))


def test_a_cache_lowers_the_bits_of_held_out_text():
    """Trained on CPython's documentation. Only the cache holds the earlier part of the scored text."""
    torch.manual_seed(0)
    width, window = 64, 64
    text, held_out = _text.split(_text.documentation(), 0.1)
    segments = _text.windows(_text.streams(text, 32), window)
    model, cache = SimilarityLM(256, width), NeuralCache(256, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for tokens in segments[:60]:
        (logits, _), _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def score(tokens, state, entries):
        with torch.no_grad():
            output, state = model(tokens[:, :-1], state)
        nll, entries = cache.nll(*output, tokens[:, 1:], entries)
        return nll.mean(), F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten()), state, entries

    optimizer = torch.optim.Adam(cache.parameters(), lr=0.1)
    state, entries = model.initial_state(8), cache.initial_state(8)
    for tokens in segments[60:90]:  # mix and theta alone
        mixed, _, state, entries = score(tokens[:8], state, entries)
        optimizer.zero_grad()
        mixed.backward()
        optimizer.step()

    state, entries, bits = model.initial_state(4), cache.initial_state(4), torch.zeros(2)
    for tokens in _text.windows(_text.streams(held_out, 4), window)[:30]:
        with torch.no_grad():
            mixed, own, state, entries = score(tokens, state, entries)
        bits += torch.stack([mixed, own]) / math.log(2) / 30
    assert bits[0] < bits[1] - 0.2, bits


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match="MemoryCell: hidden_size must be at least 1, got 0"):
        MemoryCell(D, 0)
    with pytest.raises(ValueError, match="StreamingMemory: heads must divide width 4, got 3"):
        StreamingMemory(D, N, heads=3)
    with pytest.raises(ValueError, match="SimilarityLM: vocab_size must be at least 1, got 0"):
        SimilarityLM(0, D)
