"""NgramMemory: its equation as plain loops, pieces of a text, packed texts, sparse gradients, rows in a table."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import close as close_to
from support import randn
from torch.nn import functional as F

from memkernels.nn import NgramHistory, NgramMemory, TokenMap

D, ROWS, WORDS = 6, 11, 23


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-10) -> None:
    close_to(got.detach(), wanted.detach(), tolerance)


MAP = TokenMap(torch.tensor([i // 2 for i in range(WORDS)]))


def layer(**options) -> NgramMemory:
    """A layer in float64, every parameter drawn, so that nothing is hidden by a zero or a one."""
    made = NgramMemory(D, ROWS, **{"heads": 2, "head_dim": 3, **options}).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def text(*lead: int, branches: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and tokens ``lead``."""
    tokens = torch.randint(WORDS, lead, generator=torch.Generator().manual_seed(seed))
    return randn(*lead, *([branches] if branches > 1 else []), D, seed=seed), tokens


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


# --- rows in a table ---


class Rows:
    """The rows of a layer behind the methods of a table; counts its reads."""

    def __init__(self, values: torch.Tensor):
        self.values, self.gathered, self.prefetched = values.detach().clone(), 0, 0
        self.rows, self.width = values.shape

    def gather(self, slots):
        self.gathered += 1
        return self._rows(slots)

    def prefetch(self, slots):
        self.prefetched += 1
        return Read(self._rows(slots))

    def _rows(self, slots):
        return self.values[slots.clamp(min=0)].masked_fill((slots < 0).unsqueeze(-1), 0)


class Read:
    def __init__(self, found):
        self.found = found

    def wait(self):
        return self.found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_in_a_table(dtype):
    memory, served = layer(ignore=[2]), layer(ignore=[2])
    hidden, tokens = text(2, 9)
    table = Rows(memory.weight.to(dtype))
    served.read_from(table)
    assert set(served.state_dict()) == set(memory.state_dict()) - {"weight"}
    wanted, last = memory(hidden, tokens)
    plain, _ = served(hidden, tokens)
    close(plain, wanted, 1e-12 if dtype == torch.float64 else 1e-5)
    assert memory.prefetch(tokens) is None, "a parameter needs none"
    _, history = served(hidden[:, :4], tokens[:, :4])
    ticket = served.prefetch(tokens[:, 4:], history)
    got, history = served(hidden[:, 4:], tokens[:, 4:], history, ticket=ticket)
    close(got, plain[:, 4:], 1e-12)
    assert (table.gathered, table.prefetched) == (2, 1), "a ticket is used instead of a read"
    close(history.inputs, last.inputs, 1e-12 if dtype == torch.float64 else 1e-5)
    first = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3, 3]).expand(2, 9)
    packed, _ = served(hidden, tokens, first=first, ticket=served.prefetch(tokens, first=first))
    close(packed, served(hidden, tokens, first=first)[0], 1e-12)
    close(packed, memory(hidden, tokens, first=first)[0], 1e-12 if dtype == torch.float64 else 1e-5)


def test_a_table_of_the_constructor_takes_no_memory():
    memory = layer()
    served = NgramMemory(D, ROWS, heads=2, head_dim=3, table=Rows(memory.weight)).double()
    assert "weight" not in dict(served.named_parameters())
    served.load_state_dict({name: x for name, x in memory.state_dict().items() if name != "weight"})
    hidden, tokens = text(5)
    close(served(hidden, tokens)[0], memory(hidden, tokens)[0], 1e-12)


def test_state_dict_carries_the_hash_functions():
    memory = layer(seed=1, ignore=[3], token_map=MAP)
    other = layer(seed=2, ignore=[4], token_map=TokenMap(torch.zeros(WORDS).long()))
    hidden, tokens = text(7)
    assert not torch.equal(memory.slots(tokens), other.slots(tokens))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other(hidden, tokens)[0], memory(hidden, tokens)[0])


def test_made_on_the_meta_device():
    with torch.device("meta"):
        made = NgramMemory(D, ROWS, heads=2, head_dim=3, ignore=[1])
    whole = layer(ignore=[1])
    assert made.weight.is_meta and torch.equal(made.sizes, whole.sizes)
    made = made.to_empty(device="cpu").double()
    made.load_state_dict(whole.state_dict())
    hidden, tokens = text(7)
    assert torch.equal(made(hidden, tokens)[0], whole(hidden, tokens)[0])


