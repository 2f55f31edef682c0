"""NgramMemory: its equation as plain loops, pieces of a text, packed texts, sparse gradients, a task to learn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ngram_support import MAP, ROWS, WORDS, D, close, layer, text
from support import randn
from torch.nn import functional as F

from memkernels.nn import NgramMemory

# --- the equation ---


def rows_of(memory: NgramMemory, tokens: list[int], position: int) -> list[list[float]]:
    """The M rows that the n-grams ending at ``position`` name, in Python's integers."""

    def stands_for(i: int) -> int:
        ignored = [] if memory.ignore is None else memory.ignore.tolist()
        if i < 0 or tokens[i] < 0 or tokens[i] in ignored:
            return memory.pad
        return tokens[i] if memory.token_map is None else memory.token_map.map.tolist()[tokens[i]]

    sizes, multipliers = memory.sizes.tolist(), memory.multipliers.tolist()
    ignored = [] if memory.ignore is None else memory.ignore.tolist()
    found = []
    for table, order in enumerate(n for n in memory.orders for _ in range(memory.heads)):
        mix = 0
        for j in range(order):
            mix ^= stands_for(position - j) * multipliers[j] % 2**64
        mix -= 2**64 * (mix >= 2**63)
        row = memory.weight[sum(sizes[:table]) + mix % sizes[table]].tolist()
        found.append([0.0] * memory.head_dim if tokens[position] < 0 or tokens[position] in ignored else row)
    return found


def rms(x: list[float], weight: list[float], eps: float) -> list[float]:
    size = math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v / size * w for v, w in zip(x, weight)]


def times(matrix: list[list[float]], x: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, x)) for row in matrix]


def expected(memory: NgramMemory, hidden: torch.Tensor, tokens: list[int], signed_sqrt: bool = True) -> torch.Tensor:
    """The equation of the module, number by number: hidden ``[T, B, D]``."""
    eps, T, B = memory.eps, len(tokens), memory.branches
    scales = [p.tolist() for p in (memory.hidden_weight, memory.key_weight, memory.input_weight)]
    keys = memory.key.weight.view(B, D, -1).tolist()
    gated = [[[0.0] * D for _ in range(B)] for _ in range(T)]
    for t, b in itertools.product(range(T), range(B)):
        e = [x for row in rows_of(memory, tokens, t) for x in row]
        a, c = rms(hidden[t, b].tolist(), scales[0][b], eps), rms(times(keys[b], e), scales[1][b], eps)
        g = sum(x * y for x, y in zip(a, c)) / math.sqrt(D)
        if signed_sqrt:
            g = math.copysign(math.sqrt(max(abs(g), 1e-6)), g) if g else 0.0
        gate = 1 / (1 + math.exp(-g))
        gated[t][b] = [gate * v for v in times(memory.value.weight.tolist(), e)]
    out = hidden.clone()
    for t, b, d in itertools.product(range(T), range(B), range(D)):
        mixed = 0.0
        for j in range(memory.kernel):
            if (before := t - j * memory.dilation) >= 0:
                tap = memory.filter[b * D + d, 0, memory.kernel - 1 - j].item()
                mixed += tap * rms(gated[before][b], scales[2][b], eps)[d]
        out[t, b, d] += gated[t][b][d] + mixed / (1 + math.exp(-mixed))
    return out


