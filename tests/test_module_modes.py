"""Every module under autocast, gradient accumulation, activation checkpointing, ``torch.compile``, ``state_dict``."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from memkernels.models import MemoryRNN, MemoryTransformerLM, SimilarityLM
from memkernels.nn import (
    AdditiveAttention,
    ExternalMemory,
    MemoryCell,
    MultiHopRead,
    NeuralCache,
    NgramMemory,
    RetrievalMixture,
    StreamingMemory,
    TokenMap,
    replace_slots,
)

B, T, N, D = 2, 2, 6, 8


class Mode(NamedTuple):
    """A module, a function of it whose results are compared, and the inputs ``[B, ...]`` of that function."""

    module: nn.Module
    step: callable
    inputs: tuple


class Both(nn.Module):
    """A prediction from a token and a record."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * D, 3)

    def forward(self, x, record):
        return self.linear(torch.cat([x.expand_as(record), record], -1)).tanh()


def write_then_read(memory, x):
    state = memory.write(x, memory.initial_state(len(x)))
    return memory.read(x, state), state


def cached(cache, logits, hidden, tokens):
    state = cache.append(hidden, tokens, cache.initial_state(len(hidden)))
    nll, state = cache.nll(logits, hidden, tokens, state)
    return cache.log_probs(logits, hidden, state), nll


def replaced(scale, values, content):
    return replace_slots(scale(values), torch.tensor([[1, -1]]).expand(len(values), -1), content)


def modes() -> dict[str, Mode]:
    torch.manual_seed(0)
    x, y, z = torch.randn(B, T, D), torch.randn(B, N, D), torch.randn(B, N, D)
    tokens, records = torch.randint(7, (B, T)), torch.randn(N, D)
    looked_up = (lambda m, *a: m(*a), (torch.randn(B, T, 2, D), tokens))
    transformer = MemoryTransformerLM(7, d_model=D, layers=1, heads=2, mem_size=N, max_length=T, dropout=0.0)
    return {
        "ExternalMemory": Mode(ExternalMemory(N, D, D), write_then_read, (x,)),
        "MultiHopRead": Mode(MultiHopRead(2, D), lambda m, *a: m(*a), (x, y, z)),
        "RetrievalMixture": Mode(
            RetrievalMixture(Both(), 2),
            lambda m, x: m(x, x, records.to(x.dtype), records.to(x.dtype)),
            (x,),
        ),
        "AdditiveAttention": Mode(AdditiveAttention(D, D, 4), lambda m, *a: m(*a), (x, y)),
        "NeuralCache": Mode(NeuralCache(N, D), cached, (torch.randn(B, T, 7), x, tokens)),
        "NgramMemory": Mode(NgramMemory(D, N, branches=2, token_map=TokenMap(tokens.new_tensor(range(7)))), *looked_up),
        "MemoryCell": Mode(MemoryCell(D, 4), lambda m, x: m(x), (x,)),
        "StreamingMemory": Mode(StreamingMemory(D, N, heads=2), lambda m, x: m(x), (x,)),
        "replace_slots": Mode(nn.Linear(D, D), replaced, (y, torch.randn(B, 2, D))),
        "MemoryRNN, content": Mode(MemoryRNN(D, 6, N, addressing="content"), lambda m, x: m(x), (x,)),
        "MemoryRNN, location": Mode(MemoryRNN(D, 6, N, addressing="location"), lambda m, x: m(x), (x,)),
        "SimilarityLM": Mode(SimilarityLM(7, D), lambda m, tokens: m(tokens), (tokens,)),
        "MemoryTransformerLM": Mode(transformer, lambda m, tokens: m(tokens), (tokens,)),
    }


NAMES = tuple(modes())


@pytest.fixture(params=NAMES)
def mode(request) -> Mode:
    return modes()[request.param]


def loss_of(results) -> torch.Tensor:
    """A mean over the streams, so that the losses of parts of a batch add up to that of the batch."""
    return sum(r.float().square().flatten(1).sum(1).mean() for r in tree_leaves(results))


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert any(g.any() for g in found.values())
    return found


def test_autocast(mode):
    exact = mode.step(mode.module, *mode.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mode.step(mode.module, *mode.inputs)
    for low, high in zip(tree_leaves(got), tree_leaves(exact)):
        torch.testing.assert_close(low.float(), high.float(), rtol=0.1, atol=0.1)
    found = gradients(mode.module, loss_of(got))
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())


def test_sixteen_bit_module(mode):
    exact = mode.step(mode.module, *mode.inputs)
    low = [x.bfloat16() if x.is_floating_point() else x for x in mode.inputs]
    got = mode.step(copy.deepcopy(mode.module).bfloat16(), *low)
    for rough, fine in zip(tree_leaves(got), tree_leaves(exact)):
        torch.testing.assert_close(rough.float(), fine.float(), rtol=0.2, atol=0.2)


def test_gradient_accumulation(mode):
    whole = gradients(mode.module, loss_of(mode.step(mode.module, *mode.inputs)))
    mode.module.zero_grad()
    for part in range(B):
        (loss_of(mode.step(mode.module, *(x[part : part + 1] for x in mode.inputs))) / B).backward()
    for name, p in mode.module.named_parameters():
        if name in whole:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-5)


def test_activation_checkpointing(mode):
    plain = gradients(mode.module, loss_of(mode.step(mode.module, *mode.inputs)))
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in mode.inputs]
    again = gradients(mode.module, loss_of(checkpoint(mode.step, mode.module, *inputs, use_reentrant=False)))
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    "mode",
    [name for name in NAMES if name not in ("ExternalMemory", "MemoryTransformerLM")],  # tested with the module itself
    indirect=True,
)
def test_compiles_without_a_graph_break(mode):
    wanted = mode.step(mode.module, *mode.inputs)
    torch._dynamo.reset()
    got = torch.compile(mode.step, fullgraph=True, backend="aot_eager")(mode.module, *mode.inputs)
    torch.testing.assert_close(tree_leaves(got), tree_leaves(wanted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(mode.module, loss_of(got)), gradients(mode.module, loss_of(wanted)))


def test_state_dict(mode):
    other = copy.deepcopy(mode.module)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1)
    wanted = tree_leaves(mode.step(mode.module, *mode.inputs))
    assert not all(torch.equal(a, b) for a, b in zip(tree_leaves(mode.step(other, *mode.inputs)), wanted))
    other.load_state_dict(mode.module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(mode.step(other, *mode.inputs)), wanted))


def test_loss_scaling():
    """A scaled loss in float16 gives the gradients of the plain one."""
    torch.manual_seed(0)
    layer, x = StreamingMemory(D, N), torch.randn(B, T, D)
    plain = gradients(layer, loss_of(layer(x)[0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(layer(x)[0])
    layer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=0.05, atol=0.05)
    before = math.fsum(p.abs().sum().item() for p in layer.parameters())
    scaler.step(optimizer)
    assert math.fsum(p.abs().sum().item() for p in layer.parameters()) != before
