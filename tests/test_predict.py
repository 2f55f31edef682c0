"""Bounds read from machine code: what is counted, which loop is the hot one, what binds; and the page of results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from support import ROOT

from bench import cuda_check, predict, sass
from docs import generate

# An outer loop (0x10-0x90) that contains a branch over one instruction and an inner loop (0x40-0x60), code that only
# diverged warps reach (0xb0), and the branch to itself that ends every kernel.
NESTED = """
        Function : nested
    .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/                   FADD R2, R1, R1 ;
        /*0020*/              @!P0 BRA 0x40 ;
        /*0030*/                   MUFU.EX2 R3, R2 ;
        /*0040*/                   FFMA R4, R2, R2, R2 ;
        /*0050*/                   BRA.DIV UR4, 0xb0 ;
        /*0060*/               @P1 BRA 0x40 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/               @P2 EXIT ;
        /*0090*/              @!P3 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0x60 ;
        /*00c0*/                   BRA 0xc0;
"""
# A warp-group product to which ptxas must add waits: an accumulator is written between two of one group.
PRODUCTS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry products(.param .u64 out, .param .u64 a, .param .u64 b)
{
  .reg .f32 %f<4>;
  .reg .b64 %d<3>;
  .reg .pred %p<1>;
  ld.param.u64 %d0, [out];
  ld.param.u64 %d1, [a];
  ld.param.u64 %d2, [b];
  setp.ne.b32 %p0, 0, 1;
  mov.f32 %f0, 0f00000000; mov.f32 %f1, 0f00000000; mov.f32 %f2, 0f00000000; mov.f32 %f3, 0f00000000;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d1, %d2, %p0, 1, 1, 0, 0;
  BETWEEN
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d1, %d2, %p0, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.v4.f32 [%d0], {%f0, %f1, %f2, %f3};
  ret;
}
"""
WAITS = {"alu": 4, "fma": 4, "imad": 4, "special": 18, "": 4, "shared": 29, "shuffle": 23, "global": 263, "matrix": 33}
WAITS["barrier"] = 20
RATES = {"16": 2048, "tf32": 1024, "8": 4096}


