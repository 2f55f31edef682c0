"""Every instruction set of the library: MEMKERNELS_CPU_ISA forces it, it is shown to have run, and is right."""

from __future__ import annotations

import platform
from pathlib import Path

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
    """Pairs of bfloat16 are faster where AMD made the processor."""
    best = usable()[-1]
    if best == "avx512bf16" and "AMD" not in Path("/proc/cpuinfo").read_text():
        best = "avx512"
    done = run_python(
        "from memkernels import _native; import torch; _native.missing(); print(torch.ops.memkernels_cpu.isa())",
        MEMKERNELS_CPU_ISA="",
    )
    assert done.stdout.strip() == best, done.stderr


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


PAIRS = """
import torch, memkernels as mk
g = torch.Generator().manual_seed(0)
for T, N, K, V, slots in ((33, 97, 64, 24, 97), (200, 1200, 10, 7, 900), (64, 300, 6, 33, 2), (17, 5, 2, 1, 5)):
    q, k, v = (torch.randn(n, w, generator=g).bfloat16() for n, w in ((T, K), (N, K), (N, V)))
    odd = torch.randn(N, K + 1, generator=g).bfloat16()[:, 1:]  # rows at odd places
    mask = torch.arange(N) % N < slots
    for keys in (k, odd):
        for scale in (K**-0.5, -2.0, 0.0):
            for m in (None, mask, torch.randn(N, generator=g)):
                read, lse = mk.softmax_read(q, keys, v, scale=scale, slot_mask=m, return_lse=True, backend="cpu")
                bias = 0 if m is None else torch.where(m, 0.0, -torch.inf) if m.dtype == torch.bool else m
                s = scale * q.double() @ keys.double().T + bias
                want, norm = torch.softmax(s, -1) @ v.double(), torch.logsumexp(s, -1)
                assert (read - want).abs().max() <= 2**-7 * v.abs().max(), (T, N, K, V, scale)
                # Scores are not rounded to bfloat16: one of 50 would be off by 0.1.
                limit = 1e-5 * (1 + s.nan_to_num(neginf=0).abs().max())
                assert (lse - norm).abs().max() <= limit, (T, N, K, V, scale)
                count = min(4, slots)
                chosen = mk.topk_search(q, keys, count, scale=scale, slot_mask=m, backend="cpu")[1]
                assert (s.gather(-1, chosen) - s.topk(count).values).abs().max() <= limit, (T, N, K, scale)
                if scale < 0:  # saturated: dS is the rounding of the read
                    continue
                with torch.enable_grad():
                    given = [x.clone().requires_grad_() for x in (q, keys, v)]
                    exact = [x.double().requires_grad_() for x in (q, keys, v)]
                    r, l = mk.softmax_read(*given, scale=scale, slot_mask=m, return_lse=True, backend="cpu")
                    s = scale * exact[0] @ exact[1].T + bias
                    want, norm = torch.softmax(s, -1) @ exact[2], torch.logsumexp(s, -1)
                d_read, d_lse = torch.randn(r.shape, generator=g).bfloat16(), torch.randn(l.shape, generator=g)
                found = torch.autograd.grad((r, l), given, (d_read, d_lse))
                right = torch.autograd.grad((want, norm), exact, (d_read.double(), d_lse.double()))
                for x, y in zip(found, right):
                    assert (x - y).abs().max() <= 1e-2 * y.abs().max(), (T, N, K, V, scale)
k[3, 1] = torch.nan
assert mk.softmax_read(q[:, :2].contiguous(), k[:, :2].contiguous(), v, backend="cpu").isnan().all()
"""


@pytest.mark.parametrize("isa", [name for name in usable() if name.startswith("avx512")])
def test_many_queries_of_bfloat16(isa):
    """With and without products of pairs: odd widths and offsets, masks, merged ranges, scores that are not rounded."""
    done = run_python(PAIRS, MEMKERNELS_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


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
