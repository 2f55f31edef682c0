"""The file of a RowTable: damage is found wherever it is; safetensors files become tables; writes that fail."""

from __future__ import annotations

import builtins
import errno
import os
import random
import struct

import pytest
import torch
from table_support import E4M3, E8M0, KINDS, TIERS, N, V, decoded, new, numbers, opened, picked, some

from memkernels.store import RowTable, StoreDamaged, StoreFormat, StoreFull, _io, _table_file, _table_open
from memkernels.store._crc import crc32c
from memkernels.store._table_layout import Layout

KIND = "e4m3 block:32"
LAYOUT = Layout(N, V, E4M3, "block:32")


def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(_table_file, "BLOCK", 4096)
    monkeypatch.setattr("memkernels.store._table_layout.BLOCK", 4096)


# --- damage ---


def test_a_file_that_ends_anywhere_too_early_is_refused(tmp_path):
    path = tmp_path / "t"
    new(path, KIND).close()
    whole = path.read_bytes()
    assert len(whole) == LAYOUT.file_bytes
    ends = {0, 1, 8, 4095, 4096, *LAYOUT.offsets, LAYOUT.sums[0], len(whole) - 1, len(whole) - 4096}
    for end in ends | {at - 1 for at in ends if at} | {at + 1 for at in ends if at + 1 < len(whole)}:
        path.write_bytes(whole[:end])
        for tier in TIERS:
            with pytest.raises(
                StoreDamaged, match=r"ends after \d+ bytes, within the header|has \d+ bytes, and its table"
            ):
                opened(path, tier)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StoreDamaged, match="has"):
        RowTable.open(path)


@pytest.mark.parametrize("kind", [KIND, "bfloat16"])
def test_any_flipped_bit_is_found(tmp_path, monkeypatch, kind):
    small_blocks(monkeypatch)
    path = tmp_path / "t"
    new(path, kind).close()
    whole, draw = path.read_bytes(), random.Random(0)
    layout = Layout(N, V, **KINDS[kind])
    with RowTable.open(path, tier="mmap") as table:
        assert table.verify() == []
        for turn in range(400):
            at = draw.randrange(4096) if turn % 4 == 0 else draw.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[at] ^= 1 << draw.randrange(8)
            with open(path, "r+b") as file:  # the same file, so that the mapping sees it
                file.write(flipped)
            faults = table.verify()
            assert len(faults) == 1, at
            if 4096 <= at < layout.sums[0]:
                assert faults[0].page == (at - 4096) // 4096 and "crc32c is" in faults[0].why
                with pytest.raises(StoreDamaged, match=rf"block {faults[0].page}: crc32c is"):
                    RowTable.open(path)
            else:
                assert faults[0].page is None
                with pytest.raises((StoreDamaged, StoreFormat)):
                    RowTable.open(path, tier="direct")


def resealed(page: bytearray) -> bytes:
    struct.pack_into("<I", page, 4092, crc32c(page[:4092]))
    return bytes(page)


def test_headers_that_are_no_header(tmp_path):
    path = tmp_path / "t"
    new(path, KIND).close()
    whole = path.read_bytes()

    def refused(kind, what: str, change) -> None:
        page = bytearray(whole[:4096])
        change(page)
        path.write_bytes(resealed(page) + whole[4096:])
        with pytest.raises(kind, match=what):
            RowTable.open(path)

    refused(StoreFormat, "is no table of rows", lambda page: page.__setitem__(slice(0, 4), b"mkst"))
    newer = lambda page: struct.pack_into("<I", page, 8, 2)  # noqa: E731
    refused(StoreFormat, "has layout 2, this memkernels reads layout 1; use a newer one", newer)
    refused(StoreDamaged, "and its table", lambda page: struct.pack_into("<Q", page, 44, V + 1))
    refused(StoreDamaged, "the header describes no table", lambda page: struct.pack_into("<Q", page, 44, 1 << 50))
    refused(StoreDamaged, "the header describes no table", lambda page: struct.pack_into("<16s", page, 52, b"int3"))
    refused(StoreDamaged, "the header describes no table", lambda page: struct.pack_into("<16s", page, 68, b"none"))