OPTIONS = {
    "usual": {},
    "branches": {"branches": 3},
    "one order": {"orders": (1,), "kernel": 2},
    "orders": {"orders": (4, 2), "heads": 1, "dilation": 1, "seed": 3, "layer": 2},
    "map": {"token_map": MAP, "pad": 5},
    "ignore": {"ignore": [4, 7, 11], "pad": 9, "kernel": 1},
    "plain gate": {"signed_sqrt": False, "eps": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equation(options):
    memory = layer(**options)
    hidden, tokens = text(9, branches=memory.branches)
    tokens[[3, 6]] = torch.tensor([-1, 4])
    got, _ = memory(hidden, tokens)
    wanted = expected(memory, hidden.view(9, memory.branches, D), tokens.tolist(), options.get("signed_sqrt", True))
    close(got, wanted.view(hidden.shape))


def test_a_new_layer_adds_the_gated_value_alone():
    """The filter begins as zero; W_b e is large beside eps so that the gate is not."""
    memory = NgramMemory(D, ROWS).double()
    hidden, tokens = text(2, 8)
    e = memory.weight[memory.slots(tokens)].flatten(-2)
    a, c = (F.rms_norm(x, (D,), eps=memory.eps) for x in (hidden, memory.key(e)))
    g = (a * c).sum(-1, keepdim=True) / D**0.5
    gated = torch.sigmoid(g.sign() * g.abs().clamp(min=1e-6).sqrt()) * memory.value(e)
    assert gated.any()
    close(memory(hidden, tokens)[0].detach(), (hidden + gated).detach())


# --- pieces, packed texts ---


@pytest.mark.parametrize("options", [*OPTIONS.values()], ids=OPTIONS)
def test_pieces_equal_the_whole(options):
    memory = layer(**options)
    hidden, tokens = text(2, 13, branches=memory.branches)
    whole, last = memory(hidden, tokens)
    for cut in range(14):
        first, history = memory(hidden[:, :cut], tokens[:, :cut])
        second, history = memory(hidden[:, cut:], tokens[:, cut:], history)
        close(torch.cat([first, second], 1), whole, 1e-12)
        assert torch.equal(history.tokens, last.tokens)
        close(history.inputs, last.inputs, 1e-12)


def test_token_by_token():
    memory = layer(branches=2, token_map=MAP)
    hidden, tokens = text(3, 20, branches=2)
    history, given = memory.initial_history(3), memory.initial_history(3)
    found = []
    for t in range(20):
        one, history = memory(hidden[:, t : t + 1], tokens[:, t : t + 1], history)
        found.append(one)
    close(torch.cat(found, 1), memory(hidden, tokens)[0], 1e-12)
    close(memory(hidden, tokens, given)[0], memory(hidden, tokens)[0], 0)
    assert (given.tokens == -1).all() and not given.inputs.any(), "the history that was given is not modified"


def test_slots_of_pieces_are_the_same_bits():
    memory = layer(token_map=MAP, ignore=[3])
    _, tokens = text(4, 17)
    whole = memory.slots(tokens)
    for cut in range(18):
        history = memory.initial_history(4)
        history = history._replace(tokens=torch.cat([history.tokens, tokens[:, :cut]], -1)[:, -2:])
        assert torch.equal(memory.slots(tokens[:, cut:], history), whole[:, cut:])


@pytest.mark.parametrize("branches", [1, 2])
def test_packed_texts_equal_separate_ones(branches):
    memory = layer(branches=branches, token_map=MAP)
    lengths = [1, 7, 2, 12]
    hidden, tokens = text(sum(lengths), branches=branches)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    first = torch.tensor([b for b, n in zip(begins, lengths) for _ in range(n)])
    parts = [memory(hidden[b : b + n], tokens[b : b + n])[0] for b, n in zip(begins, lengths)]
    close(memory(hidden, tokens, first=first)[0], torch.cat(parts), 1e-12)


def test_a_packed_text_may_begin_in_the_history():
    memory = layer()
    hidden, tokens = text(24)
    begins = torch.tensor([0] * 9 + [9] * 15)  # two texts; the first piece ends within the second
    _, history = memory(hidden[:14], tokens[:14], first=begins[:14])
    got, _ = memory(hidden[14:], tokens[14:], history, first=begins[14:] - 14)
    close(got, memory(hidden[9:], tokens[9:])[0][5:], 1e-12)
    assert not torch.allclose(got, memory(hidden[14:], tokens[14:], history)[0]), "the convolution reaches further back"


def test_gradients_flow_through_the_history_until_detached():
    memory = layer()
    hidden, tokens = text(12)
    hidden.requires_grad_()
    _, history = memory(hidden[:5], tokens[:5])
    (through,) = torch.autograd.grad(memory(hidden[5:], tokens[5:], history)[0].sum(), hidden)
    assert through[:5].any()
    _, history = memory(hidden[:5], tokens[:5])
    (cut,) = torch.autograd.grad(memory(hidden[5:], tokens[5:], history.detach())[0].sum(), hidden)
    assert not cut[:5].any() and cut[5:].any()


# --- training ---


def test_sparse_gradient_equals_the_dense_one():
    hidden, tokens = text(3, 10)
    found = {}
    for sparse in (False, True):
        memory = layer(sparse_grad=sparse)
        (memory(hidden, tokens)[0] * randn(3, 10, D, seed=5)).sum().backward()
        found[sparse] = {name: p.grad for name, p in memory.named_parameters()}
    gradient = found[True].pop("weight")
    assert gradient.is_sparse and gradient._nnz() == len(memory.slots(tokens).unique())
    close(gradient.to_dense(), found[False].pop("weight"))
    for name, dense in found[False].items():
        close(found[True][name], dense)


def test_the_gradient_is_that_of_the_equation():
    """Finite differences of the loops, for a row that was read and one that was not."""
    memory = layer()
    hidden, tokens = text(6)
    weights = randn(6, D, seed=5)
    (memory(hidden, tokens)[0] * weights).sum().backward()
    read = memory.slots(tokens)[2, 1].item()
    unread = next(i for i in range(memory.rows) if i not in memory.slots(tokens))
    for row in (read, unread):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                memory.weight[row, 1] += step
                out = expected(memory, hidden.unsqueeze(1), tokens.tolist()).squeeze(1)
                memory.weight[row, 1] -= step
            values.append((out * weights).sum().item())
        wanted = (values[0] - values[1]) / 2e-6
        assert memory.weight.grad[row, 1].item() == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def learned(with_memory: bool) -> float:
    """Accuracy of guessing the table entry ``f(x[t-1], x[t])`` of random pairs of tokens, from the last token alone."""
    torch.manual_seed(0)
    answer = torch.randint(8, (WORDS, WORDS))
    embed, head = torch.nn.Embedding(WORDS, 32), torch.nn.Linear(32, 8)
    memory = NgramMemory(32, 499, orders=(2,), heads=2, head_dim=16, sparse_grad=True)
    dense = [*embed.parameters(), *head.parameters(), *(p for n, p in memory.named_parameters() if n != "weight")]
    optimizers = [torch.optim.Adam(dense, 1e-2), torch.optim.SparseAdam([memory.weight], 5e-2)]
    for step in range(121):
        tokens = torch.randint(WORDS, (16, 64))
        x = embed(tokens)
        x = memory(x, tokens)[0] if with_memory else x
        logits, wanted = head(x)[:, 1:], answer[tokens[:, :-1], tokens[:, 1:]]
        if step == 120:
            return (logits.argmax(-1) == wanted).double().mean().item()
        F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
        for optimizer in optimizers[: 1 + with_memory]:
            optimizer.step()
            optimizer.zero_grad()
    raise AssertionError


def test_learns_what_takes_two_tokens():
    assert learned(True) > 0.97
    assert learned(False) < 0.5, "the last token alone does not tell"