def listing(*lines: str) -> list[sass.Instruction]:
    """Instructions at 0x0, 0x10, ... as ``cuobjdump`` would print them."""
    text = "".join(f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    return sass.functions(f"Function : one\n{text}")["one"]


def cycles(*lines: str) -> float:
    return sass.duration(listing(*lines), WAITS, RATES)


def test_instructions_are_read_with_guard_and_operands():
    (name, code), *others = sass.functions(NESTED).items()
    assert name == "nested" and not others and len(code) == 13
    guarded = code[9]
    assert (guarded.address, guarded.guard, guarded.name, guarded.target) == (0x90, "!P3", "BRA", 0x10)
    assert code[7].operands == "R8, R4, R6, R8" and code[-1].target == 0xC0


def test_loops_nest_and_know_what_an_iteration_may_leave_out():
    program = sass.Program(sass.functions(NESTED)["nested"])
    inner, outer = program.loops
    assert outer.inner == (inner,)
    assert [hex(one.address) for one in program.code(inner.blocks)] == ["0x40", "0x50", "0x60"]
    assert [one.opcode for one in program.code(outer.own)] == ["FADD", "BRA", "MUFU", "HMMA", "EXIT", "BRA"]
    assert [one.opcode for one in program.code(outer.sometimes)] == ["MUFU"]
    assert program.hot == outer


def test_a_branch_with_a_predicate_among_its_operands_may_fall_through():
    program = sass.Program(listing("FADD R1, R1, R1", "BRA !P4, 0x0", "MUFU.EX2 R3, R2", "EXIT"))
    assert [one.opcode for one in program.code(program.reached)] == ["FADD", "BRA", "MUFU", "EXIT"]


def test_the_hot_loop_has_the_products_or_else_the_instructions():
    short, long = ("{} R8, R4, R6, R8", "@P1 BRA 0x0"), (*["FADD R1, R1, R1"] * 4, "@P0 BRA 0x20", "EXIT")
    for name, place in (("HMMA.16816.F32.BF16", 0), ("FFMA", 0x20)):
        program = sass.Program(listing(short[0].format(name), short[1], *long))
        assert program.code(program.hot.blocks)[0].address == place


def test_loops_inside_run_as_often_as_said():
    program = sass.Program(sass.functions(NESTED)["nested"])
    assert [sass.count(program.iteration(program.hot, 5, many)).fused for many in (1, 3)] == [1, 3]
    lines = ("FADD R1, R1, R1", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "@P0 BRA 0x10", "@P1 BRA 0x0")
    program = sass.Program(listing(*lines, "EXIT"))
    assert sass.count(program.iteration(program.loops[-1], 5, 1)).pipes["matrix"] == 5


def test_threads_that_met_go_on_where_their_region_ends():
    # The loop goes through a divergent region, whose second half lies behind the end of the kernel.
    region = ("BSSY B0, 0x30", "@P0 BRA 0x50", "BSYNC B0", "@P1 BRA 0x0", "EXIT", "MUFU.EX2 R1, R1", "BSYNC B0")
    program = sass.Program(listing(*region))
    (loop,) = program.loops
    assert [one.opcode for one in program.code(loop.blocks)] == ["BSSY", "BRA", "BSYNC", "BRA", "MUFU", "BSYNC"]


def test_pipes_and_bytes_are_counted():
    work = sass.count(
        listing(
            "@P0 LDG.E.LTC128B.128 R4, desc[UR4][R2.64]",
            "LDG.E.U16.CONSTANT R8, desc[UR4][R2.64]",
            "LDGSTS.E.BYPASS.LTC128B.64 [R5+0x100], desc[UR4][R2.64]",
            "STG.E desc[UR4][R2.64], R4",
            "LDS.128 R4, [R9]",
            "STS.U8 [R9], R4",
            "LDSM.16.M88.4 R4, [R9]",
            "STSM.16.M88.2 [R9], R4",
            "SHFL.BFLY PT, R7, R3, 0x2, 0x1f",
            "IMAD.WIDE R2, R3, 0x4, R4",
            "LOP3.LUT R3, R3, 0xff, RZ, 0xc0, !PT",
            "F2FP.BF16.F32.PACK_AB R3, R4, R5",
            "@!PT LDS RZ, [RZ]",
            "UIADD3 UR4, UR4, 0x1, URZ",
            "BAR.SYNC.DEFER_BLOCKING 0x0",
        )
    )
    assert work.slots == 15
    expected = {"global": 4, "shared": 4, "shuffle": 1, "imad": 1, "alu": 2, "barrier": 1}
    assert work.pipes == expected
    assert work.loads == {16: 1, 2: 1, 8: 1}
    assert (work.loaded, work.stored) == (32 * 26, 32 * 4)
    assert work.shared == 32 * (16 + 1 + 16 + 8)


@pytest.mark.parametrize(
    "line, multiply_adds, kind, operands",
    [
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 16 * 8 * 16, ("16", False), 0),
        ("HMMA.1688.F32.TF32 R8, R4, R6, R8", 16 * 8 * 8, ("tf32", False), 0),
        ("IMMA.16832.S8.S8 R8, R4, R6, R8", 16 * 8 * 32, ("8", False), 0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", 64 * 128 * 16 // 4, ("16", True), (64 + 128) * 8),
        ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24", 64 * 128 * 16 // 4, ("16", True), 128 * 8),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24", 64 * 64 * 8 // 4, ("tf32", True), 128 * 8),
        ("QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", 64 * 64 * 32 // 4, ("8", True), 128 * 8),
    ],
)
def test_products_are_counted(line, multiply_adds, kind, operands):
    work = sass.count(listing(line))
    assert work.products == {kind: multiply_adds} and work.operands == operands


def test_a_warp_waits_for_what_it_reads():
    chain = ("FADD R1, R1, R2", "FADD R1, R1, R3", "FADD R1, R1, R4")
    assert cycles(*chain) == 12
    assert cycles("FADD R1, R2, R2", "FADD R3, R4, R4", "FADD R5, R6, R6") == 3
    assert cycles("LDG.E R1, desc[UR4][R2.64]", "FADD R9, R1, R1") == 264
    assert cycles("LDG.E.128 R4, desc[UR4][R2.64]", "FADD R9, R7, R7") == 264  # the last of four registers
    assert cycles("ISETP.GE.AND P0, PT, R2, R3, PT", "@P0 FADD R5, R6, R6") == 5
    assert cycles("SHFL.BFLY PT, R7, R3, 0x2, 0x1f", "FADD R8, R7, R7") == 24
    assert cycles("FADD R1, R2, R2", "BAR.SYNC.DEFER_BLOCKING 0x0") == 22


def test_copies_and_products_are_waited_for_where_the_code_does():
    copy = ("LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]", "LDGDEPBAR")
    assert cycles(*copy, "DEPBAR.LE SB0, 0x0") == 264
    assert cycles(*copy, "DEPBAR.LE SB0, 0x1") == 264 / 2  # two at a time
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"  # 64 cycles of the unit
    assert cycles(product, "WARPGROUP.DEPBAR.LE gsb0, 0x0") == 64 + 33 + 1
    assert cycles(product, "WARPGROUP.DEPBAR.LE gsb0, 0x1") == 64


def kernel(*lines: str, **changes) -> predict.Kernel:
    """A kernel of one loop over ``lines``."""
    code = listing(*lines, "@P0 BRA 0x0", "EXIT")
    given = predict.Kernel(
        "triton", "made", "one", "90", "bfloat16", 64, "", code, registers=168, shared=0, warps=8, programs=200,
        multiplies=True, passes=(8, 8), faults=(),
    )  # fmt: skip
    return dataclasses.replace(given, **changes)


def test_the_longest_pipe_binds():
    products = ["HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24"] * 4
    row = predict.predict(kernel(*products))
    assert row.bound == "matrix" and row.cycles["matrix"] == 4 * 2 * 64 and row.multiply_adds == 4 * 2 * 64 * 128 * 16
    assert (row.blocks, row.waves, row.filled) == (1, 1.52, 0.758)
    at_most = row.filled * 2048 * 132 * 1.755e9 / 3.95e14
    assert row.at_most == pytest.approx(min(1, at_most), abs=1e-3) and row.in_turns < row.at_most
    row = predict.predict(kernel(*products, *["MUFU.EX2 R3, R2"] * 64))
    assert row.bound == "special" and row.cycles["special"] == 64 * 8 * 2
    assert row.at_most == pytest.approx(at_most / 2, abs=1e-3)
    assert row.in_turns == pytest.approx(at_most / 3, abs=1e-3)


def test_rows_that_meet_once_come_from_memory():
    lines = ["LDG.E.128 R4, desc[UR4][R2.64]"] * 8
    row = predict.predict(kernel(*lines, registers=32, multiplies=False, programs=132 * 8))
    assert (row.bound, row.ceiling, row.at_most) == ("memory", "bandwidth", 1.0)
    shared = predict.predict(kernel(*lines, registers=32, programs=132 * 8))
    assert shared.cycles["memory"] < row.cycles["memory"] / 2 and shared.ceiling == "multiply-add"


def test_registers_and_shared_memory_say_how_many_blocks_fit():
    lines = ("FADD R1, R1, R1",)
    assert predict.predict(kernel(*lines, registers=64)).blocks == 4
    assert predict.predict(kernel(*lines, registers=32, shared=113 << 10)).blocks == 2
    assert predict.predict(kernel(*lines, registers=16)).blocks == 8


@pytest.mark.parametrize("faults, status", [((), 0), (("products serialised",), 1), (("8 bytes spilled",), 1)])
def test_a_fault_fails(faults, status, monkeypatch, capsys):
    made = kernel("FADD R1, R1, R1", faults=faults)
    monkeypatch.setattr(predict, "triton_kernels", lambda arch, dtype, width: iter([made]))
    monkeypatch.setattr(predict, "left_out", lambda: "not looked for")
    assert predict.main(["--dtype", "bfloat16", "--width", "64"]) == status
    text = capsys.readouterr().out
    assert predict.NOTE in text and "CUDA left out: not looked for" in text
    assert all(f"FAILED triton bfloat16 64 made (one): {fault}" in text for fault in faults)


def test_a_file_keeps_the_classes_that_are_not_renewed(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(predict, "FILE", tmp_path / "predicted.jsonl")
    first, other = (predict.predict(kernel("FADD R1, R1, R1", width=width)) for width in (64, 128))
    predict.write([first, other])
    renewed = dataclasses.replace(first, kernel="new")
    predict.write([renewed])
    versions, rows = predict.read()
    assert [(row.kernel, row.width) for row in rows] == [("new", 64), ("made", 128)] and versions[
        "note"
    ] == predict.NOTE
    monkeypatch.setattr(predict, "NOTE", "by another compiler")
    predict.write([renewed])
    assert [row.kernel for row in predict.read()[1]] == ["new"]


@pytest.mark.skipif(not (shutil.which("cu++filt") or shutil.which("c++filt")), reason="there is no c++filt here")
def test_names_of_cuda_kernels_are_short():
    mangled = "_ZN2mk4cuda12_GLOBAL__N_19sum_tilesINS0_4bf16EfLNS1_2OfE2EEEvNS0_6TilingE"
    assert predict._plain([mangled, "_ZN2mk4cuda12_GLOBAL__N_15mergeENS0_10MergeReadsE"]) == [
        "sum_tiles<bf16, float, 2>",
        "merge",
    ]


def finished(code: str) -> str:
    """What ``code`` prints in a process without Triton's interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(cuda_check.cuobjdump() is None, reason="there is no cuobjdump here")
@pytest.mark.parametrize("between, waits", [("add.f32 %f0, %f0, %f0;", True), ("", False)])
def test_ptxas_is_caught_when_it_makes_products_wait(between, waits, tmp_path):
    triton = pytest.importorskip("triton")
    source, cubin = tmp_path / "products.ptx", tmp_path / "products.cubin"
    source.write_text(PRODUCTS.replace("BETWEEN", between))
    subprocess.run([triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", source, "-o", cubin], check=True)
    code = predict.disassembled(cubin.read_bytes())
    assert sum(one.opcode == "HGMMA" for one in code) == 2
    assert sass.waited_for(code) is waits


@pytest.mark.skipif(cuda_check.cuobjdump() is None, reason="there is no cuobjdump here")
def test_a_read_multiplies_in_its_hot_loop_what_its_blocks_say():
    """And a ptxas warning of serialised products reaches the row, and the committed file is of the current kernels."""
    pytest.importorskip("triton")
    code = """
import dataclasses, json, triton
from bench import compilation, predict

def rows():
    found = predict.triton_kernels("90", "bfloat16", 64, ("softmax_read",))
    return {one.kernel: dataclasses.asdict(predict.predict(one)) for one in found}

told = rows()
report = compilation.report
compilation.report = lambda arch, ptx: report(arch, ptx) + (
    "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...")
faults = {name: row["faults"] for name, row in rows().items()}
print(json.dumps([triton.__version__, triton.knobs.nvidia.ptxas.version, told, faults]))
"""
    triton, ptxas, rows, faults = json.loads(finished(code))
    row = rows["softmax_read_kernel"]
    sizes = dict(part.split("=") for part in row["constants"].split())
    assert row["multiply_adds"] == int(sizes["t"]) * int(sizes["n"]) * (int(sizes["k"]) + int(sizes["v"]))
    assert all(shape.startswith("HGMMA.64x") for shape in row["shapes"]) and row["warps"] == int(sizes["warps"])
    assert row["programs"] % (2 * 1024 // int(sizes["t"])) == 0  # of launches.TOKENS, by parts of N
    assert all(found == ["products serialised", *rows[name]["faults"]] for name, found in faults.items())
    versions, recorded = predict.read()
    if (versions["triton"], versions["ptxas"]) == (triton, ptxas):
        known = [
            one
            for one in recorded
            if (one.arch, one.dtype, one.width, one.call) == ("90", "bfloat16", 64, "softmax_read")
        ]
        same = {one.kernel: json.loads(json.dumps(dataclasses.asdict(one))) for one in known}
        # A kernel that several calls launch is listed under the first of them.
        assert "softmax_read_kernel" in same and same.items() <= rows.items(), "run: python -m bench.predict --write"


def test_no_main_kernel_is_serialised_and_the_page_shows_the_file():
    versions, rows = predict.read()
    assert {(row.dtype, row.width) for row in rows if row.backend == "triton"} == {
        (dtype, width) for dtype in predict.DTYPES for width in predict.WIDTHS
    }
    assert not [(row.kernel, row.call) for row in rows if "products serialised" in row.faults]
    shown = generate.blocks((ROOT / "docs" / "predicted.md").read_text())["predicted"]
    assert shown == predict.page(rows, versions) and shown.startswith(predict.NOTE)
    row = next(row for row in rows if row.kernel == "softmax_read_kernel" and row.width == 128)
    assert f"| {' | '.join(predict.cells(row))} |" in shown