def test_a_table_of_zeros_has_the_checksums_of_zeros(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    with RowTable.create(tmp_path / "a", 3000, V, dtype=torch.int8, scale="row") as table:
        assert table.verify() == [] and not table.gather(torch.arange(3000)).any()
    with RowTable.create(
        tmp_path / "b", 3000, V, dtype=torch.bfloat16, values=torch.zeros(3000, V).bfloat16()
    ) as table:
        assert table.verify() == []
    RowTable.create(tmp_path / "c", 3000, V, dtype=torch.bfloat16).close()
    assert (tmp_path / "b").read_bytes()[4096:] == (tmp_path / "c").read_bytes()[4096:]


@pytest.mark.parametrize("rows", [0, 1])
def test_the_smallest_tables(tmp_path, rows):
    for kind in KINDS:
        path = tmp_path / f"{kind}{rows}"
        new(path, kind, rows=rows).close() if rows else RowTable.create(path, 0, V, **KINDS[kind]).close()
        for tier in TIERS:
            with opened(path, tier) as table:
                assert table.verify() == [] and table.gather([-1] * 40).shape == (40, V)
                with pytest.raises(IndexError):
                    table.gather([rows])


# --- writes that fail ---


def test_a_full_disk_while_it_closes_leaves_the_table_open(tmp_path, monkeypatch):
    path = tmp_path / "t"
    table = new(path, "float32")
    old = path.read_bytes()
    table.update([3], torch.ones(1, V))
    write = _io.os.pwrite

    def full(fd, data, offset):
        if offset > 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(_io.os, "pwrite", full)
    with pytest.raises(StoreFull, match="no room to write"):
        table.close()
    monkeypatch.undo()
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["t"]
    assert torch.equal(table.gather([3]), torch.ones(1, V))
    table.close()
    table.close()
    with RowTable.open(path) as again:
        assert torch.equal(again.gather([3]), torch.ones(1, V)) and again.verify() == []


def test_a_file_system_without_direct_reads_is_told(tmp_path, monkeypatch):
    new(tmp_path / "t").close()
    real = os.open

    def refuse(path, flags, *more, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **options)

    monkeypatch.setattr(_table_open.os, "open", refuse)
    with pytest.raises(StoreFormat, match=r"refuses O_DIRECT; use tier='mmap' or 'ram' \(Invalid argument\)"):
        RowTable.open(tmp_path / "t", tier="direct")


# --- safetensors ---


@pytest.fixture
def model(tmp_path):
    """Three files, as models ship them: 8-bit rows with scales of blocks, cut by rows; a scale in another file."""
    save = pytest.importorskip("safetensors.torch").save_file
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 64, generator=generator).to(E4M3)
    scales = torch.randint(110, 140, (90, 2), dtype=torch.uint8, generator=generator).view(E8M0)
    save({"a.weight": rows[:40], "b.scale": scales[40:60], "x": torch.ones(3)}, tmp_path / "1.safetensors")
    save({"b.weight": rows[40:60], "a.scale": scales[:40].clone()}, tmp_path / "2.safetensors")
    save(
        {
            "c.weight": rows[60:].clone(),
            "c.weight_scale_inv": scales[60:].clone(),
            "half": torch.randn(5, 8).half(),
            "one": rows[:5].clone(),
            "one_scale": torch.tensor([0.5], dtype=torch.bfloat16),
            "odd": torch.ones(4, 48, dtype=torch.int8),
            "odd.scale": torch.arange(8.0).view(4, 2),
            "bare.weight": rows[:5].clone(),
            "long.weight": rows[:5].clone(),
            "long.scale": scales[:6].clone(),
        },
        tmp_path / "3.safetensors",
    )
    return [tmp_path / f"{i}.safetensors" for i in (1, 2, 3)], rows, scales


