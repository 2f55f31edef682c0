"""Modules that read, against their equations in float64, their edges, and what they learn."""

from __future__ import annotations

import math

import pytest
import torch
from support import close, randn
from torch import nn
from torch.nn import functional as F

import memkernels as mk
from memkernels.nn import AdditiveAttention, MultiHopRead, RetrievalMixture

BACKENDS = ("reference", "cpu")
T, N, W, K = 3, 6, 4, 2


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


# --- several hops ---


def hops_of(backend: str, hops: int = 3, **options) -> MultiHopRead:
    torch.manual_seed(0)
    module = MultiHopRead(hops, W, backend=backend, **options).double()
    nn.init.normal_(module.carry.weight)
    return module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", (True, False))
def test_each_read_is_the_query_of_the_next(backend, scaled):
    module, query, keys, values = hops_of(backend, scaled=scaled), randn(T, W), randn(N, W), randn(N, W, seed=1)
    got, queries = module(query, keys, values, return_queries=True)
    assert queries.shape == (3, T, W)
    for t in range(T):
        u = query[t]
        for hop in range(3):
            close(queries[hop, t].detach(), u)
            weights = softmax([float(u @ key) * (W**-0.5 if scaled else 1.0) for key in keys])
            u = module.carry.weight.detach() @ u + sum(w * v for w, v in zip(weights, values))
        close(got[t].detach(), u)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_slot_is_read_by_no_hop(backend):
    module, query, keys, values = hops_of(backend), randn(T, W), randn(2, N, W), randn(2, N, W, seed=1)
    mask = torch.arange(N) != 2
    kept = module(query, keys[:, mask], values[:, mask]).detach()
    poisoned = values.index_fill(1, torch.tensor(2), math.nan)
    for content in (values, poisoned):
        close(module(query, keys, content, slot_mask=mask).detach(), kept)


def test_gradients_of_several_hops():
    module = hops_of("cpu")
    inputs = [x.requires_grad_() for x in (randn(T, W), randn(N, W), randn(N, W, seed=1))]
    assert torch.autograd.gradcheck(module, inputs)


def test_untrained_a_query_keeps_what_was_asked():
    module, query = MultiHopRead(2, W), torch.randn(T, W)
    close(module(query, torch.randn(N, W), torch.zeros(N, W)).detach(), query)


# --- a mixture over records ---


class Joint(nn.Module):
    """A prediction from a token and a record."""

    def __init__(self):
        super().__init__()
        self.of_token, self.of_record = nn.Linear(5, 7), nn.Linear(3, 7)

    def forward(self, x, record):
        return F.log_softmax(self.of_token(x) + self.of_record(record).tanh(), dim=-1)


def mixture_of(backend: str, k: int, log_probs: bool) -> RetrievalMixture:
    torch.manual_seed(0)
    return RetrievalMixture(Joint(), k, log_probs=log_probs, backend=backend).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_probs", (False, True))
