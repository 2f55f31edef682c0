"""NgramMemory: rows in a table, what is saved, hash functions, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from ngram_support import MAP, ROWS, WORDS, D, Rows, close, layer, text, wrong

from memkernels.nn import NgramHistory, NgramMemory, TokenMap
from memkernels.store import RowTable

# --- rows in a table ---


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


@pytest.mark.parametrize("tier", ["ram", "mmap"])
def test_a_saved_table(tmp_path, tier):
    memory = layer(ignore=[2]).float()
    hidden, tokens = text(2, 9)
    hidden = hidden.float()
    wanted, _ = memory(hidden, tokens)
    memory.save_table(tmp_path / "rows").close()
    exact, rough = layer(ignore=[2]).float(), layer(ignore=[2]).float()
    with RowTable.open(tmp_path / "rows", tier=tier) as table:
        assert torch.equal(table.gather(torch.arange(memory.rows)), memory.weight)
        exact.read_from(table)
        assert torch.equal(exact(hidden, tokens, ticket=exact.prefetch(tokens))[0], wanted)
        assert torch.equal(exact(hidden, tokens)[0], wanted)
    with memory.save_table(tmp_path / "small", dtype=torch.float8_e4m3fn, scale="row") as table:
        assert table.layout.dtype == torch.float8_e4m3fn
        rough.read_from(table)
        close(table.gather(torch.arange(memory.rows)), memory.weight, 0.05)
        close(rough(hidden, tokens)[0], wanted, 0.2)
        wide = NgramMemory(D, ROWS, heads=2, head_dim=4)
        known = "NgramMemory: table must have rows of head_dim=4 numbers, got 3"
        assert wrong(lambda: wide.read_from(table)) == known
        more = NgramMemory(D, 2 * ROWS, heads=2, head_dim=3)
        assert wrong(lambda: more.read_from(table)).endswith(f"rows, got {memory.rows}")


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
