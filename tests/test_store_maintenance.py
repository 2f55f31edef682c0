"""Snapshots, backups, compaction, export and load, the approximate index, and the command line."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from store_support import PAGE, K, V, abandon, best, new, rows, scores

import memkernels.__main__ as command
from memkernels.store import MemoryStore, StoreDamaged, StoreError, _export

EIGHT = [torch.int8, torch.float8_e4m3fn]


def content(store: MemoryStore) -> dict:
    """Everything that a caller can read."""
    slots = torch.tensor([i for i in range(store.capacity) if alive(store, i)], dtype=torch.int64)
    keys, values = store.read(slots)
    return {"slots": slots.tolist(), "keys": keys.tolist(), "values": values.tolist(), "meta": store.meta(slots)}


def alive(store: MemoryStore, slot: int) -> bool:
    try:
        store.read([slot])
        return True
    except KeyError:
        return False


def filled(path, **options) -> MemoryStore:
    store = MemoryStore.create(path, K, V, page_slots=PAGE, **options)
    keys, values = rows(70)
    kinds = [options.get(name, torch.float32) for name in ("key_dtype", "value_dtype")]
    store.append(
        *(x if kind in EIGHT else x.to(kind) for x, kind in zip((keys, values), kinds)), [{"i": i} for i in range(70)]
    )
    store.delete([3, 40, *range(48, 64), 69])
    return store


def test_a_snapshot_stays_as_it_was(memory_path):
    store = filled(memory_path / "s")
    before = content(store)
    assert store.snapshot("one") == "one" and store.snapshots() == ["one"]
    with pytest.raises(ValueError, match="there is one named 'one'"):
        store.snapshot("one")
    store.write([0, 1], *rows(2, seed=1), [{"new": 1}, {}])
    store.delete([2])
    store.compact()
    store.append(*rows(40, seed=2))
    after = content(store)
    store.snapshot("two")
    for name, wanted in (("one", before), ("two", after)):
        with MemoryStore.open(memory_path / "s", snapshot=name) as old:
            assert content(old) == wanted and len(old) == len(wanted["slots"])
            query = torch.randn(3, K)
            keys, slots = torch.tensor(wanted["keys"]), torch.tensor(wanted["slots"])
            assert torch.equal(old.topk_search(query, 5)[1], best(scores(query, keys), slots, 5)[1])
            found = old.topk_search(query[:1], 9, where=("i in (?, ?)", [0, 10]))[1]
            assert sorted(i for i in found.tolist()[0] if i >= 0) == ([0, 10] if name == "one" else [10])
    assert store.verify() == []
    store.drop_snapshot("one")
    with pytest.raises(KeyError, match="no snapshot 'one'"):
        store.drop_snapshot("one")
    with pytest.raises(KeyError, match="no snapshot 'one'"):
        MemoryStore.open(memory_path / "s", snapshot="one")
    with pytest.raises(ValueError, match="mode='r'"):
        MemoryStore.open(memory_path / "s", mode="w", snapshot="two")
    store.close()
    with MemoryStore.open(memory_path / "s", mode="w") as store:
        assert store.snapshots() == ["two"] and content(store) == after
        for step in range(5):  # extents of a snapshot are not used again, in a process that did not make it either
            store.write(torch.tensor(after["slots"]), *rows(len(after["slots"]), seed=step))
            store._engine.fold_all()
        with MemoryStore.open(memory_path / "s", snapshot="two") as old:
            assert content(old) == after
        assert store.verify() == []


def test_a_backup_is_a_store_of_its_own(memory_path):
    store = filled(memory_path / "s")
    store.snapshot("one")
    store.write([0], values=torch.ones(1, V))
    wanted = content(store)
    store.backup(memory_path / "copy")
    store.write([0], values=torch.zeros(1, V))
    with pytest.raises(FileExistsError):
        store.backup(memory_path / "copy")
    with MemoryStore.open(memory_path / "copy", mode="w") as copy:
        assert content(copy) == wanted and copy.snapshots() == ["one"] and copy.verify() == []
        assert copy.append(*rows(1)).tolist() == [70]
    with MemoryStore.open(memory_path / "s") as reader:
        reader.backup(memory_path / "another")
    store.close()
    data = bytearray((memory_path / "s" / "keys.pages").read_bytes())
    data[10] ^= 1
    (memory_path / "s" / "keys.pages").write_bytes(data)
    with MemoryStore.open(memory_path / "s") as reader, pytest.raises(StoreDamaged, match="backup: keys.pages"):
        reader.backup(memory_path / "third")
    assert not (memory_path / "third").exists()
    assert sorted(p.name for p in memory_path.iterdir()) == ["another", "copy", "s"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, *EIGHT], ids=lambda d: str(d)[6:])
def test_load_gives_what_export_wrote(memory_path, dtype):
    file = memory_path / "x.safetensors"
    with filled(memory_path / "s", key_dtype=dtype, value_dtype=dtype) as store:
        store.export(file)
        wanted, capacity = content(store), store.capacity
    with MemoryStore.load(memory_path / "loaded", file) as store:
        assert content(store) == wanted and store.capacity == capacity and store.verify() == []
        assert store.append(*(x.to(dtype) if dtype not in EIGHT else x for x in rows(1))).tolist() == [capacity]
    with pytest.raises(FileExistsError):
        MemoryStore.load(memory_path / "loaded", file)


def test_an_export_is_a_file_of_the_safetensors_format(memory_path):
    """Read by hand, as the format's description says."""
    file = memory_path / "x.safetensors"
    with filled(memory_path / "s") as store:
        store.export(file)
        wanted = content(store)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "memkernels.store 1", "page_slots": str(PAGE), "capacity": "70"}

    def tensor(name: str, dtype: torch.dtype, short: str) -> torch.Tensor:
        about = header[name]
        begin, end = about["data_offsets"]
        assert about["dtype"] == short
        return torch.frombuffer(bytearray(data[8 + length + begin : 8 + length + end]), dtype=dtype).view(
            about["shape"]
        )

    assert tensor("keys", torch.float32, "F32").tolist() == wanted["keys"]
    assert tensor("values", torch.float32, "F32").tolist() == wanted["values"]
    assert tensor("slots", torch.int64, "I64").tolist() == wanted["slots"]
    lines = bytes(tensor("meta", torch.uint8, "U8").tolist()).splitlines()
    assert [json.loads(line) for line in lines] == wanted["meta"]
    ends = sorted(tuple(one["data_offsets"]) for one in header.values())
    assert ends[0][0] == 0 and ends[-1][1] == len(data) - 8 - length
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:])) and (8 + length) % 8 == 0


