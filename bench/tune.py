"""Chooses launch configurations and rewrites ``triton_kernels/configs.json``.

    python -m bench.tune                   # on a GPU: measures candidates, rewrites the rows of this GPU's architecture
    python -m bench.tune --arithmetic      # without one: keeps a row that compiles well, else takes the next that does

Measured: for every row of the table, each candidate is timed beside the present row in the main calls of
``bench.launches`` that take it (in all that do, where no main one does), and the fastest becomes the row, marked
"measured". Arithmetic: a row must compile without spills, within the shared memory of a block, and with matrix
instructions where it multiplies (``bench.compile``); a row that does not is replaced by the first smaller candidate
that does. Measured rows are left alone there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence

import torch

from memkernels import _triton
from memkernels._extras import optional, require

from .compile_check import WIDTHS, Record
from .launches import Launch, launches, replayed
from .targets import TARGETS
from .timers import interleave

with optional("triton"):
    from .compile import compiled, launched

    configs, launch = (
        importlib.import_module(f"{_triton.kernels().__name__}.{name}") for name in ("configs", "launch")
    )

DTYPES = {16: ("bfloat16", "float16"), 32: ("float32", "tf32")}
DTYPE = {16: torch.bfloat16, 32: torch.float32}  # that is measured
REGISTERS = 65536  # of an SM, for all threads of a block
GAIN = 0.98  # a candidate replaces the present row when it takes less than this share of its time


def save() -> None:
    """Write the table, one row a line."""
    rows = []
    for (k, a, b, w), c in sorted(configs.table().items(), key=lambda row: (row[0][0], row[0][1].zfill(12), row[0])):
        rows.append({"kernel": k, "arch": a, "bits": b, "width": w, **dataclasses.asdict(c)})
        if not c.registers:
            del rows[-1]["registers"]
    configs.TABLE.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")


def put(key: tuple, config: configs.Config) -> None:
    """Use ``config`` from the next call on."""
    configs.table()[key] = config
    replayed.cache_clear()


def smaller(config: configs.Config, kernel: str) -> Iterator[configs.Config]:
    """What to try where ``config`` does not fit: fewer stages, more warps or fewer, smaller blocks.

    Fewer warps help where each of them holds the whole of an operand.
    """
    tokens = dict.fromkeys(max(16, config.block_t // d) if config.block_t >= 16 else config.block_t for d in (1, 2, 4))
    slots = dict.fromkeys(max(16, config.block_n // d) if config.block_n >= 16 else config.block_n for d in (1, 2, 4))
    blocks = sorted(itertools.product(tokens, slots), key=lambda block: -block[0] * block[1])
    if kernel == "write_gradient":  # its tokens are a chunk, which sets how much memory the backward pass takes
        blocks = list(itertools.product(tokens, slots))
    counts = (*(w for w in (1, 2, 4, 8, 16) if w >= config.warps), *(w for w in (8, 4) if w < config.warps))
    for (t, n), warps, stages in itertools.product(blocks, counts, range(config.stages, 0, -1)):
        yield configs.Config(t, n, warps, stages, "arithmetic")


def arithmetic(archs: Sequence[str], bits: Sequence[int], widths: Sequence[int], only: tuple[str, ...]) -> bool:
    """Replace rows that do not compile well in the calls ``only`` (empty: all). True when none is left."""
    names = only or tuple(one.name for one in launches(torch.float32, 64, "meta"))
    stuck: set[tuple] = set()
    record = Record()
    for b, w, arch in itertools.product(bits, widths, archs):
        untried: dict[tuple, Iterator] = {}
        for dtype in DTYPES[b][:1] if only else DTYPES[b]:
            # A row that one call needs smaller is smaller for all others too: until a whole round changes nothing.
            while any(_fitted(name, arch, dtype, w, untried, stuck, record) for name in names):
                save()
    return not stuck


def _fitted(
    name: str, arch: str, dtype: str, width: int, untried: dict[tuple, Iterator], stuck: set[tuple], record: Record
) -> bool:
    """Replace the rows of one call until it compiles well or nothing smaller is left; whether any was replaced."""
    changed = False
    while True:
        faulty = {}
        for found in compiled(arch, dtype, width, (name,), record.needs()):
            record.put(found)
            if found.faults():
                faulty[found.row] = found
        record.write()
        faulty = {key: found for key, found in faulty.items() if key not in stuck}
        if not faulty:
            return changed
        for key, found in faulty.items():
            present = configs.table()[key]
            limit = min(255, REGISTERS // (32 * present.warps))
            if found.needs.spills and found.needs.registers < limit and not present.registers:
                candidate = dataclasses.replace(present, registers=limit)  # ptxas had more, and spilled
            else:
                own = dataclasses.replace(present, registers=0)
                others = dict.fromkeys(c for c in smaller(own, key[0]) if c != own)
                candidate = next(untried.setdefault(key, iter((*others, own))), None)  # none fits: as it was
            why = f"{found}: {', '.join(found.faults())}"
            if candidate is None or present.source == "measured":
                print(f"no configuration fits: {why}", flush=True)
                stuck.add(key)
            else:
                print(f"{why}\n    -> {candidate}", flush=True)
                put(key, candidate)
                changed = True


def candidates(config: configs.Config, kernel: str) -> Iterator[configs.Config]:
    """What is measured beside ``config``."""
    tokens = sorted({config.block_t, *((32, 64, 128) if config.block_t >= 16 and config.block_n >= 16 else ())})
    slots = sorted({config.block_n, *((32, 64, 128) if config.block_n >= 16 else ())})
    if kernel == "write_gradient":
        tokens = [config.block_t]  # the chunk, which sets how much memory the backward pass takes
    for t, n, warps, stages in itertools.product(tokens, slots, (4, 8), (1, 2, 3, 4)):
        yield configs.Config(t, n, warps, stages, "measured")


def seconds(calls: Sequence[Launch]) -> float:
    """Time of the calls one after the other; infinite where one does not compile or fit."""
    try:
        for one in calls:
            one.run()
        torch.cuda.synchronize()
    except Exception:  # out of shared memory or registers: not a candidate
        return float("inf")
    spread = interleave({"all": [lambda: [one.run() for one in calls]]}, "cuda", 0.1)["all"]
    return spread.low


def served(bits: int) -> Iterator[tuple[str, int]]:
    """Precision of products and the row widths of calls that between them reach every row of so many bits, each once.

    Where products are exact, rows of 32 bits go in several blocks from 128 columns on: 128 is a row of TF32 alone.
    """
    rows = set()
    for precision in ("ieee",) if bits == 16 else ("ieee", "tf32"):
        with matmul_precision(precision):
            for width in WIDTHS:
                row = configs.reach(launch.width(width, torch.empty(0, dtype=DTYPE[bits])))
                if row == width and row not in rows:
                    rows.add(row)
                    yield precision, width


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 products on CUDA: "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def measured(bits: Sequence[int], widths: Sequence[int]) -> None:
    """Time candidates on this GPU and keep the fastest."""
    major, minor = torch.cuda.get_device_capability()
    arch = configs.nearest(10 * major + minor)
    for b in bits:
        for precision, w in served(b):
            if w in widths:
                with matmul_precision(precision):
                    _fastest(takers(arch, b, w), tuple(launches(DTYPE[b], w, "cuda")))


def takers(arch: str, bits: int, width: int) -> dict[tuple, list[str]]:
    """Every row of this class -> the calls of the class that take it, by name: the main ones, where there are any."""
    found: dict[tuple, list[Launch]] = {}
    for one in launches(DTYPE[bits], width, "meta"):
        for key in dict.fromkeys(noted.row for noted in launched(one, arch)):
            if key[2:] == (bits, width):
                found.setdefault(key, []).append(one)
    return {key: [one.name for one in calls if one.main or not calls[0].main] for key, calls in found.items()}


def _fastest(rows: Mapping[tuple, Container[str]], every: Sequence[Launch]) -> None:
    """Measure the configurations of ``rows`` in the calls that take them."""
    for key, names in rows.items():
        kernel, arch, bits, width = key
        calls = [one for one in every if one.name in names]
        present = configs.table()[key]
        best, time = present, seconds(calls)
        for candidate in candidates(present, kernel):
            put(key, candidate)
            if (now := seconds(calls)) < GAIN * time:
                best, time = candidate, now
        put(key, dataclasses.replace(best, source="measured"))
        print(f"{kernel} sm_{arch} {bits} bits, width {width}: {best}, {time * 1e3:.3f} ms", flush=True)
        save()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--arithmetic", action="store_true", help="choose by compilation, without a GPU")
    parser.add_argument("--arch", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS), help="with --arithmetic")
    parser.add_argument("--main", action="store_true", help="with --arithmetic: only the heaviest calls")
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=(16, 32))
    parser.add_argument("--width", nargs="+", type=int, choices=WIDTHS, default=WIDTHS)
    options = parser.parse_args(arguments)
    require(parser.prog, "triton")
    if options.arithmetic:
        only = ()
        if options.main:
            only = tuple(one.name for one in launches(torch.float32, 64, "meta") if one.main or one.heavy)
        return 0 if arithmetic(options.arch, options.bits, options.width, only) else 1
    if not torch.cuda.is_available():
        print("tune: no GPU is here; --arithmetic chooses by compilation", file=sys.stderr)
        return 1
    measured(options.bits, options.width)
    return 0


if __name__ == "__main__":
    sys.exit(main())
