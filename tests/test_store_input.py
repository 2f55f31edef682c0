"""What a store is given and cannot take: the kind of the error, and what its sentence names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from store_support import K, V, new, rows

from memkernels.store import MemoryStore

NAN = torch.full((1, K), torch.nan)
KEYS, VALUES = rows(2)
CALLS = {
    "append, keys of another width": (ValueError, "keys must be", lambda s: s.append(torch.zeros(2, K + 1), VALUES)),
    "append, values of another width": (ValueError, "values must be", lambda s: s.append(KEYS, torch.zeros(2, V + 1))),
    "append, fewer values": (ValueError, "values must be", lambda s: s.append(KEYS, VALUES[:1])),
    "append, one dimension": (ValueError, "keys must be", lambda s: s.append(KEYS[0], VALUES[0])),
    "append, no tensor": (TypeError, "keys must be", lambda s: s.append(KEYS.tolist(), VALUES)),
    "append, numpy": (TypeError, "values must be", lambda s: s.append(KEYS, VALUES.numpy())),
    "append, doubles": (TypeError, "keys must be float32, got float64", lambda s: s.append(KEYS.double(), VALUES)),
    "append, integers": (TypeError, "values must be float32, got int64", lambda s: s.append(KEYS, VALUES.long())),
    "append, a sparse tensor": (TypeError, "dense", lambda s: s.append(KEYS, VALUES.to_sparse())),
    "append, a meta tensor": (TypeError, "dense", lambda s: s.append(KEYS, VALUES.to("meta"))),
    "append, NaN keys": (ValueError, "NaN in row 1", lambda s: s.append(torch.cat([KEYS[:1], NAN]), VALUES)),
    "append, metadata of another length": (ValueError, "one dict per slot", lambda s: s.append(KEYS, VALUES, [{}])),
    "write, NaN keys": (ValueError, "NaN", lambda s: s.write([0], keys=NAN)),
    "write, another count": (ValueError, "values must be", lambda s: s.write([0, 1, 2], values=VALUES)),
    "write, slots of floats": (TypeError, "integers", lambda s: s.write([0.0], values=VALUES[:1])),
    "read, a bool mask": (TypeError, "integers", lambda s: s.read(torch.tensor([True]))),
    "read, a text": (TypeError, "integers", lambda s: s.read("0")),
    "read, nothing": (TypeError, "integers", lambda s: s.read(None)),
    "read, ragged": (TypeError, "integers", lambda s: s.read([[0], [1, 2]])),
    "read, beyond 64 bits": (TypeError, "integers", lambda s: s.read([2**70])),
    "gather, far beyond": (IndexError, "slot 9223372036854775807", lambda s: s.gather([2**63 - 1])),
    "delete, nothing": (ValueError, "one of the two", lambda s: s.delete()),
    "delete, both": (ValueError, "one of the two", lambda s: s.delete([0], where=("a = 1", []))),
    "search, another width": (ValueError, "query must be", lambda s: s.topk_search(torch.zeros(1, K + 1), 1)),
    "search, one dimension": (ValueError, "query must be", lambda s: s.topk_search(torch.zeros(K), 1)),
    "search, doubles": (TypeError, "query must be float32", lambda s: s.topk_search(torch.zeros(1, K).double(), 1)),
    "search, no tensor": (TypeError, "query must be", lambda s: s.softmax_read([[0.0] * K])),
    "search, k of 0": (ValueError, "k must be at least 1", lambda s: s.topk_read(torch.zeros(1, K), 0)),
    "search, k of 1.5": (TypeError, "k must be an int", lambda s: s.topk_search(torch.zeros(1, K), 1.5)),
    "search, k of True": (TypeError, "k must be an int", lambda s: s.topk_search(torch.zeros(1, K), True)),
    "search, scale NaN": (ValueError, "scale", lambda s: s.softmax_read(torch.zeros(1, K), scale=float("nan"))),
    "search, scale a text": (TypeError, "scale", lambda s: s.softmax_read(torch.zeros(1, K), scale="1")),
    "search, scale of a shape": (
        ValueError,
        "scale must broadcast",
        lambda s: s.softmax_read(torch.zeros(2, K), scale=torch.ones(3)),
    ),
    "sparse_read, shapes": (
        ValueError,
        "weights and slots must be",
        lambda s: s.sparse_read(torch.zeros(1, 2).long(), torch.ones(1, 3)),
    ),
    "sparse_read, integer weights": (TypeError, "weights", lambda s: s.sparse_read([[0]], torch.ones(1, 1).long())),
    "snapshot, no text": (TypeError, "name must be a text", lambda s: s.snapshot(3)),
    "snapshot, empty": (ValueError, "1 to 200", lambda s: s.snapshot("")),
    "backup, no path": (TypeError, "path must be a path", lambda s: s.backup(3)),
    "export, no path": (TypeError, "path must be a path", lambda s: s.export(None)),
}
OPENS = {
    "mode": (ValueError, "mode must be", {"mode": "a"}),
    "ram_bytes of 0": (ValueError, "ram_bytes must hold two pages", {"ram_bytes": 0}),
    "ram_bytes of a float": (TypeError, "ram_bytes must be an int", {"ram_bytes": 1e9}),
    "device_bytes too few": (ValueError, "device_bytes must hold two pages", {"device": "cpu", "device_bytes": 10}),
    "no such snapshot": (KeyError, "no snapshot", {"snapshot": "x"}),
}
CREATES = {
    "no width": (ValueError, "key_dim must be in", (0, V), {}),
    "a negative width": (ValueError, "value_dim must be in", (K, -1), {}),
    "a width of floats": (TypeError, "key_dim must be an int", (8.0, V), {}),
    "a width of True": (TypeError, "key_dim must be an int", (True, V), {}),
    "an integer dtype": (TypeError, "key_dtype must be", (K, V), {"key_dtype": torch.int64}),
    "a dtype of numpy": (TypeError, "value_dtype must be", (K, V), {"value_dtype": np.float32}),
    "no slots in a page": (ValueError, "page_slots must be in", (K, V), {"page_slots": 0}),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(memory_path, name):
    kind, sentence, call = CALLS[name]
    with new(memory_path / "s", 5) as store:
        with pytest.raises(kind, match=sentence) as caught:
            call(store)
        assert caught.type is kind and name.split(",")[0].replace("search", "") in str(caught.value)
        assert len(store) == 5 and store.generation == 1 and torch.equal(store.read([0])[0], rows(5)[0][:1])


@pytest.mark.parametrize("name", OPENS)
def test_opens(memory_path, name):
    kind, sentence, options = OPENS[name]
    new(memory_path / "s", 5).close()
    with pytest.raises(kind, match=sentence):
        MemoryStore.open(memory_path / "s", **options)
    MemoryStore.open(memory_path / "s", mode="w").close()  # nothing was left locked


@pytest.mark.parametrize("name", CREATES)
def test_creates(memory_path, name):
    kind, sentence, sizes, options = CREATES[name]
    with pytest.raises(kind, match=sentence):
        MemoryStore.create(memory_path / "s", *sizes, **options)
    assert not list(memory_path.iterdir())


def test_numbers_of_every_kind_name_slots(memory_path):
    values = rows(5)[1]
    with new(memory_path / "s", 5) as store:
        for slots in ([1, 2], (1, 2), torch.tensor([1, 2], dtype=torch.int32), np.array([1, 2]), range(1, 3)):
            assert torch.equal(store.gather(slots), values[1:3])
        assert torch.equal(store.gather(np.int64(3)), values[3]) and torch.equal(
            store.gather(torch.tensor(3)), values[3]
        )


def test_rows_of_every_layout_are_taken(memory_path):
    keys, values = rows(6)
    with new(memory_path / "s") as store:
        store.append(keys.T.contiguous().T, values.repeat_interleave(2, 0)[::2].requires_grad_())
        store.append(keys[:1].expand(3, K), torch.nn.Parameter(values[:3]))
        assert torch.equal(store.read(range(6))[0], keys) and torch.equal(store.gather(range(6)), values)
        assert torch.equal(store.read([8])[0], keys[:1])
        inputs = [keys.clone(), values.clone()]
        store.append(*inputs)
        assert torch.equal(inputs[0], keys) and torch.equal(inputs[1], values)
        inputs[0].zero_()
        assert torch.equal(store.read([9])[0], keys[:1])  # a store keeps no view of what it was given


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=lambda d: str(d)[6:])
def test_rows_of_eight_bits_are_made_of_floats(memory_path, dtype):
    store = MemoryStore.create(memory_path / "s", K, V, key_dtype=dtype, value_dtype=dtype)
    keys, values = rows(4)
    keys[1], keys[2], values[0] = 0, keys[2] * 1e-30, values[0] * 1e30
    slots = store.append(keys.double(), values.bfloat16())
    got = store.read(slots)
    assert not got[0][1].any() and got[0].dtype == torch.float32 and torch.isfinite(got[1]).all()
    scale = keys.abs().amax(1, keepdim=True)
    assert ((got[0] - keys).abs() <= scale / 20 + 1e-37).all()
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(ValueError, match="values in .* must be finite"):
            store.append(keys, torch.full((4, V), bad))
    with pytest.raises(TypeError, match="got int8"):
        store.append(keys.to(torch.int8), values)
    store.close()