def edited(data: bytes, change) -> bytes:
    """An export whose header ``change`` edits."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


HEADERS = {
    "keys larger than the file": lambda h: h["keys"].update(shape=[1 << 40, K]),
    "keys beyond the file": lambda h: h["keys"].update(data_offsets=[1 << 40, (1 << 40) + 4 * K * 51]),
    "a negative size": lambda h: h["keys"].update(shape=[-51, -K]),
    "no values": lambda h: h.pop("values"),
    "an unknown dtype": lambda h: h["keys"].update(dtype="Q8"),
    "a shape that is no list": lambda h: h["keys"].update(shape=7),
    "a huge capacity": lambda h: h["__metadata__"].update(capacity=str(1 << 60)),
    "a capacity below the slots": lambda h: h["__metadata__"].update(capacity="5"),
    "no page_slots": lambda h: h["__metadata__"].pop("page_slots"),
    "page_slots of 0": lambda h: h["__metadata__"].update(page_slots="0"),
    "another format": lambda h: h["__metadata__"].update(format="other"),
    "slots of another length": lambda h: h["slots"].update(shape=[50], data_offsets=[0, 400]),
}


@pytest.mark.parametrize(
    "name", [*HEADERS, "cut", "a huge header", "empty", "noise", "NaN keys", "falling slots", "bad meta"]
)
def test_load_refuses_what_is_no_export(memory_path, name):
    file, bad = memory_path / "x", memory_path / "bad"
    with filled(memory_path / "s") as store:
        store.export(file)
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    starts = {
        n: 8 + length + one["data_offsets"][0] for n, one in json.loads(data[8 : 8 + length]).items() if n[0] != "_"
    }
    if name in HEADERS:
        data = edited(bytes(data), HEADERS[name])
    elif name == "cut":
        data = data[:-20]
    elif name == "a huge header":
        data[:8] = struct.pack("<Q", 1 << 60)
    elif name == "empty":
        data = b""
    elif name == "noise":
        data = bytes(range(256)) * 10
    elif name == "NaN keys":
        data[starts["keys"] : starts["keys"] + 4] = struct.pack("<f", float("nan"))
    elif name == "falling slots":
        data[starts["slots"] : starts["slots"] + 8] = struct.pack("<q", 60)
    else:
        data[starts["meta"] + 3] = 0
    bad.write_bytes(data)
    with pytest.raises((StoreError, ValueError)):
        MemoryStore.load(memory_path / "loaded", bad)
    assert not (memory_path / "loaded").exists() and not [p for p in memory_path.iterdir() if p.name[0] == "."]


def test_load_takes_many_pieces(memory_path, monkeypatch):
    with filled(memory_path / "s") as store:
        store.export(memory_path / "x")
        wanted = content(store)
    monkeypatch.setattr(_export, "CHUNK", 1000)
    with MemoryStore.load(memory_path / "loaded", memory_path / "x") as store:
        assert content(store) == wanted


def test_compaction_shrinks_the_files(memory_path):
    store = new(memory_path / "s", 20 * PAGE)
    for step in range(4):
        store.write(torch.arange(20 * PAGE), *rows(20 * PAGE, seed=step))
        store._engine.fold_all()
    store.delete(list(range(PAGE, 15 * PAGE)))
    before = {name: (memory_path / "s" / name).stat().st_size for name in ("keys.pages", "values.pages")}
    wanted = content(store)
    assert store.compact() > 0
    for name, size in before.items():
        assert (memory_path / "s" / name).stat().st_size == 6 * 4096 < size
    assert content(store) == wanted and store.verify() == []
    abandon(store)
    with MemoryStore.open(memory_path / "s") as store:
        assert content(store) == wanted


# --- the approximate index ---


def clustered(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, K, generator=torch.Generator().manual_seed(9))
    picked = centres[torch.randint(0, 20, (count,), generator=generator)]
    return torch.nn.functional.normalize(picked + 0.3 * torch.randn(count, K, generator=generator), dim=1)


def test_the_index_proposes_and_present_keys_decide(memory_path):
    pytest.importorskip("faiss")
    keys = clustered(2000, 0)
    store = new(memory_path / "s", page_slots=128)
    store.append(keys, torch.zeros(2000, V), [{"i": i} for i in range(2000)])
    with pytest.raises(StoreError, match="build_index makes one"):
        store.topk_search(keys[:1], 1, index="approximate")
    about = store.build_index("IVF20,Flat")
    assert about["recall"] > 0.9 and about["slots"] == 2000
    query = clustered(30, 1)

    def recall(s: MemoryStore) -> float:
        exact, found = s.topk_search(query, 10), s.topk_search(query, 10, index="approximate")
        assert bool((found[0].diff(dim=1) <= 0).all())
        return float((exact[1].unsqueeze(2) == found[1].unsqueeze(1)).any(2).float().mean())

    assert recall(store) > 0.95
    changed = torch.randperm(2000)[:100]
    store.write(changed, keys=clustered(100, 2))
    added = store.append(query[:5] * 3, torch.zeros(5, V))
    store.delete(changed[:10])
    found = store.topk_search(query[:5], 3, index="approximate")[1]
    assert torch.equal(found[:, 0], added) and recall(store) > 0.95  # a slot just written is always found
    assert not torch.isin(store.topk_search(query, 50, index="approximate")[1], changed[:10]).any()
    few = store.topk_search(query, 5, index="approximate", where=("i >= ? and i < 1003", [1000]))[1]
    wanted = store.topk_search(query, 5, where=("i >= ? and i < 1003", [1000]))[1]
    assert torch.equal(few, wanted)
    read = store.topk_read(query, 4, index="approximate", return_slots=True)
    assert read[1].shape == (30, 4)
    store.close()
    with MemoryStore.open(memory_path / "s") as reader:  # neither the index nor what changed since is lost
        assert recall(reader) > 0.95
        assert torch.equal(reader.topk_search(query[:5], 3, index="approximate")[1][:, 0], added)
    with MemoryStore.open(memory_path / "s", mode="w") as store:
        first = store._engine.maps["changed"].count
        some = torch.tensor([i for i in range(600) if i not in changed[:10].tolist()][:500])
        store.write(some, keys=clustered(500, 3))
        assert store._engine.maps["changed"].count >= 500 > first
        assert recall(store) > 0.95 and store._engine.maps["changed"].count == 0  # built again past a fifth
        (file,) = (memory_path / "s").glob("index-*.faiss")
        data = bytearray(file.read_bytes())
        data[200] ^= 1
        file.write_bytes(data)
        (fault,) = store.verify()
        assert fault.file == file.name
    with MemoryStore.open(memory_path / "s", mode="w") as store:
        with pytest.raises(StoreDamaged, match="build_index makes it again"):
            store.topk_search(query, 1, index="approximate")
        store.build_index("Flat")
        assert recall(store) == 1.0
        store.drop_index()
        assert not list((memory_path / "s").glob("*.faiss")) and store.verify() == []


@pytest.mark.parametrize("searched", [False, True])
def test_what_a_transaction_changed_and_took_back_is_found(memory_path, searched):
    """Its slots no longer count as those of the index, so they must be searched beside it; filters and later writes
    see the same."""
    pytest.importorskip("faiss")
    keys = clustered(500, 0)
    with new(memory_path / "s", page_slots=128) as store:
        store.append(keys, torch.zeros(500, V))
        store.build_index("IVF5,Flat")
        query, slots = keys[:20] * 2, torch.arange(20)
        store.write([30], keys=keys[30:31])
        store.topk_search(query, 1, index="approximate")  # what it makes must not outlive the transaction
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.write(slots, keys=clustered(20, 3))
            if searched:
                store.topk_search(query, 1, index="approximate")
            raise ZeroDivisionError
        for _ in range(2):
            found = store.topk_search(query, 2, index="approximate")
            assert torch.equal(found[1], store.topk_search(query, 2)[1])
            store.write([31], keys=keys[31:32])
        store.delete([3])
        assert not (store.topk_search(query, 2, index="approximate")[1] == 3).any()


def test_an_index_that_finds_little_says_so(memory_path):
    pytest.importorskip("faiss")
    with new(memory_path / "s", 3000) as store:
        with pytest.warns(UserWarning, match="the exact search may be the better one"):
            store.build_index("IVF256,PQ2x4")
        for wrong in ("no index", "IVF100000,Flat"):
            with pytest.raises(ValueError, match="build_index"):
                store.build_index(wrong)
        with pytest.raises(ValueError, match="scale must be positive"):
            store.topk_search(torch.randn(1, K), 1, scale=-1.0, index="approximate")
        with pytest.raises(ValueError, match="index must be None or 'approximate'"):
            store.topk_search(torch.randn(1, K), 1, index="exact")


# --- the command line ---


def test_the_command_line(memory_path, capsys):
    path = str(memory_path / "s")
    filled(memory_path / "s").close()

    def run(*arguments: str) -> tuple[int, str]:
        status = command.main(["store", *arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, text = run("info", path)
    assert status == 0 and "slots        51" in text and "crc32c" in text
    assert json.loads(run("info", "--json", path)[1])["keys"] == f"{K} float32"
    assert run("verify", path) == (0, "sound\n")
    status, text = run("compact", path)
    assert status == 0 and text.endswith("bytes given back\n")
    status, text = run("export", path)
    assert status == 0 and text == f"{path}.safetensors\n"
    with MemoryStore.load(memory_path / "again", f"{path}.safetensors") as store:
        assert len(store) == 51
    data = bytearray((memory_path / "s" / "keys.pages").read_bytes())
    data[5] ^= 1
    (memory_path / "s" / "keys.pages").write_bytes(data)
    status, text = run("verify", path)
    assert status == 1 and "keys.pages: page 0" in text and "1 fault" in text
    assert run("info", str(memory_path / "none"))[0] == 1
