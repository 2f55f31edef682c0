"""Modules against their equations, written here as plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

import memkernels as mk
from memkernels.nn import ExternalMemory, MemoryState

BACKENDS = ("reference", "cpu")
N, W, D, T = 5, 4, 6, 3


def memory_of(backend="reference", **options) -> ExternalMemory:
    torch.manual_seed(0)
    return ExternalMemory(N, W, D, backend=backend, **options).double()


def tokens(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def state_of(*lead: int) -> MemoryState:
    return MemoryState(torch.randn(*lead, N, W, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))


def dot(a, b) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b))


def project(linear: torch.nn.Linear, x) -> list[float]:
    return [dot(row, x) for row in linear.weight.detach()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", (True, False))
def test_read_is_its_equation(backend, scaled):
    memory, x, state = memory_of(backend, scaled=scaled), tokens(), state_of()
    got = memory.read(x, state)
    for t in range(T):
        query = project(memory.query_projection, x[t])
        score = [dot(query, key) * (W**-0.5 if scaled else 1.0) for key in memory.keys.detach()]
        total = sum(math.exp(s) for s in score)
        wanted = [sum(math.exp(s) / total * float(v[j]) for s, v in zip(score, state.values)) for j in range(W)]
        torch.testing.assert_close(got[t], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scaled", "gate_bias"), ((True, 0.0), (False, -1.5)))
def test_write_is_its_equation(backend, scaled, gate_bias):
    memory, x, state = memory_of(backend, scaled=scaled, gate_bias=gate_bias), tokens(), state_of()
    keys, before = memory.keys.detach().clone(), state.values.clone()
    got = memory.write(x, state)
    values = before.tolist()
    for t in range(T):
        query, write = project(memory.query_projection, x[t]), project(memory.write_projection, x[t])
        for i in range(N):
            gate = 1 / (1 + math.exp(-(dot(query, keys[i]) * (W**-0.5 if scaled else 1.0) + gate_bias)))
            values[i] = [gate * w + (1 - gate) * v for w, v in zip(write, values[i])]
    torch.testing.assert_close(got.values, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(memory.keys, keys), "a write must not change the keys"
    assert torch.equal(state.values, before), "a write must not change the state it was given"


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_have_memories_of_their_own_or_share_one(backend):
    memory, x = memory_of(backend), tokens(2)
    own = memory.write(x, memory.initial_state(2))
    for b in range(2):
        torch.testing.assert_close(own.values[b], memory.write(x[b], memory.initial_state()).values)
    shared = memory.write(x, memory.initial_state())
    one_after_the_other = memory.write(x[1], memory.write(x[0], memory.initial_state()))
    torch.testing.assert_close(shared.values, one_after_the_other.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_address_and_token_mask(backend):
    memory, x, state = memory_of(backend), tokens(), state_of()
    mask = torch.tensor([True, False, True])
    kept = memory.write(x[mask], state, address=x.flip(0)[mask])
    torch.testing.assert_close(memory.write(x, state, address=x.flip(0), token_mask=mask).values, kept.values)
    assert torch.equal(memory.write(x, state, token_mask=mask & False).values, state.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_write_in_place_equals_write(backend):
    memory, x, state = memory_of(backend), tokens(), state_of()
    with torch.no_grad():
        target = state.clone()
        assert memory.write_(x, target).values is target.values
        torch.testing.assert_close(target.values, memory.write(x, state).values)
    with pytest.raises(RuntimeError, match="no argument may require a gradient"):
        memory.write_(x, state.clone())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_through_the_state_until_it_is_detached(backend):
    memory, x, late = memory_of(backend), tokens(), tokens().flip(0)

    def gradients(detach: bool):
        memory.zero_grad()
        state = memory.write(x, state_of())
        memory.read(late, state.detach() if detach else state).square().sum().backward()
        return {name: p.grad for name, p in memory.named_parameters()}

    through, cut = gradients(False), gradients(True)
    assert through["write_projection.weight"].abs().sum() > 0
    assert cut["write_projection.weight"] is None
    assert not torch.allclose(through["keys"], cut["keys"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_write_then_read(backend):
    memory = memory_of(backend, gate_bias=-0.5)
    x, values = tokens().requires_grad_(), state_of().values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: memory.read(x, memory.write(x, MemoryState(v))), (x, values))


def test_an_empty_memory_reads_zero():
    memory = memory_of()
    assert not memory.read(tokens(), memory.initial_state()).any()


def test_the_kept_memory_is_in_the_state_dict():
    memory, other = memory_of(), memory_of()
    written = memory.write(tokens(), memory.initial_state()).detach()
    memory.keep(written)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.initial_state().values, written.values)
    assert torch.equal(other.initial_state(3).values, written.values.expand(3, N, W))
    with torch.no_grad():
        memory.write_(tokens(), other.initial_state())
    assert torch.equal(other.values, written.values), "a state is a copy of the kept memory"
    with pytest.raises(ValueError, match=r"state.values must be \[5, 4\], got \[2, 5, 4\]"):
        memory.keep(memory.initial_state(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_memory_under_autocast(backend):
    torch.manual_seed(0)
    memory = ExternalMemory(N, W, D, backend=backend)
    x, state = tokens().float(), MemoryState(state_of().values.float())
    exact = memory.write(x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read, written = memory.read(x, state), memory.write(x, state)
    assert read.dtype == torch.bfloat16
    assert written.values.dtype == torch.float32, "the memory keeps its own dtype"
    torch.testing.assert_close(read.float(), memory.read(x, state), rtol=0.05, atol=0.05)
    torch.testing.assert_close(written.values, exact.values, rtol=0.05, atol=0.05)


def test_sixteen_bit_module_over_a_float32_state():
    memory = ExternalMemory(N, W, D).bfloat16()
    x, state = tokens().bfloat16(), MemoryState(state_of().values.float())
    assert memory.write(x, state).values.dtype == torch.float32
    assert memory.read(x, state).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    memory, x, state = memory_of(backend, gate_bias=-1.0), tokens(2), state_of(2)

    def step(x, state):
        written = memory.write(x, state)
        return memory.read(x, written), written

    read, written = step(x, state)
    got, got_written = torch.compile(step, fullgraph=True, backend="aot_eager")(x, state)
    torch.testing.assert_close(got, read)
    torch.testing.assert_close(got_written.values, written.values)


def test_the_backend_option_is_passed_on():
    memory = memory_of("no such backend")
    with pytest.raises(ValueError, match="backend must be one of"):
        memory.read(tokens(), state_of())
    memory.backend = None
    with mk.use_backend("reference"):
        memory.read(tokens(), state_of())


@pytest.mark.parametrize("sizes", ((0, 4, 4), (4, 0, 4), (4, 4, 0)))
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        ExternalMemory(*sizes)