def test_layers_and_seeds_hash_differently():
    _, tokens = text(1, 200)
    found = [layer(seed=seed, layer=number).slots(tokens) for seed, number in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations(found, 2):
        assert (one == other).double().mean() < 0.3
    assert torch.equal(layer().slots(tokens), found[0])
    assert NgramMemory(D, (ROWS, 30), heads=2).sizes.tolist() == [11, 13, 31, 37], "rows may differ by order"


def test_integers_of_32_bits():
    memory = layer()
    hidden, tokens = text(2, 9)
    got, history = memory(hidden, tokens.int())
    assert torch.equal(got, memory(hidden, tokens)[0]) and history.tokens.dtype == torch.int64


# --- bad input ---


def wrong(call) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    return str(caught.value)


def test_shapes_that_do_not_fit():
    memory, (hidden, tokens) = layer(), text(2, 5)
    branched = layer(branches=2)
    known = "NgramMemory: hidden must be [..., T, dim=6] and tokens [..., T], got "
    assert wrong(lambda: memory(hidden[..., :5], tokens)) == known + "[2, 5, 5] and [2, 5]"
    assert wrong(lambda: memory(hidden, tokens[:, :4])) == known + "[2, 5, 6] and [2, 4]"
    assert wrong(lambda: memory(hidden[0], tokens)) == known + "[5, 6] and [2, 5]"
    assert wrong(lambda: memory(hidden[0, 0], tokens[0, 0])) == known + "[6] and []"
    known = "NgramMemory: hidden must be [..., T, branches=2, dim=6] and tokens [..., T], got "
    assert wrong(lambda: branched(hidden, tokens)) == known + "[2, 5, 6] and [2, 5]"


def test_a_history_that_does_not_fit():
    memory, (hidden, tokens) = layer(), text(2, 5)
    good = memory.initial_history(2)
    for bad, sentence in (
        (good._replace(tokens=good.tokens[:, :1]), "NgramMemory: history.tokens must be [2, 2], got [2, 1]"),
        (good._replace(tokens=good.tokens[0]), "NgramMemory: history.tokens must be [2, 2], got [2]"),
        (
            good._replace(inputs=good.inputs[:, 1:]),
            "NgramMemory: history.inputs must be [2, 9, 1, 6], got [2, 8, 1, 6]",
        ),
        (good.tokens, "NgramMemory: history must be an NgramHistory, got Tensor"),
    ):
        assert wrong(lambda: memory(hidden, tokens, bad)) == sentence  # noqa: B023
        assert wrong(lambda: memory.slots(tokens, bad)) == sentence  # noqa: B023


def test_a_token_outside_the_map():
    memory = layer(token_map=TokenMap(torch.arange(WORDS - 1)))
    hidden, tokens = text(1, 5)
    tokens[0, 3] = WORDS - 1
    wanted = "ngram_slots: tokens must be below 22, the length of token_map, got 22"
    assert wrong(lambda: memory(hidden, tokens)) == wanted


def test_a_table_that_does_not_fit():
    memory = layer()
    hidden, tokens = text(1, 5)
    before = memory.weight
    wide, short = Rows(torch.zeros(memory.rows, 4)), Rows(torch.zeros(memory.rows - 1, 3))
    assert wrong(lambda: memory.read_from(wide)) == "NgramMemory: table must have rows of head_dim=3 numbers, got 4"
    assert wrong(lambda: memory.read_from(short)) == f"NgramMemory: table must have at least {memory.rows} rows, got {memory.rows - 1}"  # fmt: skip  # noqa: E501
    assert wrong(lambda: memory.read_from([])) == "NgramMemory: table must have gather(slots), got list"
    assert memory.weight is before and memory.table is None, "what was refused changed nothing"
    served = layer()
    served.read_from(Rows(memory.weight))
    ticket = served.prefetch(tokens[:, :4])
    known = "NgramMemory: ticket must be of these tokens, of rows [1, 5, 4, 3], got [1, 4, 4, 3]"
    assert wrong(lambda: served(hidden, tokens, ticket=ticket)) == known
    known = "NgramMemory: ticket must be None where the rows are a parameter, got Read"
    assert wrong(lambda: memory(hidden, tokens, ticket=ticket)) == known
    assert "save_table needs the parameter weight" in wrong(lambda: served.save_table("unused"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 0}, "NgramMemory: heads must be at least 1, got 0"),
        ({"kernel": 0}, "NgramMemory: kernel must be at least 1, got 0"),
        ({"orders": ()}, "NgramMemory: orders must be lengths of at least 1, got []"),
        ({"orders": (2, 0)}, "NgramMemory: orders must be lengths of at least 1, got [2, 0]"),
        ({"token_map": torch.zeros(3)}, "NgramMemory: token_map must be a TokenMap, got Tensor"),
    ],
)
def test_bad_options(options, sentence):
    assert wrong(lambda: NgramMemory(D, ROWS, **options)) == sentence


def test_history_is_a_tuple_of_tensors():
    assert layer(orders=(2, 5)).initial_history().inputs.shape == (15, 1, D), "the longest n-gram is the dilation"
    history = layer().initial_history(2, 3)
    assert isinstance(history, NgramHistory) and history.tokens.shape == (2, 3, 2)
    assert history.inputs.shape == (2, 3, 9, 1, D)
