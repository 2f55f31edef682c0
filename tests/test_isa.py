"""Every instruction set the library is compiled for: forced by MEMKERNELS_CPU_ISA, proved to have run, and right."""

from __future__ import annotations

import platform

import pytest
from support import run_python

from memkernels import _info, _native

CODE = """
import torch
from memkernels import _native
from memkernels.testing import check, report
assert _native.missing() is None, _native.missing()
rows = check(backend="cpu", quick=True)
assert rows and all(r.passed for r in rows), report(rows)
print(torch.ops.memkernels_cpu.isa())
"""
CALL = """
import torch, memkernels as mk
x = torch.randn(4, 8)
mk.softmax_read(x, x, x, backend="cpu")
"""


def usable() -> list[str]:
    return _info.collect()["processor"]["instruction_sets"]


@pytest.mark.parametrize("isa", usable())
def test_a_forced_instruction_set_runs_and_is_right(isa):
    done = run_python(CODE, MEMKERNELS_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == isa


def test_the_best_instruction_set_is_the_default():
    done = run_python(
        "from memkernels import _native; import torch; _native.missing(); print(torch.ops.memkernels_cpu.isa())",
        MEMKERNELS_CPU_ISA="",
    )
    assert done.stdout.strip() == usable()[-1], done.stderr


def test_instruction_sets_differ_in_bits_somewhere():
    """Two sets that give the same bits on long float32 sums are probably one set."""
    if len(usable()) < 2:
        assert platform.machine() not in ("x86_64", "AMD64"), "an x86 processor without AVX2 cannot show this"
        return
    code = """
import torch, memkernels as mk, hashlib
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(n, 61, generator=g) for n in (33, 1001, 1001))
print(hashlib.sha256(mk.softmax_read(q, k, v, backend="cpu").numpy().tobytes()).hexdigest())
"""
    prints = {run_python(code, MEMKERNELS_CPU_ISA=isa).stdout for isa in usable()}
    assert len(prints) > 1 and "" not in prints


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "neon "])
def test_an_unknown_instruction_set_is_one_clear_error(name):
    done = run_python(CALL, MEMKERNELS_CPU_ISA=name)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for part in ("MEMKERNELS_CPU_ISA", *_native.ISAS, name.strip()):
        assert part in done.stderr, done.stderr
    assert last.startswith(("RuntimeError", "ValueError")) or "MEMKERNELS_CPU_ISA" in done.stderr


def test_info_survives_an_unknown_instruction_set():
    done = run_python("from memkernels.__main__ import main; main(['info'])", MEMKERNELS_CPU_ISA="avx1024")
    assert done.returncode == 0, done.stderr
    assert "MEMKERNELS_CPU_ISA must be" in done.stdout
