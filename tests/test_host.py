"""memkernels._host: what it says about the processor is what the system says, and its ceilings are plausible."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memkernels import _host as host
from memkernels import _native


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def test_features_are_those_of_the_system():
    flags = cpu_flags()
    if not flags:
        pytest.skip("the system lists no processor flags")
    features = host.features()
    assert features["sse2"]
    assert {name for name, usable in features.items() if usable} == set(features) & flags


def test_names_sizes_and_cores():
    assert host.processor()
    assert host.cores() == len(os.sched_getaffinity(0))
    caches = host.caches()
    assert set(caches) == {"l1d", "l2", "l3", "line"}
    assert all(size >= 0 for size in caches.values())
    if caches["l1d"] and caches["l2"]:
        assert 4 << 10 <= caches["l1d"] <= caches["l2"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_multiply_add_peak(dtype):
    peak = host.multiply_add_peak(dtype, threads=1, seconds=0.05)
    assert 1e8 < peak < 1e12  # one core: from an emulated one to 512-bit units at several GHz


def test_wider_numbers_have_a_lower_peak():
    assert host.multiply_add_peak("float64", 1, 0.2) < 0.75 * host.multiply_add_peak("float32", 1, 0.2)


def test_bfloat16_peak_follows_the_feature():
    peak = host.multiply_add_peak("bfloat16", threads=1, seconds=0.05)
    assert (peak > 0) == host.features().get("avx512_bf16", False)
    assert host.multiply_add_peak("bfloat16", threads=1, seconds=0.02, isa="avx512") == 0


def test_narrower_instruction_sets_have_a_lower_peak():
    features = host.features()
    if not (features.get("avx512f") and features.get("avx2") and features.get("fma")):
        pytest.skip("one instruction set only")
    peaks = [host.multiply_add_peak("float32", 1, 0.2, isa) for isa in ("baseline", "avx2", "avx512")]
    assert peaks[0] < 0.75 * peaks[1] < peaks[1] < 1.1 * peaks[2]  # a single 512-bit port is no faster than two of 256


def test_read_bandwidth():
    assert 1e8 < host.read_bandwidth(32 << 20, threads=1, seconds=0.05) < 1e12
    assert host.read_bandwidth(4096, threads=2, seconds=0.01) > 0


def test_more_threads_than_cores():
    assert host.multiply_add_peak("float32", threads=host.cores() + 1, seconds=0.02) > 0


def aligned(size: int) -> np.ndarray:
    """uint8 [size] that begins a page."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


@pytest.mark.parametrize("threads, ahead", [(1, 0), (2, 16), (3, 1), (5, 100)])
@pytest.mark.parametrize("row_bytes, count", [(64, 1), (256, 37), (320, 2)])
def test_random_rows_writes_each_piece_twice(row_bytes, count, threads, ahead):
    random = np.random.default_rng(row_bytes + count)
    table = random.integers(256, size=(50, row_bytes), dtype=np.uint8)
    rows, out = random.integers(50, size=count), aligned(count * 2 * row_bytes)
    host.random_rows(table, row_bytes, rows, out, threads, ahead)
    pieces = [row[b : b + 64] for row in table[rows] for b in range(0, row_bytes, 64) for _ in range(2)]
    assert out.tobytes() == b"".join(piece.tobytes() for piece in pieces)


@pytest.fixture
def blocks(tmp_path):
    """A file of 32 blocks, and their numbers."""
    path = tmp_path / "blocks"
    numbers = np.random.default_rng(0).integers(256, size=(32, 4096), dtype=np.uint8)
    path.write_bytes(numbers.tobytes())
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT here ({error})")
    return path, numbers


@pytest.mark.parametrize("threads", [1, 4])
def test_direct_reads_reads_what_it_is_told(blocks, threads):
    path, numbers = blocks
    at, length = np.array([3, 31, 0, 9, 3]), np.array([1, 1, 2, 4, 2])
    seconds, size, mark = host.direct_reads(str(path), 4096 * at, 4096 * length, threads)
    first = [int.from_bytes(numbers[i, :8].tobytes(), sys.byteorder) for i in at]
    assert size == 10 * 4096 and seconds > 0
    assert mark == first[0] ^ first[1] ^ first[2] ^ first[3] ^ first[4]


def test_direct_reads_tells_where_a_file_ends(blocks):
    with pytest.raises(RuntimeError, match="direct_reads: the file ends within a range"):
        host.direct_reads(str(blocks[0]), np.array([31 * 4096]), np.array([8192]))
    with pytest.raises(RuntimeError, match="the system refused to open .*No such file"):
        host.direct_reads(str(blocks[0].parent / "none"), np.array([0]), np.array([4096]))


ROWS, TABLE, PAIR = np.array([0]), np.zeros(128, np.uint8), aligned(4096)[:128]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: host.random_rows(TABLE, 64, np.array([2]), PAIR), "rows must be within the table"),
        (lambda: host.random_rows(TABLE, 64, np.array([-1]), PAIR), "rows must be within the table"),
        (lambda: host.random_rows(TABLE, 64, ROWS, PAIR[:64]), r"out must have 2 \* row_bytes for each row"),
        (lambda: host.random_rows(TABLE, 64, ROWS, aligned(4096)[32:160]), "out must be aligned to 64 bytes"),
        (lambda: host.random_rows(TABLE, 40, ROWS, PAIR), "row_bytes must be a multiple of 64"),
        (lambda: host.random_rows(TABLE[::2], 64, ROWS, PAIR), "table must be contiguous, with items of 1 bytes"),
        (lambda: host.random_rows(TABLE, 64, ROWS.astype(np.int32), PAIR), "rows must be contiguous, with items of 8"),
        (lambda: host.random_rows(TABLE, 64, ROWS, PAIR, 0), "threads must be at least 1"),
        (lambda: host.random_rows(TABLE, 64, ROWS, PAIR, 1, -1), "ahead must not be negative"),
        (lambda: host.direct_reads("", np.array([1]), np.array([4096])), "must be multiples of 4096"),
        (lambda: host.direct_reads("", np.array([0]), np.array([100])), "must be multiples of 4096"),
        (lambda: host.direct_reads("", np.array([0]), np.array([0, 0])), "sizes must be as many as offsets"),
        (lambda: host.direct_reads("", np.array([0]), np.array([0]), 0), "threads must be at least 1"),
        (lambda: host.multiply_add_peak("int8", 1, 0.1), "dtype must be float32, float64 or bfloat16, got int8"),
        (
            lambda: host.multiply_add_peak("float32", 1, 0.1, "sse9"),
            "isa must be baseline, avx2, avx512 or avx512bf16, got sse9",
        ),
        (lambda: host.multiply_add_peak("float32", 0, 0.1), "threads must be at least 1"),
        (lambda: host.multiply_add_peak("float32", 1, 0.0), "seconds must be positive"),
        (lambda: host.read_bandwidth(-1, 1, 0.1), "bytes must not be negative"),
        (lambda: host.read_bandwidth(0, 0, 0.1), "threads must be at least 1"),
    ],
)
def test_errors_are_sentences(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_does_not_import_torch():
    path = Path(host.__file__)
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r}); import _host; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_native_finds_it():
    assert _native.host() is host