@pytest.mark.parametrize("tier", [None, *TIERS])
def test_tables_out_of_safetensors(model, tmp_path, monkeypatch, tier):
    files, rows, scales = model
    monkeypatch.setattr("memkernels.store._table_safetensors.PIECE", 64 * 7)
    options = {} if tier is None else {"tier": tier} | ({"device": "cpu"} if tier in ("pinned", "device") else {})
    names = ["a.weight", ("b.weight", "b.scale"), "c.weight"]
    wanted = rows.double() * scales.double().repeat_interleave(32, 1)
    with RowTable.from_safetensors(files, names, None if tier is None else tmp_path / "t", **options) as table:
        t = table.layout
        assert (t.rows, t.width, t.scale, t.scale_dtype) == (90, 64, "block:32", E8M0) and table.verify() == []
        slots = some(50, 3, rows=90)
        expected = torch.where((slots >= 0).unsqueeze(-1), wanted[slots.clamp(min=0)], 0)
        assert torch.equal(table.gather(slots).double(), expected)
        if tier is None:
            assert table.path is None
            table.update([2], torch.zeros(1, 64))
            assert not table.gather([2]).any()


def test_scales_of_other_shapes(model):
    files, rows, _ = model
    with RowTable.from_safetensors(files, "one") as table:
        assert table.layout.scale == "row" and torch.equal(table.gather(range(5)), rows[:5].float() * 0.5)
    with RowTable.from_safetensors(str(files[2]), "half") as table:
        assert table.layout.dtype == torch.float16 and table.layout.scale is None
    for block, wanted in ((24, [3, 3]), (32, [3, 3]), (47, [3, 3])):
        with RowTable.from_safetensors(files, "odd", block=block) as table:
            assert table.layout.scale == f"block:{block}"
            got = table.gather(torch.tensor(1))
            assert got[:block].tolist() == [2.0] * block and got[block:].tolist() == [wanted[1]] * (48 - block)


@pytest.mark.parametrize(
    ("names", "options", "kind", "what"),
    [
        ("none", {}, KeyError, "none is in none of the files"),
        ("x", {}, ValueError, r"x must be \[N, V\], got \[3\]"),
        ("bare.weight", {}, ValueError, "scale of bare.weight is missing, it must be one of bare.scale, "),
        ("long.weight", {}, ValueError, r"long.scale must be \[5\], \[5, 1\] or \[5, blocks\] beside long.weight"),
        (["a.weight", "half"], {}, ValueError, "half must have rows and scales like those of a.weight"),
        ([("half", "x")], {}, ValueError, "half has float16, which has no scale"),
        ("odd", {}, ValueError, "block must be one of 24..47 beside 2 scales for 48 columns of odd.scale, got None"),
        ("odd", {"block": 16}, ValueError, "block must be of another number of columns"),
        ([], {}, ValueError, "names must name at least one tensor"),
        (7, {}, TypeError, "names must be a name or a list of them, got int"),
        ([7], {}, TypeError, "names must be texts or pairs of them, got int"),
        ("half", {"tier": "mmap"}, ValueError, "tier must be 'ram' where path is None, got 'mmap'"),
    ],
)
def test_safetensors_that_are_no_table(model, names, options, kind, what):
    with pytest.raises(kind, match=f"^['\"]?from_safetensors: {what}"):
        RowTable.from_safetensors(model[0], names, **options)


def test_files_that_are_no_safetensors(model, tmp_path, monkeypatch):
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    for files, kind, what in (
        ([], ValueError, "files must name at least one file"),
        (tmp_path / "none", FileNotFoundError, "there is no file"),
        (tmp_path / "bad.safetensors", ValueError, "is no safetensors file"),
        ([model[0][0], model[0][0]], ValueError, "is in two of the files"),
    ):
        with pytest.raises(kind, match=f"^from_safetensors: .*{what}"):
            RowTable.from_safetensors(files, "half")
    real = builtins.__import__

    def without(name, *more):
        if name == "safetensors":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs the safetensors package \(pip install safetensors\)"):
        RowTable.from_safetensors(model[0], "half")


def test_a_copy_of_the_rows_is_the_rows(tmp_path):
    """decoded() of this suite reads what numbers() wrote."""
    new(tmp_path / "t", "float32").close()
    assert torch.equal(picked(decoded(tmp_path / "t", "float32"), torch.arange(N)), numbers())
