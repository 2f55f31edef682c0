"""Predicts from compiled code where each main kernel will be bound. Needs no GPU, and is no measurement.

    python -m bench.predict                          # compute capability 9.0, bfloat16 and float32, rows of 128 and 64
    python -m bench.predict --dtype bfloat16 --width 128
    python -m bench.predict --write                  # renews those rows of bench/results/predicted.jsonl

The machine code of a kernel has a hot loop. The work of one iteration on every pipe of an SM, over the throughput of
that pipe per cycle (``bench.assumed``), bounds its time from below. The longest of these bounds is the bottleneck, and
sets the share of the ceiling that is left. Kernels of the CUDA library are read where it is built. Exit status 1 when
ptxas serialises the warp-group products of a kernel, or spills registers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memkernels._extras import require

from . import cuda_check
from .assumed import ARCHES, ASSUMED, assumed
from .results import DIRECTORY
from .sass import Instruction, Program, count, duration, functions, waited_for

FILE = DIRECTORY / "predicted.jsonl"
LIBRARY = cuda_check.ROOT / "build" / f"native-{sys.implementation.cache_tag}" / "libmemkernels_cuda.so"
NOTE = "Predicted from compiled code; nothing here was measured."
DTYPES, WIDTHS = ("bfloat16", "float32"), (128, 64)


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled, and how it is launched.

    call: the launch of ``bench.launches`` that it belongs to. programs: blocks of that launch, or None where unknown.
    multiplies: its blocks read the same rows, which the L2 cache then serves. passes: how often loops inside the hot
    one run, with products and without.
    """

    backend: str
    kernel: str
    call: str
    arch: str
    dtype: str
    width: int
    constants: str
    code: list[Instruction]
    registers: int
    shared: int
    warps: int
    programs: int | None
    multiplies: bool
    passes: tuple[int, int]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What is predicted of one kernel.

    blocks: resident on an SM. waves: rounds of them. filled: share of the time that SMs have work.
    slots, barriers, loads: of one iteration of the hot loop in one warp, loads by bytes per lane; sometimes: the slots
    behind a branch. multiply_adds: of one iteration of a block, on the matrix unit where it is used. cycles: pipe ->
    what an iteration of one block takes of it. bound: the pipe with the most. at_most: the share of ``ceiling`` that
    this bound allows; in_turns: the share if the matrix unit rests while the other pipes work.
    """

    backend: str
    kernel: str
    call: str
    arch: str
    dtype: str
    width: int
    constants: str
    programs: int | None
    registers: int
    shared: int
    warps: int
    blocks: int
    waves: float | None
    filled: float
    slots: int
    sometimes: int
    barriers: int
    loads: dict[str, int]
    shapes: dict[str, int]
    multiply_adds: int
    cycles: dict[str, int]
    bound: str
    ceiling: str
    at_most: float
    in_turns: float
    faults: tuple[str, ...]


def predict(kernel: Kernel) -> Row:
    """The bounds of one kernel."""
    know, program = assumed(kernel.arch), Program(kernel.code)
    loop = program.hot
    if loop and kernel.backend == "cuda":  # its loops over columns are not unrolled: the hot one is around them
        loop = max((one for one in program.loops if loop.blocks <= one.blocks), key=lambda one: len(one.blocks))
    code = program.iteration(loop, *kernel.passes) if loop else program.code(program.reached)
    work, warps = count(code), kernel.warps
    sometimes = len(program.code(loop.sometimes)) if loop else 0

    per_warp = -(-kernel.registers // 8) * 8 * 32
    fits = [know["registers"] // (per_warp * warps), know["warps"] // warps, know["blocks"]]
    blocks = int(min(*fits, know["shared memory"] // (kernel.shared + know["reserved"])))
    each = math.inf if kernel.programs is None else math.ceil(kernel.programs / know["processors"])
    filled = 1.0 if kernel.programs is None else kernel.programs / (each * know["processors"])

    bytes_moved = (work.loaded + work.stored) * warps
    dram = know["ceiling bandwidth"] / know["processors"] / know["clock"]
    rate = {kind: know[f"matrix {kind}"] for kind in ("16", "tf32", "8")}
    waits = {name.removeprefix("wait "): value for name, value in know.items() if name.startswith("wait ")}
    waits |= {"fma": waits["alu"], "imad": waits["alu"], "": waits["alu"]}
    waits["global"] = waits["L2" if kernel.multiplies else "memory"]
    lanes = {pipe: 32 * work.pipes[pipe] * warps / know[pipe] for pipe in ("imad", "alu", "special", "shuffle")}
    products = work.products.items()
    cycles = {
        "matrix": sum(n * warps / rate[k] / (1 if group else know["warp product"]) for (k, group), n in products),
        "issue": work.slots * warps / know["issue"],
        "fma": max(32 * (work.pipes["fma"] + work.pipes["imad"]) * warps / know["fma"], lanes["imad"]),
        "alu": lanes["alu"],
        "special": lanes["special"],
        "shared": (work.shared * warps + bytes_moved) / know["shared"] + lanes["shuffle"],
        "memory": bytes_moved / (know["L2"] if kernel.multiplies else dram),
        "latency": duration(code, waits, rate) / max(1, min(blocks, each)),
    }
    others = max(cycles[pipe] for pipe in ("issue", "fma", "alu", "special", "shared"))
    cycles["shared"] += work.operands * warps / know["shared"]  # read while the matrix unit works
    bound = max(cycles, key=cycles.get)
    slowest = max(cycles["matrix"] + others, cycles[bound])

    multiply_adds, ceiling = work.multiply_adds, "matrix unit"
    if multiply_adds:
        done, most = (
            multiply_adds,
            know["ceiling tf32" if any(k == "tf32" for k, _ in work.products) else "ceiling 16"] / 2,
        )
    elif kernel.multiplies:
        multiply_adds, ceiling = 32 * work.fused, "multiply-add"
        done, most = multiply_adds, know["fma"] * know["processors"] * know["clock"]
    else:
        done, most, ceiling = work.loaded + work.stored, know["ceiling bandwidth"], "bandwidth"
    per_second = filled * know["processors"] * know["clock"]
    shares = [round(min(1.0, done * warps / time * per_second / most), 3) for time in (cycles[bound], slowest)]
    return Row(
        **{field.name: getattr(kernel, field.name) for field in dataclasses.fields(Row) if hasattr(kernel, field.name)},
        blocks=blocks,
        waves=None if kernel.programs is None else round(kernel.programs / know["processors"] / max(blocks, 1), 2),
        filled=round(filled, 3),
        slots=work.slots,
        sometimes=sometimes,
        barriers=work.pipes["barrier"],
        loads={str(size): n for size, n in sorted(work.loads.items())},
        shapes=dict(work.shapes),
        multiply_adds=multiply_adds * warps,
        cycles={pipe: round(value) for pipe, value in cycles.items()},
        bound=bound,
        ceiling=ceiling,
        at_most=shares[0],
        in_turns=shares[1],
    )  # fmt: skip


def triton_kernels(arch: str, dtype: str, width: int, only: Sequence[str] = ()) -> Iterator[Kernel]:
    """Every Triton kernel of the main launches (those named in ``only``, or all)."""
    import torch

    from .compilation import Build, multiplies, registers_and_spills, report, serialised
    from .compile import launched
    from .launches import launches

    seen = set()
    for one in launches(getattr(torch, dtype), width, "meta"):
        if not one.main or (only and one.name not in only):
            continue
        for name, blocks, constants, _, build in launched(one, arch):
            key = Build(build).key
            if key in seen:
                continue
            seen.add(key)
            made = build.compile()
            code, said = disassembled(made.asm["cubin"]), report(arch, made.asm["ptx"])
            registers, spills = registers_and_spills(said)
            faults = ["products serialised"] if serialised(said) or waited_for(code) else []
            faults += [f"{spills} bytes spilled"] if spills else []
            yield Kernel(
                "triton", name, one.name, arch, dtype, width, _configuration(constants), code, registers,
                made.metadata.shared, made.metadata.num_warps, blocks, multiplies(made),
                (_passes(build.function, constants, width, arch),) * 2, tuple(faults),
            )  # fmt: skip


def _configuration(constants: dict) -> str:
    """The constants that a launch configuration sets, and what makes variants of a kernel."""
    shown = ("BLOCK_", "num_", "KIND", "GATE", "LIST", "REVERSE", "MEASURE")
    short = {name.removeprefix("BLOCK_").removeprefix("num_").lower(): x for name, x in constants.items()
             if name.startswith(shown)}  # fmt: skip
    return " ".join(f"{name}={x}" for name, x in short.items())


def _passes(function, constants: dict, width: int, arch: str) -> int:
    """How often loops inside the hot loop run: tokens of a chunk where a kernel takes them one after the other
    (``at_token`` of ``triton_kernels/write_scan.py``), else blocks of columns."""
    if "at_token" in function.fn.__code__.co_names:
        return constants["BLOCK_T"]
    step = constants.get("BLOCK_A") or constants.get("BLOCK_K", width)
    return width // step if step < width else int(assumed(arch)["passes"])


def disassembled(cubin: bytes) -> list[Instruction]:
    """The instructions of the one kernel of ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = functions(cuda_check.read(file.name, "-sass")).values()
    return code


