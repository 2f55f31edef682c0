"""memkernels._host: what it says about the processor is what the system says, and its ceilings are plausible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    "call, says",
    [
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