def test_mixture_is_its_equation(backend, log_probs):
    module = mixture_of(backend, 2, log_probs)
    x, query, keys, records = randn(2, T, 5), randn(2, T, K), randn(N, K), randn(N, 3)
    got = module(x, query, keys, records)
    assert got.shape == (2, T, 7)
    for b in range(2):
        for t in range(T):
            scores = [float(query[b, t] @ key) * K**-0.5 for key in keys]
            best = sorted(range(N), key=lambda i: -scores[i])[:2]
            predictions = [module.model(x[b, t], records[i]).detach() for i in best]
            weights = softmax([scores[i] for i in best])
            if log_probs:
                wanted = sum(w * p.exp() for w, p in zip(weights, predictions)).log()
            else:
                wanted = sum(w * p for w, p in zip(weights, predictions))
            close(got[b, t].detach(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_probs", (False, True))
def test_fewer_records_than_neighbours(backend, log_probs):
    module, x, query = mixture_of(backend, 4, log_probs), randn(T, 5), randn(T, K).requires_grad_()
    keys, records = randn(N, K), randn(N, 3)
    two = torch.arange(N) < 2
    got = module(x, query, keys, records, slot_mask=two)
    wanted = RetrievalMixture(module.model, 2, log_probs=log_probs)(x, query, keys[:2], records[:2])
    close(got.detach(), wanted.detach())
    got.sum().backward()
    assert query.grad.isfinite().all()
    weights, indices = module.retrieve(query, keys, slot_mask=two)
    assert (indices[:, 2:] == -1).all() and not weights[:, 2:].any()
    close(weights.sum(-1).detach(), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("log_probs", (False, True))
def test_no_record_to_retrieve(log_probs):
    module, x, query, keys = mixture_of("cpu", 2, log_probs), randn(T, 5), randn(T, K).requires_grad_(), randn(N, K)
    mask = torch.ones(N, dtype=torch.bool)
    some = module(x, query, keys, randn(N, 3), slot_mask=mask)
    none = module(x, query, keys, randn(N, 3), slot_mask=~mask)
    assert (none == (-math.inf if log_probs else 0)).all()
    assert not module.retrieve(query, keys, slot_mask=~mask)[0].any()
    torch.cat([some, none]).clamp(min=-100).sum().backward()
    gradients = [query.grad, *(p.grad for p in module.parameters())]
    assert all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("log_probs", (False, True))
def test_gradients_reach_query_keys_and_records(log_probs):
    module = mixture_of("cpu", 3, log_probs)
    inputs = [v.requires_grad_() for v in (randn(T, 5), randn(T, K), randn(N, K), randn(N, 3))]
    assert torch.autograd.gradcheck(module, inputs)


def test_records_may_be_tokens():
    module = RetrievalMixture(lambda x, record: x + record.sum(-1, keepdim=True), 2)
    got = module(torch.zeros(T, 1), torch.randn(T, K), torch.randn(N, K), torch.full((N, 5), 3))
    close(got, torch.full((T, 1), 15.0))


def test_retrieval_learns_which_record_predicts():
    """Every step draws new records, a code and a label each. The query is the code under an unknown rotation, and only
    the label is given, so a right answer means that the retriever learnt to undo the rotation."""
    torch.manual_seed(0)
    labels, count, width = 8, 16, 6
    rotation = torch.linalg.qr(torch.randn(width, width))[0]
    project = nn.Linear(width, width, bias=False)

    def predict(x, record):  # 0.9 on the record's label, 0.1 spread evenly
        return torch.log(0.9 * F.one_hot(record, labels) + 0.1 / labels)

    module = RetrievalMixture(predict, 4, log_probs=True, scale=8.0)
    optimizer = torch.optim.Adam(project.parameters(), lr=2e-2)

    def batch():
        codes, label = F.normalize(torch.randn(count, width), dim=-1), torch.randint(labels, (count,))
        queries = project(codes @ rotation)
        return module(queries, queries, codes, label), label, mk.topk_search(queries, codes, 1)[1].squeeze(-1)

    for _ in range(200):
        log_probs, label, _ = batch()
        loss = F.nll_loss(log_probs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = torch.cat([batch()[2] == torch.arange(count) for _ in range(20)]).float().mean()
    assert found >= 0.95


# --- additive attention ---


@pytest.mark.parametrize("backend", ("reference", "auto"))
def test_attention_is_its_equation(backend):
    torch.manual_seed(0)
    attention = AdditiveAttention(K, 5, 6, backend=backend).double()
    hidden, outputs = randn(2, T, K), randn(2, N, 5)
    mask = torch.tensor([[True] * N, [True, False] * (N // 2)])
    got = attention(hidden, outputs, slot_mask=mask)
    weight = torch.cat([attention.hidden_projection.weight, attention.output_projection.weight], 1).detach()
    for b in range(2):
        seen = [i for i in range(N) if mask[b, i]]
        for t in range(T):
            hiddens = [torch.tanh(weight @ torch.cat([hidden[b, t], outputs[b, i]])) for i in seen]
            score = [math.exp(float(attention.score_vector.detach() @ h)) for h in hiddens]
            close(got[b, t].detach(), sum(s / sum(score) * outputs[b, i] for s, i in zip(score, seen)))
    assert torch.equal(attention(hidden, outputs, keys=attention.keys(outputs), slot_mask=mask), got)


def test_gradients_of_attention():
    attention = AdditiveAttention(K, 5, 6).double()
    hidden, outputs = randn(2, T, K).requires_grad_(), randn(2, N, 5).requires_grad_()
    assert torch.autograd.gradcheck(attention, (hidden, outputs))
    attention(hidden, outputs).square().sum().backward()
    assert all(p.grad.any() for p in attention.parameters())


def test_a_decoder_learns_to_reverse():
    """The decoder's state is only the number of tokens emitted so far; it must look up which ones come next."""
    torch.manual_seed(0)
    length, vocab, width = 6, 8, 24
    tokens, places, steps = nn.Embedding(vocab, width), nn.Embedding(length, width), nn.Embedding(length, width)
    attention, output = AdditiveAttention(width, width, width), nn.Linear(width, vocab)
    modules = nn.ModuleList([tokens, places, steps, attention, output])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)

    def decode(source):
        encoded = tokens(source) + places.weight
        return output(attention(steps.weight.expand(len(source), -1, -1), encoded))

    for _ in range(150):
        source = torch.randint(vocab, (32, length))
        loss = F.cross_entropy(decode(source).flatten(0, 1), source.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.randint(vocab, (256, length))
    assert (decode(source).argmax(-1) == source.flip(1)).float().mean() >= 0.95


# --- errors ---


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match="MultiHopRead: hops must be at least 1, got 0"):
        MultiHopRead(0, W)
    with pytest.raises(ValueError, match="AdditiveAttention: attention_size must be at least 1, got 0"):
        AdditiveAttention(3, 3, 0)
    with pytest.raises(ValueError, match="RetrievalMixture: neighbours must be at least 1, got 0"):
        RetrievalMixture(Joint(), 0)
    with pytest.raises(ValueError, match=r"got \[6, 2\] and \[5, 3\]"):
        RetrievalMixture(Joint(), 1)(torch.randn(T, 5), torch.randn(T, K), torch.randn(N, K), torch.randn(N - 1, 3))
