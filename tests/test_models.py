"""MemoryTransformerLM against its equations written as plain loops; causality, training, saving, generating."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memkernels.models import MemoryTransformerLM
from memkernels.nn import MemoryState

BACKENDS = ("reference", "cpu")
VOCAB, D, HEADS, N, W, B, T = 11, 8, 2, 6, 4, 2, 7


def model_of(backend="reference", *, causal=True, dtype=torch.float64, **options) -> MemoryTransformerLM:
    torch.manual_seed(0)
    sizes = {"d_model": D, "layers": 2, "heads": HEADS, "d_hidden": 16, "mem_size": N, "mem_dim": W, "max_length": 16}
    return MemoryTransformerLM(VOCAB, **sizes | {"dropout": 0.0} | options, causal=causal, backend=backend).to(dtype)


def tokens_of(*shape: int, seed: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def state_of(*lead: int, dtype=torch.float64) -> MemoryState:
    return MemoryState(torch.randn(*lead, N, W, dtype=dtype, generator=torch.Generator().manual_seed(2)))


# --- the forward pass, one number at a time ---


def matvec(linear: torch.nn.Linear, x: list[float]) -> list[float]:
    bias = [0.0] * linear.out_features if linear.bias is None else linear.bias.tolist()
    return [sum(w * a for w, a in zip(row, x)) + b for row, b in zip(linear.weight.tolist(), bias)]


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def weighted(weights: list[float], rows: list[list[float]]) -> list[float]:
    return [sum(w * row[j] for w, row in zip(weights, rows)) for j in range(len(rows[0]))]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def layer_norm(norm: torch.nn.LayerNorm, x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + norm.eps)
    return [(a - mean) / deviation * g + b for a, g, b in zip(x, norm.weight.tolist(), norm.bias.tolist())]


def encoder_layer(layer, xs: list[list[float]], causal: bool) -> list[list[float]]:
    width = D // HEADS
    projected = [matvec(layer.project_in, x) for x in xs]
    result = []
    for t, x in enumerate(xs):
        seen = range(t + 1) if causal else range(len(xs))
        attended = []
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            query = projected[t][:D][part]
            keys = [projected[s][D : 2 * D][part] for s in seen]
            values = [projected[s][2 * D :][part] for s in seen]
            attended += weighted(softmax([dot(query, key) / math.sqrt(width) for key in keys]), values)
        x = layer_norm(layer.norm_attention, [a + b for a, b in zip(x, matvec(layer.project_out, attended))])
        hidden = [max(a, 0.0) for a in matvec(layer.feed_forward[0], x)]
        result.append(
            layer_norm(layer.norm_feed_forward, [a + b for a, b in zip(x, matvec(layer.feed_forward[2], hidden))])
        )
    return result


def by_hand(model: MemoryTransformerLM, tokens: list[int], values: list[list[float]], causal: bool):
    """Log-probabilities and last layer's outputs of one stream."""
    embedding = model.embedding.weight.tolist()
    xs = []
    for t, token in enumerate(tokens):
        angle = [t / 10000 ** (2 * (j // 2) / D) for j in range(D)]
        position = [math.sin(a) if j % 2 == 0 else math.cos(a) for j, a in enumerate(angle)]
        xs.append([e * math.sqrt(D) + p for e, p in zip(embedding[token], position)])
    for layer in model.layers:
        xs = encoder_layer(layer, xs, causal)
    log_probs = []
    for x in xs:
        query = matvec(model.memory.query_projection, x)
        weights = softmax([dot(query, key) / math.sqrt(W) for key in model.memory.keys.tolist()])
        read = matvec(model.read_projection, weighted(weights, values))
        log_probs.append([math.log(p) for p in softmax(matvec(model.output, [a + b for a, b in zip(x, read)]))])
    return log_probs, xs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
def test_predictions_are_the_equations(backend, causal):
    model, tokens, state = model_of(backend, causal=causal), tokens_of(B, T), state_of(B)
    torch.testing.assert_close(model.positions, positions_in_double(), rtol=0, atol=1e-7)  # made in float32
    model.positions = positions_in_double()
    log_probs, hidden = model(tokens, state)
    for b in range(B):
        wanted, outputs = by_hand(model, tokens[b].tolist(), state.values[b].tolist(), causal)
        torch.testing.assert_close(
            log_probs[b].detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(hidden[b].detach(), torch.tensor(outputs, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
def test_the_last_layers_output_is_written_without_gradient(backend, causal):
    model, tokens, state = model_of(backend, causal=causal), tokens_of(B, T), state_of(B)
    hidden = model.encode(tokens)
    got = model.write(hidden, state)
    for b in range(B):
        values = state.values[b].tolist()
        outputs = hidden[b].tolist()
        # Causal: what followed a context is stored under that context. Encoder: an output under its own address.
        pairs = list(zip(outputs, outputs[1:])) if causal else [(h, h) for h in outputs]
        for address, content in pairs:
            query, write = (
                matvec(model.memory.query_projection, address),
                matvec(model.memory.write_projection, content),
            )
            for i, key in enumerate(model.memory.keys.tolist()):
                gate = 1 / (1 + math.exp(-dot(query, key) / math.sqrt(W)))
                values[i] = [gate * w + (1 - gate) * v for w, v in zip(write, values[i])]
        torch.testing.assert_close(got.values[b], torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert not got.values.requires_grad


def positions_in_double() -> torch.Tensor:
    return torch.tensor(
        [[(math.sin, math.cos)[j % 2](t / 10000 ** (2 * (j // 2) / D)) for j in range(D)] for t in range(16)],
        dtype=torch.float64,
    )


# --- losses ---


def test_causal_loss_is_the_mean_over_the_next_tokens():
    model, tokens, state = model_of(), tokens_of(B, T), state_of()
    loss, written = model.loss(tokens, state)
    log_probs, hidden = model(tokens[:, :-1], state)
    wanted = -sum(log_probs[b, t, tokens[b, t + 1]] for b in range(B) for t in range(T - 1)) / (B * (T - 1))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(written.values, model.write(hidden, state).values)


def test_encoder_loss_is_the_mean_over_the_hidden_tokens():
    model, tokens, state = model_of(causal=False, mask_rate=0.4), tokens_of(B, T), state_of()
    torch.manual_seed(7)
    loss, _ = model.loss(tokens, state)
    torch.manual_seed(7)
    hidden = torch.rand(B, T) < 0.4
    log_probs, _ = model(torch.where(hidden, VOCAB, tokens), state)
    wanted = [-log_probs[b, t, tokens[b, t]] for b in range(B) for t in range(T) if hidden[b, t]]
    torch.testing.assert_close(loss, sum(wanted) / len(wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
def test_padding_is_not_seen_counted_or_written(backend, causal):
    model, state = model_of(backend, causal=causal), state_of(B)
    short, padded = tokens_of(B, T), torch.cat([tokens_of(B, T), tokens_of(B, 4, seed=3)], dim=1)
    mask = (torch.arange(T + 4) < T).expand(B, -1)
    whole, cut = model(padded, state, token_mask=mask), model(short, state)
    torch.testing.assert_close(whole.log_probs[:, :T], cut.log_probs)
    written = model.write(whole.hidden, state, token_mask=mask)
    torch.testing.assert_close(written.values, model.write(cut.hidden, state).values)
    if causal:
        torch.testing.assert_close(model.loss(padded, state, token_mask=mask)[0], model.loss(short, state)[0])


# --- causality ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_changes_no_earlier_prediction(backend):
    """Within a batch and through the memory: two segments, the second reads what the first wrote."""
    model, tokens = model_of(backend), tokens_of(1, 2 * T)

    def predictions(tokens):
        state, result = model.initial_state(1), []
        for segment in tokens.split(T, dim=1):
            log_probs, hidden = model(segment, state)
            state = model.write(hidden, state)
            result.append(log_probs)
        return torch.cat(result, dim=1)

    before = predictions(tokens)
    for t in range(2 * T):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        after = predictions(changed)
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} changed an earlier prediction"
        assert not torch.equal(after[:, t:], before[:, t:])
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    assert not torch.allclose(predictions(changed)[:, T:], before[:, T:]), "the second segment must read the first"


def test_a_batch_does_not_read_what_it_writes():
    model, tokens = model_of(), tokens_of(B, T)
    state = model.initial_state()
    loss, written = model.loss(tokens, state)
    silent = model.loss(tokens, MemoryState(torch.zeros_like(state.values)))[0]
    assert torch.equal(loss, silent), "memory was empty before this batch"
    assert not torch.equal(model.loss(tokens, written)[0], loss)


# --- training ---


def train(
    backend: str, *, causal: bool, dtype: torch.dtype, steps: int = 12
) -> tuple[list[float], MemoryTransformerLM]:
    model = model_of(backend, causal=causal, dtype=dtype, dropout=0.1, gate_bias=-1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    curve = []
    for step in range(steps):
        loss, state = model.loss(tokens_of(4, T, seed=step % 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.memory.keep(state)
        curve.append(loss.item())
    return curve, model


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-9), (torch.float32, 1e-3)))
def test_fused_and_reference_train_to_the_same_curve(causal, dtype, tolerance):
    wanted, reference = train("reference", causal=causal, dtype=dtype)
    got, fused = train("cpu", causal=causal, dtype=dtype)
    assert got == pytest.approx(wanted, rel=tolerance)
    assert wanted[-1] < wanted[0]
    torch.testing.assert_close(fused.memory.values, reference.memory.values, rtol=tolerance, atol=tolerance)
    assert train("cpu", causal=causal, dtype=dtype)[0] == got, "one seed must give one curve"


def test_every_parameter_but_the_write_projection_has_a_gradient():
    model = model_of()
    model.loss(tokens_of(B, T), state_of())[0].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["memory.write_projection.weight"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
def test_autocast(backend, causal):
    model, tokens, state = (
        model_of(backend, causal=causal, dtype=torch.float32),
        tokens_of(B, T),
        state_of().values.float(),
    )
    exact, _ = model(tokens, MemoryState(state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs, _ = model(tokens, MemoryState(state))
        loss, written = model.loss(tokens, MemoryState(state))
    loss.backward()
    assert written.values.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(log_probs.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
def test_activation_checkpointing(backend, causal):
    model, tokens, state = model_of(backend, causal=causal, dropout=0.1), tokens_of(B, T), state_of()

    def gradients(forward):
        model.zero_grad()
        torch.manual_seed(3)
        forward(tokens, state).log_probs[..., 0].sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    got = gradients(lambda *inputs: checkpoint(model, *inputs, use_reentrant=False))
    torch.testing.assert_close(got, gradients(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
def test_compiles_without_a_graph_break(backend, causal):
    model, tokens, state = model_of(backend, causal=causal), tokens_of(B, T), state_of(B)

    def step(tokens, state):
        log_probs, hidden = model(tokens, state)
        return log_probs, model.write(hidden, state)

    log_probs, written = step(tokens, state)
    got, got_written = torch.compile(step, fullgraph=True, backend="aot_eager")(tokens, state)
    torch.testing.assert_close(got, log_probs)
    torch.testing.assert_close(got_written.values, written.values)
    got.sum().backward()


def test_state_dict_carries_the_memory():
    _, model = train("reference", causal=True, dtype=torch.float64, steps=2)
    model.eval()
    other = model_of()
    assert not torch.equal(other.eval()(tokens_of(B, T)).log_probs, model(tokens_of(B, T)).log_probs)
    other.load_state_dict(model.state_dict())
    assert other.memory.values.any()
    assert torch.equal(other(tokens_of(B, T)).log_probs, model(tokens_of(B, T)).log_probs)


# --- generation ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_is_deterministic_and_functional(backend):
    model, prompt, state = model_of(backend, dropout=0.5).train(), tokens_of(B, 3), state_of(B)
    before = state.values.clone()

    def draw(seed, **options):
        return model.generate(prompt, 20, state, generator=torch.Generator().manual_seed(seed), **options)

    tokens, after = draw(1)
    again, after_again = draw(1)
    assert tokens.shape == (B, 23)  # longer than max_length, so the window slides
    assert torch.equal(tokens[:, :3], prompt)
    assert torch.equal(tokens, again)
    assert torch.equal(after.values, after_again.values)
    assert torch.equal(state.values, before), "the given state must not change"
    assert not torch.equal(after.values, before), "what was generated must be written"
    assert torch.equal(draw(1, write=False)[1].values, before)
    assert not torch.equal(draw(2)[0], tokens)
    assert model.training, "generating must not leave the model in another mode"


def test_greedy_takes_the_most_likely_token_and_writes_each_once():
    model, prompt, state = model_of().eval(), tokens_of(1, 3), state_of(1)
    tokens, after = model.generate(prompt, 4, state, temperature=0)
    for t in range(3, 7):
        hidden = model.encode(tokens[:, :t])
        written = model.write(hidden, state)  # the memory before this prediction holds the whole text before it
        assert tokens[0, t] == model.decode(hidden, written)[0, -1].argmax()
    torch.testing.assert_close(after.values, written.values)
    assert torch.equal(model.generate(prompt, 4, state, top_k=1)[0], tokens)


def test_top_k_draws_only_from_the_most_likely():
    model, prompt = model_of().eval(), tokens_of(1, 3).expand(200, -1)
    best = set(model(prompt[:1]).log_probs[0, -1].topk(3).indices.tolist())
    drawn = model.generate(prompt, 1, top_k=3, temperature=5.0, write=False)[0][:, -1]
    assert set(drawn.tolist()) == best


# --- errors ---


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match=r"tokens must be \[B, T <= 16\], got \[2, 17\]"):
        model_of()(tokens_of(B, 17))
    with pytest.raises(ValueError, match="generate: needs causal=True"):
        model_of(causal=False).generate(tokens_of(B, 3), 1)
    with pytest.raises(ValueError, match=r"tokens must be \[B, T >= 1\], got \[2, 0\]"):
        model_of().generate(tokens_of(B, 0), 1)
    with pytest.raises(ValueError, match="got temperature=1.0 and top_k=0"):
        model_of().generate(tokens_of(B, 3), 1, top_k=0)
    with pytest.raises(ValueError, match="heads must divide width 8, got 3"):
        model_of(heads=3)
    with pytest.raises(ValueError, match="mask_rate must lie between 0 and 1, got 0"):
        model_of(mask_rate=0)
    with pytest.raises(ValueError, match="width must be even, got 9"):
        model_of(d_model=9, heads=3)
