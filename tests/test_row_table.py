"""RowTable: numbers by the format and the equation, the same bits on every tier; updates; what is refused."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from table_support import E4M3, E8M0, HOST, KINDS, TIERS, N, V, decoded, new, numbers, opened, picked, some

from memkernels.store import RowTable, StoreError, _table

SHAPES = ((), (0,), (1,), (24,), (3, 0), (33,), (5, 130))


# --- numbers ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_tier_has_the_bits_of_the_file(tmp_path, kind):
    path = tmp_path / "t"
    new(path, kind).close()
    rows = decoded(path, kind)
    dtypes = (torch.float64,) if kind == "float64" else (None, torch.bfloat16, torch.float16)
    for tier in TIERS:
        for dtype in dtypes:
            with opened(path, tier, out_dtype=dtype) as table:
                read = table.out_dtype
                assert read == (dtype or (torch.float32 if "scale" in KINDS[kind] else KINDS[kind]["dtype"]))
                for shape in SHAPES:
                    slots = some(*shape)
                    wanted = picked(rows, slots, read)
                    for got in (table.gather(slots), table.gather(slots.int()), table.prefetch(slots).wait()):
                        assert got.dtype == read and got.shape == (*shape, V) and torch.equal(got, wanted), (
                            tier,
                            shape,
                        )


@pytest.mark.parametrize("tier", TIERS)
def test_out_is_filled_in_its_own_dtype(tmp_path, tier):
    new(tmp_path / "t").close()
    rows, slots = decoded(tmp_path / "t", "e4m3 block:32"), some(9, 5)
    with opened(tmp_path / "t", tier) as table:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            wanted = (picked(rows, slots, torch.float32 if dtype == torch.float64 else dtype)).to(dtype)
            for call in (table.gather, lambda *a: table.prefetch(*a).wait()):
                out = torch.full((9, 5, V), torch.nan, dtype=dtype)
                got = call(slots, out)
                assert got.data_ptr() == out.data_ptr()
                torch.testing.assert_close(out, wanted, rtol=1e-7 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("tier", HOST)
def test_slots_that_are_views_lists_and_arrays(tmp_path, tier):
    new(tmp_path / "t").close()
    rows = decoded(tmp_path / "t", "e4m3 block:32")
    with opened(tmp_path / "t", tier) as table:
        whole = some(6, 8)
        for slots in (whole[:, ::2], whole.T, whole.numpy(), whole.tolist(), whole[0, 0].item()):
            wanted = picked(rows, torch.as_tensor(slots))
            assert torch.equal(table.gather(slots), wanted) and torch.equal(table.prefetch(slots).wait(), wanted)


def test_large_gathers_are_cut_anywhere(tmp_path):
    """Beyond the chunks in which a file is gathered and the pieces that a thread expands."""
    new(tmp_path / "t", "int8 row", rows=5000, width=8).close()
    rows = torch.from_numpy(decoded(tmp_path / "t", "int8 row", 5000, 8)).float()
    slots = some(70_000, rows=5000)
    wanted = torch.where((slots >= 0).unsqueeze(1), rows[slots.clamp(min=0)], 0)
    for tier in TIERS:
        with opened(tmp_path / "t", tier) as table:
            assert torch.equal(table.gather(slots), wanted) and torch.equal(table.prefetch(slots).wait(), wanted), tier


def test_rows_larger_than_a_read(tmp_path):
    new(tmp_path / "t", "float32", rows=5, width=70_000).close()
    with opened(tmp_path / "t", "direct", cache_rows=2) as table:
        slots = torch.tensor([4, 0, -1, 2, 0])
        wanted = torch.where((slots >= 0).unsqueeze(1), numbers(5, 70_000)[slots.clamp(min=0)], 0)
        for _ in range(3):
            assert torch.equal(table.gather(slots), wanted)


@pytest.mark.parametrize("scale_dtype", [torch.float32, E8M0])
@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (E4M3, 448)])
def test_quantisation_by_its_equation(tmp_path, dtype, most, scale_dtype):
    x = numbers(40, 20)
    x[3, :16] = torch.tensor(most * 2.0**-9)  # exactly a power of two as the scale
    x[4, 0] = torch.finfo(torch.float32).max
    with RowTable.create(
        tmp_path / "t", 40, 20, dtype=dtype, scale="block:16", scale_dtype=scale_dtype, values=x
    ) as table:
        got = table.gather(torch.arange(40), torch.empty(40, 20, dtype=torch.float64)).numpy()
    for i in range(40):
        for begin in (0, 16):
            block = x[i, begin : begin + 16].double().numpy()
            largest = float(abs(block).max())
            scale = 1.0
            if scale_dtype == E8M0 and largest:
                scale = 2.0**-127
                while scale * most < largest:
                    scale *= 2
            elif largest:
                scale = float(np.float32(np.float32(largest) / np.float32(most)))
            wrong = abs(got[i, begin : begin + 16] - block)
            step = scale / 2 if dtype == torch.int8 else np.maximum(abs(block) / 16, scale * 2.0**-10)
            assert (wrong <= step * (1 + 1e-5)).all(), (i, begin)
            units = got[i, begin : begin + 16] / scale  # whole numbers of the format, so the scale is this one
            assert dtype != torch.int8 or (units == np.rint(units)).all() or scale_dtype == torch.float32


def test_a_table_of_zeros_takes_no_room(tmp_path):
    path = tmp_path / "t"
    with RowTable.create(path, 1 << 22, 256, dtype=E4M3, scale="block:32", scale_dtype=E8M0, tier="mmap") as table:
        assert not table.gather(torch.tensor([0, 5, (1 << 22) - 1])).any() and len(table) == 1 << 22
    assert path.stat().st_size > 1 << 30 and path.stat().st_blocks * 512 < 1 << 20


def test_values_may_come_in_chunks(tmp_path):
    x = numbers()
    for name, values in (("a", x), ("b", iter(x.split(137)))):
        RowTable.create(tmp_path / name, N, V, dtype=torch.int8, scale="row", values=values).close()
    assert (tmp_path / "a").read_bytes()[4096:] == (tmp_path / "b").read_bytes()[4096:]
    for chunks, got in (([x[:5]], "got 5"), ([x, x[:1]], "got more")):
        with pytest.raises(ValueError, match=f"create: values must be {N} rows, {got}"):
            RowTable.create(tmp_path / "c", N, V, dtype=torch.int8, scale="row", values=chunks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# --- updates ---


@pytest.mark.parametrize("tier", ["ram", "shared"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8 block:16 e8m0", "e4m3 block:32"])
def test_updates_are_seen_at_once_and_written_by_close(tmp_path, kind, tier):
    path = tmp_path / "t"
    new(path, kind).close()
    dtype = torch.float32 if "scale" in KINDS[kind] else KINDS[kind]["dtype"]
    before, x = decoded(path, kind), numbers(6, V, seed=9, dtype=dtype)
    old = path.read_bytes()
    with opened(path, tier) as table:
        table.update(torch.tensor([[5, 7], [5, -1], [699, 7]]), x.view(3, 2, V))
        seen = table.gather(torch.arange(N))
        assert path.read_bytes() == old and table.verify() == []
    RowTable.create(tmp_path / "u", 6, V, values=x, **KINDS[kind]).close()
    stored, after = decoded(tmp_path / "u", kind, 6), decoded(path, kind)
    wanted = before.copy()
    wanted[5], wanted[699], wanted[7] = stored[2], stored[4], stored[5]  # the last of each
    assert (after == wanted).all() and torch.equal(seen, picked(wanted, torch.arange(N), seen.dtype))
    with RowTable.open(path) as table:
        assert table.verify() == []


def test_updates_are_given_up_or_refused_where_the_file_is_another(tmp_path):
    path = tmp_path / "t"
    new(path, "float32").close()
    first, second = RowTable.open(path), RowTable.open(path)
    first.update([0], torch.ones(1, V))
    second.update([1], torch.ones(1, V))
    first.close()
    with pytest.raises(StoreError, match="was written by another process since it was opened"):
        second.close()
    assert torch.equal(second.gather([1]), torch.ones(1, V))  # still open
    second.close(write=False)
    with RowTable.open(path) as table:
        assert torch.equal(table.gather([0, 1]), torch.stack([torch.ones(V), numbers()[1]]))


def test_a_crash_between_update_and_close_leaves_the_old_file(tmp_path):
    path = tmp_path / "t"
    new(path).close()
    old = path.read_bytes()
    if (child := os.fork()) == 0:
        table = RowTable.open(path)
        table.update(torch.arange(50), torch.ones(50, V))
        os._exit(0)
    os.waitpid(child, 0)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["t"]


# --- threads ---


@pytest.mark.parametrize("tier", HOST)
def test_many_threads_gather_and_prefetch(tmp_path, tier):
    new(tmp_path / "t", "e4m3 row e8m0").close()
    rows = torch.from_numpy(decoded(tmp_path / "t", "e4m3 row e8m0")).float()
    options = {"cache_rows": 50} if tier == "direct" else {}
    wrong: list = []
    with opened(tmp_path / "t", tier, threads=5, **options) as table:

        def work(seed: int) -> None:
            try:
                for turn in range(15):
                    slots = some(60, 3, rows=300, seed=100 * seed + turn)
                    wanted = torch.where((slots >= 0).unsqueeze(-1), rows[slots.clamp(min=0)], 0)
                    ticket, dropped = table.prefetch(slots), table.prefetch(slots[:7])
                    del dropped
                    if not (torch.equal(table.gather(slots), wanted) and torch.equal(ticket.wait(), wanted)):
                        wrong.append((seed, turn))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert wrong == []
        stats = table.stats()
        assert stats["rows"] == 6 * 15 * (2 * 180 + 21) and stats["tickets"] == 180
    with pytest.raises(StoreError, match="is closed; open it again"):
        table.gather([0])


# --- what is refused ---


@pytest.mark.parametrize("tier", TIERS)
def test_bad_calls_are_one_sentence_and_change_nothing(tmp_path, tier):
    new(tmp_path / "t", "int8 row").close()
    with opened(tmp_path / "t", tier) as table:
        for call in (table.gather, table.prefetch):
            op = call.__name__
            for slots, kind, what in (
                (torch.tensor([1, N]), IndexError, rf"slots must be in \[-1, {N}\), got {N}"),
                (torch.tensor([-2]), IndexError, rf"slots must be in \[-1, {N}\), got -2"),
                (torch.tensor([1], dtype=torch.int32) - 9, IndexError, rf"slots must be in \[-1, {N}\), got -8"),
                (torch.tensor([1.0]), TypeError, "slots must be int64 or int32, got float32"),
                (torch.tensor([True]), TypeError, "slots must be int64 or int32, got bool"),
                ("x", TypeError, "slots must be integers, got str"),
                (None, TypeError, "slots must be integers, got NoneType"),
                ([[1], [2, 3]], TypeError, "slots must be integers of one shape"),
                (torch.empty(2, dtype=torch.int64, device="meta"), TypeError, "slots must be a dense tensor"),
            ):
                with pytest.raises(kind, match=f"^{op}: {what}"):
                    call(slots)
            out = torch.full((2, V), 7.0)
            for given, kind, what in (
                (out[:, :5], ValueError, rf"out must be \[2, {V}\] on cpu, got \[2, 5\] on cpu"),
                (out.expand(2, 2, V), ValueError, "out must be"),
                (out.int(), TypeError, "out must be float32 or bfloat16 or float16 or float64, got int32"),
                (torch.empty(V, 2).T, ValueError, "out must be contiguous, got strides"),
                (out.tolist(), TypeError, "out must be a tensor"),
            ):
                with pytest.raises(kind, match=f"^{op}: {what}"):
                    call(torch.tensor([1, 2]), given)
            with pytest.raises(IndexError):
                call(torch.tensor([1, N]), out)
            assert (out == 7).all()
        if tier in ("ram", "shared"):
            before = table.gather(torch.arange(N))
            for slots, rows, kind, what in (
                ([N], torch.ones(1, V), IndexError, "slots must be in"),
                ([0, 1], torch.ones(1, V), ValueError, rf"rows must be \[2, {V}\], got \[1, {V}\]"),
                ([0], torch.ones(1, V, dtype=torch.int64), TypeError, "rows must be float32"),
                ([0, 1], torch.tensor([[1.0], [torch.nan]]).expand(2, V), ValueError, "rows in int8 must be finite"),
                ([0], torch.full((1, V), 1e300, dtype=torch.float64), ValueError, "rows in int8 must be finite"),
                ([0], "x", TypeError, "rows must be a dense tensor"),
            ):
                with pytest.raises(kind, match=f"^update: {what}"):
                    table.update(slots, rows)
            assert torch.equal(table.gather(torch.arange(N)), before)
        else:
            with pytest.raises(StoreError, match=f"update: .*tier '{tier}' only reads; open it with tier='ram'"):
                table.update([0], torch.ones(1, V))


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        (
            {"dtype": torch.int8},
            ValueError,
            "scale must be 'row' or 'block:B' with B in 1..40 beside rows of int8, got No",
        ),
        ({"dtype": torch.int8, "scale": "block:41"}, ValueError, "got 'block:41'"),
        ({"dtype": torch.int8, "scale": "block:0"}, ValueError, "got 'block:0'"),
        ({"dtype": torch.int8, "scale": 32}, ValueError, "got 32"),
        ({"dtype": torch.float32, "scale": "row"}, ValueError, "scale must be None beside rows of float32, got 'row'"),
        ({"dtype": torch.int16}, TypeError, "dtype must be float32 or .*, got int16"),
        ({"dtype": "int8"}, TypeError, "got str"),
        ({"dtype": E4M3, "scale": "row", "scale_dtype": torch.float16}, TypeError, "scale_dtype must be float32 or"),
        ({"dtype": torch.float32, "tier": "disk"}, ValueError, "tier must be 'ram'"),
        ({"dtype": torch.float32, "values": torch.ones(N, V + 1)}, ValueError, "rows must be"),
    ],
)
def test_bad_tables_are_refused(tmp_path, options, kind, what):
    with pytest.raises(kind, match=what):
        RowTable.create(tmp_path / "t", N, V, **options)


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"cache_rows": 5}, ValueError, "cache_rows must be 0 beside tier='ram', got 5"),
        ({"tier": "direct", "cache_rows": -1}, ValueError, "cache_rows must be in 0.."),
        ({"threads": 0}, ValueError, "threads must be in 1..4096, got 0"),
        ({"threads": 1.5}, TypeError, "threads must be an int, got float"),
        ({"tickets": 0}, ValueError, "tickets must be in"),
        ({"device": "cpu"}, ValueError, "device must be None beside tier='ram', got 'cpu'"),
        ({"tier": "device", "device": "meta"}, ValueError, "device must be a CUDA device"),
        (
            {"out_dtype": torch.float64},
            TypeError,
            "out_dtype must be float32 or .* beside rows of float32, got float64",
        ),
        ({"out_dtype": "float32"}, TypeError, "got 'float32'"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, kind, what):
    new(tmp_path / "t", "float32").close()
    with pytest.raises(kind, match=what):
        RowTable.open(tmp_path / "t", **options)


def test_places_that_are_refused(tmp_path):
    new(tmp_path / "t", "float32").close()
    with pytest.raises(FileExistsError, match="there is something already"):
        new(tmp_path / "t", "float32")
    with pytest.raises(FileNotFoundError, match="there is no table; RowTable.create makes one"):
        RowTable.open(tmp_path / "u")
    with pytest.raises(StoreError, match="the system refused to"):
        RowTable.open(tmp_path)
    with pytest.raises(TypeError, match="path must be a path, got int"):
        RowTable.open(5)


def test_a_table_is_used_where_it_was_opened(tmp_path):
    new(tmp_path / "t").close()
    with opened(tmp_path / "t", "direct") as table:
        with pytest.raises(TypeError, match="is not pickled"):
            table.__reduce__()
        if (child := os.fork()) == 0:
            try:
                table.gather([0])
            except StoreError as error:
                table.close()
                os._exit(0 if "before a fork; open it in this one" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert table.gather([0]).shape == (1, V)


def test_nothing_is_captured_by_accident(tmp_path, monkeypatch):
    with new(tmp_path / "t") as table:
        monkeypatch.setattr(_table, "_capturing", lambda: True)
        for call in (table.gather, table.prefetch, lambda slots: table.update(slots, torch.ones(1, V))):
            with pytest.raises(StoreError, match="a CUDA graph is being captured"):
                call([0])
        monkeypatch.undo()


@pytest.mark.parametrize("tier", ["ram", "shared"])
def test_small_gathers_allocate_nothing(tmp_path, tier):
    from torch.profiler import ProfilerActivity, profile

    new(tmp_path / "t").close()
    with opened(tmp_path / "t", tier) as table:
        slots, out = some(24), torch.empty(24, V)
        table.gather(slots, out)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            for _ in range(10):
                table.gather(slots, out)
        assert sum(abs(event.cpu_memory_usage) for event in seen.events()) == 0