def cuda_kernels(library: Path) -> Iterator[Kernel]:
    """The kernels of the CUDA library for 9.0 that go through rows, but those of float16, which are bfloat16's again.

    Launches are not known here, so neither is their dynamic shared memory.
    """
    target = "sm_90a"
    used = {one.name: one for one in cuda_check.kernels(library) if one.target == target}
    plain = dict(zip(used, _plain(list(used))))
    chosen = [name for name in used if re.match(r"(?!add_|copy_)\w+<", plain[name]) and not _words(plain[name], "f16")]

    def dump(*what: str) -> str:
        command = [cuda_check.cuobjdump(), "-arch", target, *what, library]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    threads = re.findall(r"^\.nv\.info\.(\w+)$.*?EIATTR_MAX_THREADS.*?Value:\s+0x(\w+)", dump("-elf"), re.M | re.S)
    warps = {name: int(count, 16) // 32 for name, count in threads}
    for name, code in functions(dump("-sass", "-fun", ",".join(chosen))).items():
        one, (kernel, _, types) = used[name], plain[name].partition("<")
        dtype = "bfloat16" if _words(types, "bf16") else "tf32" if _words(types, "tf32") else "float32"
        faults = ["products serialised"] if waited_for(code) else []
        faults += [f"{one.stack + one.local} bytes spilled"] if one.stack + one.local else []
        yield Kernel(
            "cuda", kernel, "", "90", dtype, 0, types.rstrip(">"), code, one.registers, one.shared, warps[name], None,
            any(step.pipe == "matrix" for step in code), (int(assumed("90")["passes"]), 1), tuple(faults),
        )  # fmt: skip


def _words(name: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", name) is not None


def _plain(names: Sequence[str]) -> list[str]:
    """Mangled names as C++ writes them, without namespaces, casts and arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = re.sub(r"\(anonymous namespace\)::|<unnamed>::|mk::cuda::|^void ", "", text, flags=re.M)
    return [re.sub(r"\(\w+\)(?=\d)|\(.*", "", line) for line in short.splitlines()]


def left_out() -> str | None:
    """Why the CUDA library is not read here, or None."""
    if (why := cuda_check.missing()) is not None:
        return why
    if not LIBRARY.exists():
        return "the library is not built here (make cuda)"
    return None if shutil.which("cu++filt") or shutil.which("c++filt") else "there is no c++filt here"


HEAD = (
    *("kernel", "call", "configuration", "registers", "blocks", "waves", "slots", "barriers", "bytes a load"),
    *("matrix", "issue", "fma", "alu", "special", "shared", "memory", "latency"),
    *("bound by", "ceiling", "at most", "in turns", "remarks"),
)


def cells(row: Row) -> list[str]:
    """One row as the tables show it."""
    loads = sum(row.loads.values())
    each = sum(int(size) * n for size, n in row.loads.items()) / loads if loads else 0
    remarks = list(row.faults)
    if row.sometimes > row.slots / 4:
        remarks.append(f"{row.sometimes / row.slots:.0%} behind branches")
    if row.filled < 0.8:
        remarks.append(f"processors filled to {row.filled:.0%} at this shape")
    waves, width = "" if row.waves is None else f"{row.waves:g}", f"{each:.3g}" if loads else ""
    return [
        *(row.kernel, row.call, row.constants, str(row.registers), str(row.blocks), waves),
        *(str(row.slots), str(row.barriers), width, *(str(row.cycles[pipe]) for pipe in HEAD[9:17])),
        *(row.bound, row.ceiling, _percent(row.at_most), _percent(row.in_turns), "; ".join(remarks)),
    ]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [list(HEAD), *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in lines)


def page(rows: Sequence[Row], versions: dict) -> str:
    """What docs/predicted.md shows: bfloat16 with rows of 128 columns, and what the prediction rests on."""
    shown = [row for row in rows if (row.arch, row.dtype) == ("90", "bfloat16") and row.width in (0, 128)]
    text = f"{NOTE} Triton {versions['triton']}, ptxas {versions['ptxas']}, compute capability 9.0, bfloat16.\n"
    for backend, title in (("triton", "Triton, rows of 128 columns"), ("cuda", "CUDA")):
        lines = [cells(row) for row in shown if row.backend == backend]
        if lines:
            text += f"\n### {title}\n\n{_markdown(HEAD, lines)}"
    known = [[name, f"{a:g}", f"{b:g}", unit, source] for name, (a, b, unit, source) in ASSUMED.items()]
    return text + f"\n### What it rests on\n\n{_markdown(('figure', '8.0', '9.0', 'unit', 'source'), known)}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def read() -> tuple[dict, list[Row]]:
    """Versions and rows of the committed file."""
    head, *lines = map(json.loads, FILE.read_text().splitlines())
    return head, [Row(**dict(zip(head["columns"], line))) for line in lines]


def write(rows: Sequence[Row]) -> None:
    """Renew the classes of ``rows`` in the committed file. Those of other compilers are dropped."""
    import triton

    versions = {"note": NOTE, "triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version}

    def kind(row: Row) -> tuple:
        return row.backend, row.arch, row.dtype, row.width

    renewed, kept = {kind(row) for row in rows}, []
    if FILE.exists():
        head, before = read()
        same = all(head[name] == version for name, version in versions.items())
        kept = [row for row in before if same and kind(row) not in renewed]
    fields = [field.name for field in dataclasses.fields(Row)]
    ordered = sorted([*rows, *kept], key=lambda row: (row.backend, row.arch, row.dtype, row.width, *_place(row)))
    lines = [{**versions, "columns": fields}, *([getattr(row, name) for name in fields] for row in ordered)]
    FILE.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def _place(row: Row) -> tuple:
    return row.kernel, row.call, row.constants, row.programs or 0, row.slots


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=("90",))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--width", nargs="+", type=int, choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--write", action="store_true", help="renew these rows of the committed file")
    options = parser.parse_args(arguments)
    require(parser.prog, "triton")
    rows: list[Row] = []
    for arch in options.arch:
        for dtype in options.dtype:
            for width in options.width:
                new = sorted(map(predict, triton_kernels(arch, dtype, width)), key=_place)
                print(f"\nTriton, sm_{arch}, {dtype}, rows of {width} columns. {NOTE}\n{table(new)}", flush=True)
                rows += new
    why = left_out() if "90" in options.arch else "its code is read for compute capability 9.0 alone"
    if why is not None:
        print(f"\nCUDA left out: {why}")
    else:
        new = sorted(map(predict, cuda_kernels(LIBRARY)), key=_place)
        print(f"\nCUDA, sm_90a. {NOTE}\n{table(new)}")
        rows += new
    if options.write:
        write(rows)
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"FAILED {row.backend} {row.dtype} {row.width} {row.kernel} ({row.call}): {', '.join(row.faults)}")
    print(f"{len(rows)} kernels, {len(faulty)} with faults")
    return 1 if faulty or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
